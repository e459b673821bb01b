"""The layer over the driver, with host memory for the card's: what it passes, what it frees, how it fails."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastfsl.errors import DeviceError
from fastfsl.runtime.cuda_driver import Device, load_driver
from tests.runtime.fake_driver import FakeDriver, Result

COUNT = 5


def _image(**fields) -> bytes:
    parameters = {"values": "float32", "factor": "scalar", "n": "int32"}
    image = {"kernel": "scale", "entry": "scale_kernel", "arch": 90, "kind": "cubin", "parameters": parameters}
    image |= {"threads": 64, "shared_memory": 1024, "cooperative": False}
    return json.dumps({**image, **fields}).encode()


def _load(device, **fields):
    image = json.loads(_image(**fields))
    return device.load_kernel(
        _image(**fields),
        "scale_kernel",
        ["pointer", "float32", "int32", "pointer", "pointer"],
        threads=64,
        shared_memory=image["shared_memory"],
        cooperative=image["cooperative"],
    )


@pytest.fixture
def driver() -> FakeDriver:
    driver = FakeDriver()

    def scale(image, grid, values):
        assert grid == (3, 2)
        driver.bytes_at(values["values"])[: 4 * values["n"]].view(np.float32)[:] *= values["factor"]

    driver.execute = scale
    return driver


def _scaled(driver) -> np.ndarray:
    """Five numbers, thrice doubled on the card: once at once, twice by a graph."""
    device = Device(driver)
    with device.active():
        kernel = _load(device, shared_memory=100 << 10)
        memory = device.upload(np.arange(COUNT, dtype=np.float32))

        def launch():
            device.launch(kernel, (3, 2), [memory.pointer, 2.0, COUNT, 0, 0])

        launch()
        graph = device.capture(launch)
        device.replay(graph)
        device.replay(graph)
        result = device.pinned((COUNT,))
        device.copy_out(result, memory.pointer)
        device.synchronize()
        return result.copy()


def test_a_kernel_gets_its_parameters_and_graphs_replay(driver):
    np.testing.assert_array_equal(_scaled(driver), 8 * np.arange(COUNT))
    assert driver.calls["cuLaunchKernel"] == 2
    assert driver.violations == []


def test_everything_is_given_back(driver):
    _scaled(driver)
    gc.collect()
    assert not driver.live()
    assert driver.stack() == []


def _failure(driver) -> str:
    """Why it failed; nothing keeps the traceback, and so what was handed out."""
    try:
        _scaled(driver)
    except DeviceError as error:
        return str(error)
    return "it did not"


def test_every_call_may_fail(driver):
    """Whichever call fails: an error that names it and a remedy, nothing kept, no context left current."""
    calls: list[str] = []
    driver.fail = calls.append  # returns None: nothing fails
    _scaled(driver)
    assert {"cuMemAlloc", "cuLibraryLoadData", "cuGraphInstantiate", "cuMemHostAlloc", "cuInit"} <= set(calls)
    last = len(calls) - calls[::-1].index("cuStreamSynchronize")  # what follows gives back
    for index, name in enumerate(calls[:last]):
        count = itertools.count()
        driver = FakeDriver()
        driver.fail = lambda _, count=count, index=index: (
            Result.CUDA_ERROR_LAUNCH_FAILED if next(count) == index else None
        )
        assert _failure(driver) == f"{name}: CUDA_ERROR_LAUNCH_FAILED; run `fastfsl doctor` to see what is missing"
        # Who cannot make the context current cannot give back what is in it.
        assert not driver.live() or name == "cuCtxPushCurrent", (index, name)
        assert driver.stack() == []
        assert driver.violations == []


def test_a_failed_capture_leaves_the_stream_usable(driver):
    device = Device(driver)
    kernel = _load(device)
    memory = device.upload(np.ones(COUNT, np.float32))

    def launch():
        device.launch(kernel, (3, 2), [memory.pointer, 2.0, COUNT, 0, 0])
        raise KeyError("interrupted")

    with pytest.raises(KeyError), device.active():
        device.capture(launch)
    result = np.empty(COUNT, np.float32)
    with device.active():
        device.copy_out(result, memory.pointer)
        device.synchronize()
    np.testing.assert_array_equal(result, 1)
    assert "graph" not in driver.live()


def test_a_cooperative_kernel_is_launched_as_one(driver):
    device = Device(driver)
    kernel = _load(device, cooperative=True)
    memory = device.upload(np.ones(COUNT, np.float32))
    with device.active():
        device.launch(kernel, (3, 2), [memory.pointer, 3.0, COUNT, 0, 0])
        device.synchronize()
    np.testing.assert_array_equal(driver.bytes_at(memory.pointer).view(np.float32), 3)
    assert driver.calls["cuLaunchCooperativeKernel"] == 1


def test_memory_starts_as_zero_and_empty_arrays_have_a_place(driver):
    device = Device(driver)
    memory = device.allocate(12)
    nothing = device.upload(np.empty((0, 4, 4), np.float16))
    with device.active():
        device.synchronize()
    np.testing.assert_array_equal(driver.bytes_at(memory.pointer), 0)
    assert nothing.pointer % 256 == memory.pointer % 256 == 0
    assert nothing.pointer != memory.pointer


def test_pinned_memory_lives_as_long_as_a_view_of_it(driver):
    device = Device(driver)
    row = device.pinned((3, 4))[1]
    row[:] = 7
    gc.collect()
    assert driver.live()["memory"] == 1
    np.testing.assert_array_equal(row, 7)
    del row
    gc.collect()
    assert driver.live()["memory"] == 0


def test_threads_take_turns(driver):
    device = Device(driver)
    inside, seen = [], []

    def work():
        with device.active(), device.active():
            inside.append(1)
            time.sleep(0.002)  # for the others to come in
            seen.append(len(inside))
            device.synchronize()
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 8


def test_what_the_card_is(driver):
    device = Device(driver)
    assert (device.name, device.architecture, device.shared_memory) == ("Imaginary card", 90, 227 << 10)
    assert device.multiprocessors == 132


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Result.CUDA_ERROR_OUT_OF_MEMORY, r"CUDA_ERROR_OUT_OF_MEMORY; free memory of the card.*max_batch"),
        (Result.CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU; export the bundle.*--arch"),
        (Result.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "UNSUPPORTED_PTX_VERSION; export .* or update the driver"),
        (12345, "CUDA error 12345; run `fastfsl doctor`"),
    ],
)
def test_errors_have_the_drivers_name_and_a_remedy(driver, status, words):
    device = Device(driver)
    driver.fail = lambda name: status if name == "cuMemAlloc" else None
    with pytest.raises(DeviceError, match=f"cuMemAlloc: .*{words}"):
        device.allocate(16)


def test_no_card():
    with pytest.raises(DeviceError, match="cuInit: CUDA_ERROR_NO_DEVICE; no card answers"):
        Device(FakeDriver(cards=0))
    with pytest.raises(DeviceError, match="expected a card 1, the driver counts 1"):
        Device(FakeDriver(), 1)


def test_a_driver_too_old_for_a_function(driver, monkeypatch):
    monkeypatch.delattr(FakeDriver, "cuLibraryLoadData")
    with pytest.raises(
        DeviceError, match=r"cuLibraryLoadData: the CUDA driver is missing or too old .*update NVIDIA's"
    ):
        _load(Device(driver))


def test_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DeviceError, match=r"cuda-bindings is not installed .*fastfsl\[gpu\]"):
        load_driver()


def test_the_real_bindings_without_a_card():
    """Whatever is missing here, be it the bindings, the driver or a visible card: it is told, with what to do."""
    code = "from fastfsl.runtime.cuda_driver import Device, load_driver; Device(load_driver())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fastfsl.errors.DeviceError: ")
    assert any(remedy in last for remedy in ("pip install 'fastfsl[gpu]'", "NVIDIA's driver", "nvidia-smi"))
