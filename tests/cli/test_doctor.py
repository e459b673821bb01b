"""`fastfsl doctor`: what it finds, and what it advises where something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from fastfsl.cli import parts as PARTS
from fastfsl.cli.doctor import compiled_kernels, find_gpus, find_problems, parse_nvidia_smi
from fastfsl.cli.machine import threads
from fastfsl.runtime.processor import processor
from tests.runtime.fake_driver import FakeDriver

# The package's attribute of that name is the command, not the module.
DOCTOR = sys.modules[find_gpus.__module__]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU = {"name": "NVIDIA H100", "compute_capability": "9.0", "driver": "580.1", "memory_mib": 81559}


def test_json_names_providers_and_problems(fastfsl):
    document = fastfsl("doctor", "--json").document
    assert CPU in document["providers"]
    assert isinstance(document["problems"], list)
    assert document["packages"]["numpy"]
    assert document["threads"]["usable"] >= 1
    kernels = document["compiled_kernels"]
    assert set(kernels) == {"usable", "architecture", "reason"}
    assert kernels["usable"] is (kernels["reason"] is None)


def test_the_table(fastfsl):
    result = fastfsl("doctor")
    assert result.exit_code == 0
    assert "CPUExecutionProvider" in result.stdout


def _problems(*, cpu="1.30", gpu=None, pillow="12", gpus=(), usable=(CPU,), failures=None, no_kernels=None):
    packages = {"onnxruntime": cpu, "onnxruntime-gpu": gpu, "pillow": pillow}
    return find_problems(packages, list(gpus), list(usable), failures or {}, no_kernels)


def test_nothing_is_wrong_where_everything_works():
    assert _problems() == []
    assert _problems(cpu=None, gpu="1.30", gpus=[GPU], usable=[CPU, CUDA]) == []
    assert _problems(no_kernels="no driver") == []  # nobody misses them without a GPU


@pytest.mark.parametrize(
    ("situation", "problem", "remedy"),
    [
        ({"cpu": None, "usable": []}, "not installed: no bundle can run", "fastfsl[cpu]"),
        ({"gpu": "1.30"}, "overwrite each other", "pip uninstall -y onnxruntime onnxruntime-gpu"),
        ({"usable": [], "failures": {CPU: "libgomp is missing"}}, "libgomp is missing", "reinstall"),
        (
            {"cpu": None, "gpu": "1.30", "gpus": [GPU], "failures": {CUDA: "libcublas is missing"}},
            "CUDA does not come up: libcublas is missing",
            "fastfsl[gpu]",
        ),
        ({"cpu": None, "gpu": "1.30"}, "CUDA does not come up", "nvidia-smi"),
        ({"gpus": [GPU]}, "a GPU is present (NVIDIA H100)", "pip uninstall -y onnxruntime, then"),
        ({"pillow": None}, "Pillow is not installed", "fastfsl[cpu]"),
        (
            {
                "cpu": None,
                "gpu": "1.30",
                "gpus": [GPU],
                "usable": [CPU, CUDA],
                "no_kernels": "cuda-bindings is missing",
            },
            "(NVIDIA H100) but the kernels compiled into bundles cannot be launched: cuda-bindings is missing",
            "fastfsl[gpu]",
        ),
    ],
)
def test_every_problem_has_a_remedy(situation, problem, remedy):
    (found,) = _problems(**situation)
    assert problem in found["problem"]
    assert remedy in found["remedy"]


def test_problems_are_printed_with_their_remedy(fastfsl, monkeypatch):
    monkeypatch.setattr(DOCTOR, "find_problems", lambda *_: [{"problem": "rain", "remedy": "umbrella"}])
    result = fastfsl("doctor")
    assert "problem: rain" in result.stdout
    assert "do: umbrella" in result.stdout
    assert "No problems" not in result.stdout
    assert fastfsl("doctor", "--json").document["problems"] == [{"problem": "rain", "remedy": "umbrella"}]


def test_nvidia_smi_is_read():
    text = "NVIDIA H100, 9.0, 580.1, 81559\nNVIDIA A10, 8.6, 580.1, [N/A]\nsome message\n"
    assert parse_nvidia_smi(text) == [
        GPU,
        {"name": "NVIDIA A10", "compute_capability": "8.6", "driver": "580.1", "memory_mib": None},
    ]
    assert parse_nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver") == []


def _without_bindings(monkeypatch):
    monkeypatch.setattr(DOCTOR, "find_spec", lambda _: None)


def test_gpus_come_from_nvidia_smi_where_the_bindings_are_missing(monkeypatch, tmp_path):
    _without_bindings(monkeypatch)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 9.0, 580.1, 81559'\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    assert find_gpus() == ([GPU], "nvidia-smi")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert find_gpus() == ([], None)


def test_no_nvidia_smi_and_no_bindings_mean_no_gpu(monkeypatch):
    _without_bindings(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert find_gpus() == ([], None)


def test_a_hanging_nvidia_smi_does_not_hang_the_doctor(monkeypatch):
    _without_bindings(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")

    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert find_gpus() == ([], None)


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (FakeDriver(90), {"usable": True, "architecture": "sm_90", "reason": None}),
        (FakeDriver(75), {"usable": False, "architecture": "sm_75", "reason": "from sm_80 on"}),
        (FakeDriver(cards=0), {"usable": False, "architecture": None, "reason": "CUDA_ERROR_NO_DEVICE"}),
    ],
    ids=["hopper", "turing", "no card"],
)
def test_what_the_card_is_to_compiled_kernels(monkeypatch, driver, expected):
    monkeypatch.setattr("fastfsl.runtime.cuda_driver.load_driver", lambda: driver)
    found = compiled_kernels()
    assert (found["usable"], found["architecture"]) == (expected["usable"], expected["architecture"])
    assert (found["reason"] is None) is (expected["reason"] is None)
    assert str(expected["reason"]) in str(found["reason"])


def test_the_doctor_works_where_nothing_but_the_base_is_installed():
    """Neither onnxruntime nor Pillow nor any training package can be imported; numpy is always there."""
    hidden = ("onnxruntime", "PIL", "torch", "triton", "onnx", "open_clip", "sklearn", "matplotlib", "cuda")
    distributions = ("onnxruntime", "onnxruntime-gpu", "pillow", "torch")
    code = f"""
import importlib.metadata, sys
version = importlib.metadata.version
def hiding(name):
    if name in {distributions!r}: raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hiding
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name.split('.')[0] in {hidden!r} else find(name, *rest)
PathFinder.find_spec = classmethod(find_spec)
from fastfsl.cli import app
app(["doctor", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["providers"] == []
    assert "cuda-bindings is not installed" in document["compiled_kernels"]["reason"]
    assert [problem["problem"].split()[0] for problem in document["problems"]] == ["onnxruntime", "Pillow"]


def test_a_driver_that_fails_falls_back_to_nvidia_smi(monkeypatch):
    monkeypatch.setattr(DOCTOR, "find_spec", lambda _: object())

    def broken(_):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(DOCTOR.importlib, "import_module", broken)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert find_gpus() == ([], None)


def test_every_provider_says_whether_its_session_came_up(fastfsl):
    document = fastfsl("doctor", "--json").document
    assert document["sessions"][CPU] == "came up and computed"
    assert set(document["sessions"]) == {CPU, CUDA}
    assert (CUDA in document["providers"]) is (document["sessions"][CUDA] == "came up and computed")


def test_missing_parts_are_no_problem_but_have_their_command(fastfsl, monkeypatch):
    version = PARTS.version_of
    hidden = ("tokenizers", "pyarrow")
    monkeypatch.setattr(PARTS, "version_of", lambda name: None if name in hidden else version(name))
    document = fastfsl("doctor", "--json").document
    assert document["optional"]["text"]["missing"] == ["tokenizers"]
    assert document["optional"]["text"]["install"] == "pip install 'fastfsl[text]'"
    assert document["optional"]["export"] == {"for": "export", "missing": [], "install": None}
    assert not any("tokenizers" in problem["problem"] for problem in document["problems"])
    assert "pip install 'fastfsl[parquet]'" in " ".join(fastfsl("doctor").stdout.split())


def test_packages_that_are_too_old(monkeypatch):
    versions = {"a": "1.9", "b": "2.0.0", "c": "10.1rc1", "e": "3.0+cpu"}
    monkeypatch.setattr(PARTS, "version_of", versions.get)
    lines = ["a[x]>=1.10", "b>=2", "c >= 11; extra == 'dev'", "d>=1", "e>=3.0", "fastfsl[train]", "f"]
    assert PARTS.outdated(lines) == [
        {"package": "a", "installed": "1.9", "wanted": "1.10"},
        {"package": "c", "installed": "10.1rc1", "wanted": "11"},
    ]
    assert isinstance(PARTS.outdated(), list)


def test_what_an_extra_asks_for_is_judged_where_it_is_installed(monkeypatch):
    """Every environment has some setuptools, which only development needs in a certain version."""
    versions = {"numpy": "2.0", "setuptools": "65.5", "torch": "2.0"}
    monkeypatch.setattr(PARTS, "version_of", versions.get)
    lines = [
        "numpy>=1.26",
        "setuptools>=77; extra == 'dev'",
        'ruff>=0.14; extra == "dev"',
        "torch>=2.11; extra=='train'",
    ]
    assert PARTS.outdated(lines) == []
    versions["ruff"] = "0.15"
    assert [old["package"] for old in PARTS.outdated(lines)] == ["setuptools"]
    versions.update(dict.fromkeys(PARTS.PARTS["train"][1], "99"), torch="2.0")
    assert [old["package"] for old in PARTS.outdated(lines)] == ["setuptools", "torch"]


def test_training_alone_needs_no_runtime():
    packages: dict[str, str | None] = {"torch": "2.15", "open_clip_torch": "3.3", "pillow": "12"}
    assert find_problems(packages, [], [], {}) == []


def test_an_old_package_is_a_problem(fastfsl, monkeypatch):
    old = {"package": "numpy", "installed": "1.0", "wanted": "1.26"}
    monkeypatch.setattr(DOCTOR, "outdated", lambda: [old])
    assert {
        "problem": "numpy 1.0 is installed, fastfsl needs 1.26 or newer",
        "remedy": "pip install 'numpy>=1.26'",
    } in (fastfsl("doctor", "--json").document["problems"])


def test_the_processor_and_the_threads(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Xeon\nflags : fpu avx2 avx512_vnni amx_int8\n")
    assert processor(cpuinfo) == {"name": "Xeon", "instructions": ["avx2", "avx512_vnni", "amx_int8"]}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert processor(cpuinfo)["instructions"] == ["asimd", "asimddp", "i8mm"]
    elsewhere = processor(tmp_path / "none")
    assert elsewhere["name"]
    assert elsewhere["instructions"] is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads()["environment"]["OMP_NUM_THREADS"] == "3"
