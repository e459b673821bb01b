"""A stand-in for `cuda.bindings.driver`: host memory for the card's, and for its processors what a test gives it.

It is stricter than a driver: work on a stream waits until the stream is waited for, memory starts as NaN between
guards, every handle, size, alignment and context is checked, and any call can be made to fail. A binary is a JSON
object that says which kernel it is: what is launched is decoded by that, not by the index of the bundle.
"""

# ruff: noqa: N802 - the driver's names

from __future__ import annotations

import ctypes
import json
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum, IntFlag
from types import SimpleNamespace
from typing import Any

import numpy as np

_GUARD, _ALIGNMENT = 256, 256
_MULTIPROCESSORS = 132
_CELLS = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "scalar": ctypes.c_float}
# Giving back never fails here: a driver that cannot is beyond help.
_RELEASES = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuGraphDestroy", "cuGraphExecDestroy")
_NEVER_FAIL = (*_RELEASES, "cuLibraryUnload", "cuDevicePrimaryCtxRelease", "cuCtxPopCurrent", "cuGetErrorName")


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


OK = Result.CUDA_SUCCESS
INVALID, HANDLE = Result.CUDA_ERROR_INVALID_VALUE, Result.CUDA_ERROR_INVALID_HANDLE


class _Attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97


class _FunctionAttribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class _StreamFlags(IntFlag):
    CU_STREAM_NON_BLOCKING = 1


class _CaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class FakeDriver:
    """A driver with one card. Failures that a real driver would not tell are collected in `violations`.

    `execute(image, grid, values)` does what a kernel does; `None` nothing. `fail(name)` may return a status.
    """

    CUresult = Result
    CUdevice_attribute = _Attribute
    CUfunction_attribute = _FunctionAttribute
    CUstream_flags = _StreamFlags
    CUstreamCaptureMode = _CaptureMode

    def __init__(self, architecture: int = 90, shared_memory: int = 227 << 10, cards: int = 1) -> None:
        self.architecture, self.shared_memory, self.cards = architecture, shared_memory, cards
        self.fail: Callable[[str], Result | None] = lambda _: None
        self.execute: Callable[[dict[str, Any], tuple[int, int], dict[str, Any]], None] | None = None
        self.calls: Counter[str] = Counter()
        self.launched: list[tuple[str, tuple[int, int]]] = []
        self.violations: list[str] = []
        self._next = 0x1000
        self._live: dict[int, tuple[str, Any]] = {}
        self._memory: dict[int, tuple[np.ndarray, int, int]] = {}
        self._context = SimpleNamespace(retained=0)
        self._threads = threading.local()
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls[name] += 1
                status = None if name in _NEVER_FAIL else self.fail(name)
                result = (status,) if status is not None else found(*arguments)
            if result[0] != OK and status is None:
                self.violations.append(f"{name}{arguments}: {result[0].name}")
            return result

        return call

    def live(self) -> Counter[str]:
        """What has not been given back, by kind."""
        return Counter(kind for kind, _ in self._live.values()) + Counter(
            memory=len(self._memory), context=self._context.retained
        )

    def stack(self) -> list[Any]:
        """The contexts that are current in this thread."""
        return self._threads.__dict__.setdefault("stack", [])

    # What needs no context.

    def cuInit(self, flags):
        return (OK if flags == 0 and self.cards else Result.CUDA_ERROR_NO_DEVICE,)

    def cuGetErrorName(self, status):
        return (OK, Result(status).name.encode()) if status in set(Result) else (INVALID, None)

    def cuDriverGetVersion(self):
        return OK, 13000

    def cuDeviceGetCount(self):
        return OK, self.cards

    def cuDeviceGet(self, ordinal):
        return (OK, ordinal) if ordinal < self.cards else (INVALID, None)

    def cuDeviceGetName(self, size, _):
        return OK, b"Imaginary card".ljust(size, b"\0")

    def cuDeviceTotalMem(self, _):
        return OK, 80 << 30

    def cuDeviceGetAttribute(self, key, _):
        found = {75: self.architecture // 10, 76: self.architecture % 10, 97: self.shared_memory, 16: _MULTIPROCESSORS}
        return OK, found[int(key)]

    def cuDevicePrimaryCtxRetain(self, _):
        self._context.retained += 1
        return OK, self._context

    def cuDevicePrimaryCtxRelease(self, _):
        self._context.retained -= 1
        return (OK,)

    def cuCtxPushCurrent(self, context):
        if context is not self._context or not context.retained:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.stack().append(context)
        return (OK,)

    def cuCtxPopCurrent(self):
        return (OK, self.stack().pop()) if self.stack() else (Result.CUDA_ERROR_INVALID_CONTEXT, None)

    # Memory.

    def cuMemAlloc(self, size):
        return self._allocate(size)

    def cuMemHostAlloc(self, size, flags):
        return self._allocate(size) if flags == 0 else (INVALID, None)

    def cuMemFree(self, pointer):
        return self._free(pointer)

    def cuMemFreeHost(self, pointer):
        return self._free(pointer)

    def cuMemsetD8Async(self, pointer, value, count, stream):
        def work():
            self.bytes_at(pointer, count)[:] = value

        return self._enqueue(stream, work) if self._inside(pointer, count) else (INVALID,)

    def cuMemcpyHtoDAsync(self, pointer, source, count, stream):
        def work():
            self.bytes_at(pointer, count)[:] = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(source))

        return self._enqueue(stream, work) if self._inside(pointer, count) else (INVALID,)

    def cuMemcpyDtoHAsync(self, target, pointer, count, stream):
        def work():
            ctypes.memmove(target, pointer, count)

        return self._enqueue(stream, work) if self._inside(pointer, count) else (INVALID,)

    def bytes_at(self, pointer: int, count: int | None = None) -> np.ndarray:
        """The bytes from an address on, `count` of them or to the end of what was allocated there."""
        for start, (array, first, size) in self._memory.items():
            if start <= pointer < start + size:
                begin = first + pointer - start
                return array[begin : first + size if count is None else begin + count]
        raise AssertionError(f"{pointer:#x} was not allocated")

    def _allocate(self, size):
        if not self.stack():
            return Result.CUDA_ERROR_INVALID_CONTEXT, None
        if size < 1:
            return INVALID, None
        array = np.full(size + 2 * _GUARD + _ALIGNMENT, 0xFF, np.uint8)
        start = -(-(array.ctypes.data + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        first = start - array.ctypes.data
        array[:first] = array[first + size :] = 0xA5
        self._memory[start] = array, first, size
        return OK, start

    def _free(self, pointer):
        if pointer not in self._memory:
            return (INVALID,)
        self._check_guards(pointer)
        del self._memory[pointer]
        return (OK,) if self.stack() else (Result.CUDA_ERROR_INVALID_CONTEXT,)

    def _check_guards(self, start):
        array, first, size = self._memory[start]
        if (array[:first] != 0xA5).any() or (array[first + size :] != 0xA5).any():
            self.violations.append(f"something was written beside the {size} bytes at {start:#x}")

    def _inside(self, pointer, count):
        try:
            return 0 < count <= len(self.bytes_at(pointer))
        except AssertionError:
            return False

    # Streams and graphs.

    def cuStreamCreate(self, flags):
        if not self.stack() or flags != _StreamFlags.CU_STREAM_NON_BLOCKING:
            return INVALID, None
        return OK, self._new("stream", SimpleNamespace(queue=[], capturing=None))

    def cuStreamDestroy(self, stream):
        return self._give_back(stream, "stream")

    def cuStreamSynchronize(self, stream):
        found = self._get(stream, "stream")
        if found is None or not self.stack():
            return (HANDLE,)
        if found.capturing is not None:
            return (Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.flush()
        return (OK,)

    def is_stream(self, handle: int) -> bool:
        """There is a stream of that handle."""
        return self._get(handle, "stream") is not None

    def flush(self) -> None:
        """Do what waits on the streams."""
        for kind, found in list(self._live.values()):
            while kind == "stream" and found.queue:
                found.queue.pop(0)()
        for start in self._memory:
            self._check_guards(start)

    def cuStreamBeginCapture(self, stream, mode):
        found = self._get(stream, "stream")
        if found is None or found.capturing is not None or mode != _CaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED:
            return (INVALID,)
        found.capturing = []
        return (OK,)

    def cuStreamEndCapture(self, stream):
        found = self._get(stream, "stream")
        if found is None or found.capturing is None:
            return INVALID, 0
        captured, found.capturing = found.capturing, None
        return OK, self._new("graph", captured)

    def cuGraphInstantiate(self, graph, flags):
        found = self._get(graph, "graph")
        return (INVALID, None) if found is None or flags else (OK, self._new("executable graph", list(found)))

    def cuGraphDestroy(self, graph):
        return self._give_back(graph, "graph")

    def cuGraphExecDestroy(self, graph):
        return self._give_back(graph, "executable graph")

    def cuGraphLaunch(self, graph, stream):
        found = self._get(graph, "executable graph")
        if found is None:
            return (HANDLE,)
        return self._enqueue(stream, lambda: [work() for work in found] and None)

    # Kernels.

    def cuLibraryLoadData(self, code, *options):
        assert options == ([], [], 0, [], [], 0)
        assert code.endswith(b"\0")
        image = json.loads(code[:-1])
        arch = image["arch"]
        if image["kind"] == "ptx":
            runs = arch <= self.architecture
        else:
            runs = arch == self.architecture or (
                arch < 90 and arch < self.architecture and arch // 10 == self.architecture // 10
            )
        if not runs:
            return Result.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        return OK, self._new("library", image)

    def cuLibraryGetKernel(self, library, name):
        image = self._get(library, "library")
        if image is None or name != image["entry"].encode():
            return Result.CUDA_ERROR_NOT_FOUND, None
        return OK, library

    def cuKernelGetFunction(self, kernel):
        found = self._get(kernel, "library")
        if found is None or not self.stack():
            return HANDLE, None
        found["limit"] = 48 << 10
        return OK, kernel

    def cuFuncSetAttribute(self, function, attribute, value):
        found = self._get(function, "library")
        if found is None or attribute != 8 or value > self.shared_memory:
            return (INVALID,)
        found["limit"] = value
        return (OK,)

    def cuLibraryUnload(self, library):
        return self._give_back(library, "library")

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        image = self._get(function, "library")
        if image is None:
            return (HANDLE,)
        if extra or image["cooperative"]:
            return (INVALID,)
        return self._launch(image, (gx, gy, gz), (bx, by, bz), shared, stream, parameters)

    def cuLaunchCooperativeKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters):
        image = self._get(function, "library")
        if image is None:
            return (HANDLE,)
        if not image["cooperative"] or gx * gy > _MULTIPROCESSORS:
            return (INVALID,)
        return self._launch(image, (gx, gy, gz), (bx, by, bz), shared, stream, parameters)

    def _launch(self, image, grid, block, shared, stream, parameters):
        if grid[2] != 1 or min(grid) < 1 or block != (image["threads"], 1, 1):
            return (INVALID,)
        if shared != image["shared_memory"] or shared > image["limit"]:
            return (INVALID,)
        names = [*image["parameters"], "scratch", "more scratch"]
        addresses = (ctypes.c_void_p * len(names)).from_address(parameters)
        values = {}
        for name, address in zip(names, addresses, strict=True):
            kind = image["parameters"].get(name, "pointer")
            cell: Any = _CELLS.get(kind, ctypes.c_uint64).from_address(address)
            values[name] = cell.value
            if kind not in ("int32", "scalar", "pointer") and (cell.value % 16 or not self._inside(cell.value, 1)):
                self.violations.append(f"{image['kernel']}: {name} is {cell.value:#x}")
                return (INVALID,)
        if values.pop("scratch") or values.pop("more scratch"):
            return (INVALID,)

        def work():
            self.launched.append((image["kernel"], grid[:2]))
            if self.execute is not None:
                self.execute(image, grid[:2], values)

        return self._enqueue(stream, work)

    # Handles.

    def _enqueue(self, stream, work):
        found = self._get(stream, "stream")
        if found is None:
            return (HANDLE,)
        if not self.stack():
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        (found.queue if found.capturing is None else found.capturing).append(work)
        return (OK,)

    def _new(self, kind, value):
        self._next += 16
        self._live[self._next] = kind, value
        return self._next

    def _get(self, handle, kind):
        found = self._live.get(handle, (None, None))
        return found[1] if found[0] == kind else None

    def _give_back(self, handle, kind):
        if self._get(handle, kind) is None:
            return (HANDLE,)
        del self._live[handle]
        return (OK,)
