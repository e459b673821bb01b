"""The compiled flow on a card of host memory, where Triton's interpreter computes what the driver is told to launch."""

from __future__ import annotations

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastfsl.bundle import read_manifest
from fastfsl.bundle.flow_kernels import KernelSet, KernelTarget, KernelTile, read_flow_kernels
from fastfsl.bundle.flow_launches import MAX_BUCKET, row_bucket
from fastfsl.errors import BundleError, DeviceError, ShapeError
from fastfsl.flow.plan import FlowPlan, plan_states
from fastfsl.flow.readout import normalize, read_out
from fastfsl.kernels import tiles
from fastfsl.runtime import cuda_flow
from fastfsl.runtime.cuda_driver import Device
from fastfsl.runtime.cuda_flow import CompiledFlow
from fastfsl.runtime.cuda_kernels import targets_for
from tests.runtime.compiled_bundle import CLASSES, DIM, SCALE, Flow, random_flow, write_compiled
from tests.runtime.fake_driver import FakeDriver, Result
from tests.runtime.fake_kernels import by_equation, interpreted

# Of the way a row is moved: what 16-bit weights and residuals cost.
TOLERANCE = 5e-3


def _load(path, driver, execute=by_equation) -> CompiledFlow:
    driver.execute = execute(driver)
    return CompiledFlow.load(path, read_manifest(path), Device(driver))


def _rows(count: int, seed: int = 0) -> Any:
    """Embeddings of any length, as the flow's graph takes them."""
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def _expected(flow: Flow, embeds) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits by the reference, in float64."""
    plan = FlowPlan.from_arrays(flow.plan).to(dtype=torch.float64)
    x_0 = normalize(torch.from_numpy(embeds).double())
    states = plan_states(plan, x_0, flow.read_steps or (plan.num_steps,))
    logits = read_out(states, torch.from_numpy(flow.class_embeddings).double(), SCALE)
    return normalize(states[-1]).numpy(), logits.numpy()


def _assert_close(flow: Flow, embeds, features, logits):
    expected, expected_logits = _expected(flow, embeds)
    way = np.linalg.norm(expected - embeds / np.linalg.norm(embeds, axis=1, keepdims=True), axis=1)
    assert features.dtype == logits.dtype == np.float32
    assert (np.linalg.norm(features - expected, axis=1) <= TOLERANCE * way + 1e-6).all()
    assert np.abs(logits - expected_logits).max() <= SCALE * TOLERANCE * max(way.max(), 1e-3)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture(scope="module")
def flow() -> Flow:
    return random_flow()


@pytest.fixture(scope="module")
def bundle_path(write, flow, tmp_path_factory):
    return write_compiled(write, tmp_path_factory.mktemp("compiled") / "bundle", flow, with_encoder=False)


@pytest.fixture(scope="module")
def wrong_path(write, flow, tmp_path_factory):
    """Its kernels compute another flow."""
    plan = replace(flow.plan, second_weight=-flow.plan.second_weight)
    target = tmp_path_factory.mktemp("compiled") / "wrong"
    return write_compiled(write, target, flow, weights=replace(flow, plan=plan), with_encoder=False)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"blocks": 2}, (1, 3, 17, 40)),
        ({"steps": 3, "read_steps": (0, 1, 3)}, (5,)),
        ({"steps": 3, "read_steps": (1, 3)}, (5,)),
        ({"prototypes": 3}, (5,)),
        ({"steps": 2, "read_steps": (1, 2), "prototypes": 2}, (5,)),
        ({"steps": 0}, (5,)),
        ({"blocks": 0}, (5,)),
    ],
    ids=["every row class", "averaged with the source", "averaged", "prototypes", "both", "no step", "no block"],
)
def test_it_gives_what_the_reference_gives(write, tmp_path, driver, options, counts):
    flow = random_flow(**options)
    path = write_compiled(write, tmp_path / "bundle", flow, with_encoder=False)
    compiled = _load(path, driver, interpreted)
    for count in counts:
        embeds = _rows(count)
        _assert_close(flow, embeds, compiled.features(embeds), compiled.logits(embeds))
    assert driver.violations == []


def test_buckets_are_those_of_the_torch_launchers():
    rows = range(1, MAX_BUCKET + 1)
    assert MAX_BUCKET == tiles.CHUNK_ROWS
    assert [row_bucket(count) for count in rows] == [tiles.row_bucket(count) for count in rows]
    assert [row_bucket(count) for count in (1, 3, 64, 65, 129, 1024, 1025, 8192)] == [
        1,
        4,
        64,
        128,
        256,
        1024,
        2048,
        8192,
    ]
    for count in (0, MAX_BUCKET + 1):
        with pytest.raises(ShapeError, match="expected from 1 to 8192 rows"):
            row_bucket(count)


def test_many_rows_go_in_chunks(bundle_path, driver, flow, monkeypatch):
    monkeypatch.setattr(cuda_flow, "MAX_LOGITS_BYTES", 4 * CLASSES * 7)
    compiled = _load(bundle_path, driver)
    embeds = _rows(17)
    _assert_close(flow, embeds, compiled.features(embeds), compiled.logits(embeds))
    assert {grid for name, grid in driver.launched if name == "logits"} == {(1, 1)}
    assert driver.calls["cuStreamBeginCapture"] == 2  # of 8 and of 4 rows
    assert driver.calls["cuGraphLaunch"] == 6


def test_a_bucket_is_captured_once_and_forgotten_when_memory_is_short(bundle_path, driver, flow, monkeypatch):
    compiled = _load(bundle_path, driver)
    for count in (3, 4, 3, 4):
        compiled.features(_rows(count))
    assert driver.calls["cuStreamBeginCapture"] == 1
    one = driver.live()
    monkeypatch.setattr(cuda_flow, "MAX_WORK_BYTES", 40_000)
    for count in (1, 2, 8, 16, 20, 2, 4):
        embeds = _rows(count, seed=count)
        _assert_close(flow, embeds, compiled.features(embeds), compiled.logits(embeds))
        gc.collect()
        assert driver.live()["executable graph"] <= 3
    assert driver.live()["memory"] < 4 * one["memory"]
    assert driver.violations == []


def test_threads_share_it(bundle_path, driver):
    compiled = _load(bundle_path, driver)
    batches = [_rows(count, seed=count) for count in (1, 2, 3, 5, 9)]
    expected = [compiled.logits(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(compiled.logits, batches * 3))
    for result, right in zip(results, expected * 3, strict=True):
        np.testing.assert_array_equal(result, right)
    assert driver.violations == []


def test_embeddings_made_on_the_card(bundle_path, driver, flow, monkeypatch):
    compiled = _load(bundle_path, driver)
    embeds = _rows(5)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)

    def write(pointer):
        driver.flush()
        driver.bytes_at(pointer, embeds.nbytes).view(np.float32)[:] = embeds.ravel()

    found = compiled.encoded_logits(5, write)
    assert found is not None
    np.testing.assert_array_equal(found[0], embeds)
    np.testing.assert_allclose(found[1], compiled.logits(embeds), atol=1e-4)
    monkeypatch.setattr(cuda_flow, "MAX_LOGITS_BYTES", 4 * CLASSES * 4)
    assert _load(bundle_path, driver).encoded_logits(5, write) is None


def test_nan_is_not_an_answer(bundle_path, driver):
    compiled = _load(bundle_path, driver)
    execute = by_equation(driver)

    def overflowing(image, grid, values):
        execute(image, grid, values)
        if image["kernel"] == "exit":
            driver.bytes_at(values["out"]).view(np.float32)[0] = np.inf

    driver.execute = overflowing
    for method in (compiled.features, compiled.logits):
        with pytest.raises(BundleError, match=r"NaN or infinite.*--kernel-dtype bf16.*flow='onnx'"):
            method(_rows(2))


def _prove(compiled, flow):
    rows = compiled.proof_rows()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    compiled.prove(rows, _expected(flow, rows)[0].astype(np.float32))


def test_right_kernels_prove_themselves_once_a_row_class(bundle_path, driver, flow):
    compiled = _load(bundle_path, driver)
    _prove(compiled, flow)
    assert driver.calls["cuGraphLaunch"] == 1
    for count in (3, 30, 20, 33, 64, 7):
        compiled.logits(_rows(count))
    assert driver.calls["cuGraphLaunch"] == 1 + 2 + 6


def test_kernels_of_another_flow_are_found_out(wrong_path, driver, flow):
    with pytest.raises(DeviceError, match=r"compiled flow of 8 rows differs .*flow='onnx'"):
        _prove(_load(wrong_path, driver), flow)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [("first", "differs from the ONNX flow"), ("second", "differs"), ("carry", "differs"), ("logits", "logits .* off")],
)
def test_a_miscompiled_kernel_never_answers(bundle_path, driver, flow, kernel, words):
    """One that is wrong for many rows only is found out before it answers for many rows."""
    compiled = _load(bundle_path, driver)
    execute = by_equation(driver)

    def miscompiled(image, grid, values):
        execute(image, grid, values)
        if image["kernel"] == kernel and image["tile"]["warps"] == 8:  # of the last row class
            name = {"first": "hidden", "second": "h", "carry": "total", "logits": "logits"}[kernel]
            dtype = np.float16 if image["parameters"][name] in ("weight", "state") else np.float32
            size = 4 if name == "logits" else DIM
            written = driver.bytes_at(values[name], 33 * size * np.dtype(dtype).itemsize).view(dtype)
            written[32 * size :] *= -1  # a row of the second tile

    driver.execute = miscompiled
    _prove(compiled, flow)
    compiled.logits(_rows(30))
    for _ in range(2):
        with pytest.raises(DeviceError, match=words):
            compiled.logits(_rows(33))


def _failure(work, driver) -> str:
    """Why it failed; nothing keeps the traceback, and so what the work was about."""
    try:
        work(driver)
    except DeviceError as error:
        return str(error)
    return "it did not"


def test_every_call_may_fail(write, tmp_path, flow, driver):
    """Whichever call fails while a flow is loaded and run: a typed error, nothing kept, no context left current."""

    def work(driver):
        compiled = _load(path, driver)
        compiled.logits(_rows(3))

    path = write_compiled(
        write, tmp_path / "bundle", flow, architectures=(90,), ptx=False, with_encoder=False
    )  # else the next target may do
    calls: list[str] = []
    driver.fail = calls.append
    work(driver)
    last = len(calls) - calls[::-1].index("cuStreamSynchronize")  # what follows gives back
    seen = set()
    for index, name in enumerate(calls[:last]):
        if name in seen and index % 7:  # of the many alike some
            continue
        seen.add(name)
        count = itertools.count()
        driver = FakeDriver()
        driver.fail = lambda _, count=count, index=index: (
            Result.CUDA_ERROR_OUT_OF_MEMORY if next(count) == index else None
        )
        assert f"{name}: CUDA_ERROR_OUT_OF_MEMORY" in _failure(work, driver)
        assert not driver.live() or name == "cuCtxPushCurrent", (index, name)
        assert driver.stack() == []
        assert driver.violations == []
    assert {"cuMemAlloc", "cuLibraryLoadData", "cuFuncSetAttribute", "cuLaunchKernel", "cuGraphLaunch"} <= seen


@pytest.mark.parametrize(
    ("architecture", "shared_memory", "expected"),
    [
        (80, 163, ["sm_80", "ptx"]),
        (86, 99, ["sm_86", "sm_80", "ptx"]),
        (87, 163, ["sm_86", "sm_80", "ptx"]),
        (89, 99, ["sm_86", "sm_80", "ptx"]),
        (90, 227, ["sm_90", "ptx"]),
        (103, 227, ["ptx"]),
        (120, 99, ["sm_120", "ptx"]),
        (121, 99, ["ptx"]),
        (75, 64, []),
        (89, 59, []),
    ],
)
def test_which_kernels_a_card_runs(architecture, shared_memory, expected):
    tile = KernelTile(16, 32, 64, 4, 3)
    names = {f"sm_{arch}": arch for arch in (80, 86, 90, 100, 120)} | {"ptx": 80}
    kernel: Any = type("Kernel", (), {"shared_memory": 60 << 10, "tile": tile})
    targets = {
        name: KernelTarget(name, arch, "ptx" if name == "ptx" else "cubin", (kernel,)) for name, arch in names.items()
    }
    kernels = KernelSet(DIM, "fp16", {}, (None,), targets)
    assert [target.name for target in targets_for(kernels, architecture, shared_memory << 10)] == expected


@pytest.mark.parametrize(
    ("architecture", "target"), [(80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "ptx"), (120, "ptx")]
)
def test_the_driver_accepts_what_is_chosen(bundle_path, architecture, target):
    compiled = _load(bundle_path, FakeDriver(architecture))
    assert (compiled.target, compiled.dtype) == (target, "fp16")


def test_another_target_where_the_best_is_refused(bundle_path, driver):
    refused = iter([Result.CUDA_ERROR_NO_BINARY_FOR_GPU])
    driver.fail = lambda name: next(refused, None) if name == "cuLibraryLoadData" else None
    assert _load(bundle_path, driver).target == "ptx"


def test_no_target_will_do(bundle_path, driver):
    driver.fail = lambda name: Result.CUDA_ERROR_NO_BINARY_FOR_GPU if name == "cuLibraryLoadData" else None
    with pytest.raises(DeviceError, match=r"card \(sm_90\) refuses the bundle's kernels \(sm_90: .*; ptx: .*NO_BINARY"):
        _load(bundle_path, driver)
    with pytest.raises(DeviceError, match="for cards from sm_80 on, Imaginary card is sm_75"):
        _load(bundle_path, FakeDriver(75))
    with pytest.raises(DeviceError, match=r"kernels are for ptx, sm_80, sm_90; .* with 48 KiB .*--arch sm_89"):
        _load(bundle_path, FakeDriver(89, shared_memory=48 << 10))


def test_a_bundle_without_kernels(write, tmp_path, driver):
    with pytest.raises(DeviceError, match="no compiled kernels; export it with --arch"):
        _load(write(tmp_path / "bundle"), driver)


def test_an_altered_kernel_is_the_bundles_fault(write, tmp_path, flow, driver):
    path = write_compiled(write, tmp_path / "bundle", flow, with_encoder=False)
    kernels = read_flow_kernels(path, read_manifest(path))
    assert kernels is not None
    file = path / kernels.targets["sm_90"].kernels[0].path
    file.write_bytes(file.read_bytes().replace(b"enter", b"inter"))
    with pytest.raises(BundleError, match="altered"):
        _load(path, driver)
