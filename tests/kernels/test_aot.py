"""Kernels compiled ahead of time: no card, the same bytes again, no paths inside, and no more than a card has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fastfsl import bundle
from fastfsl.errors import ConfigError
from fastfsl.kernels import aot, flow_kernels, flow_persistent
from fastfsl.kernels.aot import compile_flow, parse_architectures
from fastfsl.kernels.aot_jobs import Built, Job, check_budgets, compile_jobs
from fastfsl.kernels.tiles import ARCHITECTURES, ROW_CLASSES, SHARED_MEMORY, Tile, flow_tile

SMALL = Tile(16, 32, 32, 4, 2)


def _job(kernel: str = "second", **fields: Any) -> Job:
    return Job(**{"kernel": kernel, "dim": 128, "dtype": "fp16", "arch": 80, "tile": SMALL, **fields})


# ptxas 12.9 by itself keeps to 72 registers and spills 8 bytes.
SPILLING = _job(dim=160, arch=86, tile=Tile(64, 64, 32, 4, 4))


@pytest.fixture(scope="module")
def built() -> dict[Job, Built]:
    return compile_jobs([_job(), _job("exit"), SPILLING, _job(arch=90), _job(dtype="bf16")])


def test_a_kernel_is_compiled_as_it_is_launched(built):
    second = built[_job()]
    assert second.arguments == bundle.kernel_arguments("second")
    assert built[_job("exit")].arguments == bundle.kernel_arguments("exit")
    assert second.cubin.startswith(b"\x7fELF")
    assert second.entry.encode() in second.cubin
    assert f".entry {second.entry}(" in second.ptx
    assert (second.stack, second.scratch) == (0, 0)
    assert 16 < second.registers <= 255
    assert 2 * 32 * (16 + 32) <= second.shared_memory <= SHARED_MEMORY[80]  # the operands of a pass, in 16 bits
    assert f".reqntid {32 * SMALL.warps}\n" in second.ptx
    # After the arguments come two scratch pointers, and nothing else.
    assert second.ptx.count(f".param .u64 .ptr .global .align 1 {second.entry}_param_") == 6 + 2
    assert set(second.compiler) >= {"triton", "ptxas"}


def test_the_same_bytes_wherever_a_program_is_loaded():
    """ptxas of CUDA 13 left to itself makes four cubins of this PTX, by the addresses it is loaded at."""
    # Asked by a process of its own: whatever this one started would inherit it.
    ask = "import sys; from fastfsl.kernels.aot_worker import fix_addresses; sys.exit(not fix_addresses())"
    if subprocess.run([sys.executable, "-c", ask], check=False).returncode:
        pytest.skip("the system gives programs other addresses each time, and does not let that be changed")
    job = _job(arch=100, tile=Tile(64, 64, 64, 8, 4))
    assert len({compile_jobs([job])[job].cubin for _ in range(4)}) == 1


def test_registers_are_not_spilled_for_one_program_more(built):
    assert built[SPILLING].stack == 0
    assert built[SPILLING].registers <= 128


def test_the_architecture_is_that_of_the_card(built):
    assert ".target sm_80" in built[_job()].ptx
    assert ".target sm_90a" in built[_job(arch=90)].ptx
    assert built[_job()].cubin != built[_job(arch=90)].cubin


def test_the_fallback_is_ptx_of_cuda_12(built):
    assert ".version 8.0\n" in built[_job()].ptx


def test_loads_are_asynchronous_and_products_are_on_tensor_cores(built):
    assert "cp.async" in built[_job()].ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in built[_job()].ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in built[_job(dtype="bf16")].ptx


def test_two_builds_are_equal_and_hold_no_paths(built, monkeypatch, tmp_path):
    # Another folder for temporary files, another user's home and a debugging build must leave no trace.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("TRITON_DEBUG", "1")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    again = compile_jobs([_job()])
    assert again == {_job(): built[_job()]}
    for one in built.values():
        for data in (one.cubin, one.ptx.encode()):
            assert not re.search(rb"/(tmp|home|root|usr|opt|var|work)\b|site-packages|fastfsl|\.py\b", data)
            assert os.fsencode(Path.home()) not in data
    assert list(tmp_path.iterdir()) == []  # no cache is left behind


def test_equal_jobs_are_compiled_once():
    done: list[tuple[int, int]] = []
    compile_jobs([_job(), _job()], on_progress=lambda *progress: done.append(progress))
    assert done == [(1, 1)]


# ----------------------------------------------------------------------------------------- without compiling anything


@pytest.mark.parametrize("family", [flow_kernels, flow_persistent])
def test_every_parameter_has_a_kind(family):
    for name, function in family.FLOW.items():
        constants = family.constants(name, 128, SMALL)
        assert set(function.arg_names) - set(constants) <= set(family.KINDS)
        assert set(constants) <= set(function.arg_names)


def _fake(job: Job) -> Built:
    data = repr((job.kernel, job.tile, job.arch)).encode()
    return Built("entry", 1024, 0, 64, 0, bundle.kernel_arguments(job.kernel) or (), data, data.decode(),
                 {"triton": "3.9.0", "ptxas": "13.0"})  # fmt: skip


@pytest.fixture
def faked(monkeypatch):
    asked: list[Job] = []

    def compiled(jobs, on_progress=None):
        asked.extend(jobs)
        return {job: _fake(job) for job in asked}

    monkeypatch.setattr(aot, "compile_jobs", compiled)
    return asked


@pytest.mark.parametrize("dim", [128, 512, 1280])
def test_a_flow_has_every_kernel_for_every_row_class(faked, dim, tmp_path):
    flow = compile_flow(dim, "bf16", (90, 86))
    assert flow.kernels.architectures == ["sm_86", "sm_90"]
    assert {job.arch for job in faked} == {80, 86, 90}  # sm_80 for PTX alone
    for name, target in flow.kernels.targets.items():
        assert target.kind == ("ptx" if name == "ptx" else "cubin")
        for row_class in ROW_CLASSES:
            # Whatever card compiles the PTX, it has the memory for it.
            tile = flow_tile(86 if name == "ptx" else target.arch, dim, row_class or 10**6, "bf16")
            for kernel in ("enter", "first", "second", "carry", "exit", "logits"):
                found = target.find(kernel, row_class)
                assert found is not None
                if kernel != "logits":
                    assert asdict(found.tile) == asdict(tile)
                assert f"'{kernel}', Tile(rows={found.tile.rows}," in flow.files[found.file].decode()
                assert f", {target.arch})" in flow.files[found.file].decode()
    assert len(set(flow.files.values())) == len(flow.files)  # equal tiles share a file
    flow.write(tmp_path)
    index = (tmp_path / bundle.FLOW_KERNELS_INDEX).read_bytes()
    assert bundle.KernelSet.from_json(index) == flow.kernels
    written = {path.relative_to(tmp_path / "flow/kernels").as_posix() for path in tmp_path.rglob("*.*")}
    assert written == {*flow.files, "kernels.json"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", ARCHITECTURES),
        ("sm_90", (90,)),
        ("90", (90,)),
        ("sm_90, 80,sm_80", (80, 90)),
    ],
)
def test_architectures_by_name(text, expected):
    assert parse_architectures(text) == expected


@pytest.mark.parametrize("text", ["", "sm_75", "sm_90a", "all,sm_90", "sm_80;sm_90", "80,", "٨٠"])
def test_unknown_architectures(text):
    with pytest.raises(ConfigError, match=r"expected 'all', or some of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"):
        parse_architectures(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "8 bytes of local memory, expected at most 0"),
        ({"scratch": 4}, "4 bytes of scratch memory, expected at most 0"),
        ({"shared_memory": (163 << 10) + 1}, "166913 bytes of shared memory, expected at most 166912"),
    ],
)
def test_a_kernel_over_budget_is_refused(changes, words):
    job = _job("carry")
    with pytest.raises(ConfigError, match=words) as caught:
        check_budgets({job: replace(_fake(job), **changes)})
    assert "carry for sm_80 (d = 128, fp16" in str(caught.value)
    check_budgets({job: replace(_fake(job), shared_memory=163 << 10)})
    with pytest.raises(ConfigError, match="expected at most 101376"):
        check_budgets({job: replace(_fake(job), shared_memory=163 << 10)}, card=86)


def test_a_flow_over_budget_is_refused(monkeypatch):
    def compiled(jobs, on_progress=None):
        return {job: replace(_fake(job), stack=8 if job.arch == 90 else 0) for job in jobs}

    monkeypatch.setattr(aot, "compile_jobs", compiled)
    with pytest.raises(ConfigError, match=r"for sm_90.* 8 bytes of local memory"):
        compile_flow(128, "fp16", (80, 90))
    assert compile_flow(128, "fp16", (80,)).kernels.architectures == ["sm_80"]


def test_ptx_has_to_fit_the_smallest_card(monkeypatch):
    def compiled(jobs, on_progress=None):
        return {job: replace(_fake(job), shared_memory=120 << 10) for job in jobs}

    monkeypatch.setattr(aot, "compile_jobs", compiled)
    with pytest.raises(ConfigError, match="122880 bytes of shared memory, expected at most 101376"):
        compile_flow(128, "fp16", (90,))


def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(
        ConfigError, match=r"(?s)second could not be compiled for sm_80 \(d = 128, fp16\): .*power of 2"
    ):
        compile_jobs([_job(tile=replace(SMALL, rows=24))])


def test_what_others_print_does_not_come_between_the_answers():
    with pytest.raises(ConfigError, match="module 'this' has no attribute 'FLOW'"):  # it prints when it is imported
        compile_jobs([_job(family="this")])


def test_nothing_is_begun_after_a_failure():
    done: list[tuple[int, int]] = []
    others = [_job(tile=replace(SMALL, rows=16, stages=stages)) for stages in range(1, 10)]
    with pytest.raises(ConfigError, match="no attribute 'FLOW'"):
        compile_jobs(
            [*others, _job(family="this", tile=Tile(128, 128, 32, 4, 2))], on_progress=lambda *p: done.append(p)
        )
    assert len(done) < len(others)


def test_a_compiler_that_dies_is_an_error(monkeypatch):
    whole = subprocess.Popen

    def dying(command, **options):
        return whole(["/bin/sh", "-c", "echo out of memory >&2; exit 1"], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    with pytest.raises(ConfigError, match="its process ended with code 1: out of memory"):
        compile_jobs([_job()])


def test_triton_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton"):
        compile_jobs([_job()])
