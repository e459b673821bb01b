"""The CUDA driver through cuda-bindings alone: every call checked, everything freed with the object that holds it.

The module `cuda.bindings.driver` is handed in, so that tests can hand in another. A `Device` is a card's primary
context, which ONNX Runtime uses too, and one stream on which everything happens; `active` makes the context the
calling thread's and keeps other threads from the stream.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastfsl.errors import DeviceError

# Of dynamic shared memory a block gets this much without asking.
_FREE_SHARED_MEMORY = 48 * 2**10
_PARAMETER_TYPES: dict[str, Any] = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "float32": ctypes.c_float}

_DOCTOR = "run `fastfsl doctor` to see what is missing"
_OTHER_BUILD = "export the bundle with this card among the --arch, or update the driver"
_REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "no card answers: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the card, or choose a smaller max_batch",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": _OTHER_BUILD,
    "CUDA_ERROR_INVALID_IMAGE": _OTHER_BUILD,
    "CUDA_ERROR_INVALID_PTX": _OTHER_BUILD,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": _OTHER_BUILD,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "install one version of the driver and its libraries, then restart",
}


def load_driver() -> Any:  # noqa: ANN401 - a module that ships no types
    """The module `cuda.bindings.driver`; importing it needs no card.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is not installed ({error}); pip install 'fastfsl[gpu]'") from error


class Driver:
    """Checked calls of the driver.

    Args:
        module: `cuda.bindings.driver`, or what stands in for it.
    """

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a module that ships no types
        self.module = module

    def call(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - a handle, a number, bytes or None
        """Call a function of the driver; returns its result, None if it has none.

        Raises:
            DeviceError: it failed: the driver's name of the error, and what to do.
        """
        try:
            status, *results = getattr(self.module, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # no libcuda, or one that is older than the function
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise DeviceError(
                f"{name}: the CUDA driver is missing or too old ({reason}); install or update NVIDIA's driver"
            ) from error
        if int(status) != 0:
            error_name = self._error_name(status)
            raise DeviceError(f"{name}: {error_name}; {_REMEDIES.get(error_name, _DOCTOR)}")
        return results[0] if results else None

    def _error_name(self, status: Any) -> str:  # noqa: ANN401 - an enumeration of the module
        found, name = self.module.cuGetErrorName(status)
        return name.decode() if int(found) == 0 else f"CUDA error {int(status)}"


class Memory:
    """Device memory, freed with this object.

    Attributes:
        pointer: address on the card, a multiple of 256.
        size: bytes.
    """

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer = pointer
        self.size = size


class Kernel:
    """A kernel that a card has accepted; its library is unloaded with this object.

    Attributes:
        function: handle of the function.
        parameters: "pointer", "int32" or "float32" of every parameter, in order.
        threads: of a block.
        shared_memory: dynamic, bytes of a block.
        cooperative: all blocks run at the same time.
    """

    def __init__(
        self, function: int, parameters: Sequence[str], *, threads: int, shared_memory: int, cooperative: bool
    ) -> None:
        self.function = function
        self.parameters = tuple(parameters)
        self.threads = threads
        self.shared_memory = shared_memory
        self.cooperative = cooperative


class Graph:
    """Launches captured once, to be replayed with one call; destroyed with this object.

    Attributes:
        handle: of the executable graph.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle


class Device:
    """A card. What it hands out keeps it alive.

    Args:
        module: `cuda.bindings.driver`, or what stands in for it.
        ordinal: which card, counted as the driver counts; ONNX Runtime's `device_id` is the same.

    Attributes:
        name: e.g. "NVIDIA H100".
        architecture: compute capability times ten, e.g. 90.
        shared_memory: the most that a block may ask for, bytes.
        multiprocessors: of the card.
        stream: handle of the stream.

    Raises:
        DeviceError: there is no driver or no such card, or it refuses.
    """

    def __init__(self, module: Any, ordinal: int = 0) -> None:  # noqa: ANN401 - a module that ships no types
        self._driver = Driver(module)
        self._lock = threading.RLock()
        call = self._driver.call
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
        if ordinal >= count:
            raise DeviceError(f"expected a card {ordinal}, the driver counts {count}; {_DOCTOR}")
        device = call("cuDeviceGet", ordinal)
        self.name: str = call("cuDeviceGetName", 128, device).split(b"\0")[0].decode(errors="replace")

        def attribute(name: str) -> int:
            key = getattr(module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(call("cuDeviceGetAttribute", key, device))

        self.architecture = 10 * attribute("COMPUTE_CAPABILITY_MAJOR") + attribute("COMPUTE_CAPABILITY_MINOR")
        self.shared_memory = attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.multiprocessors = attribute("MULTIPROCESSOR_COUNT")
        self._context = call("cuDevicePrimaryCtxRetain", device)
        try:
            with self.active():
                # It does not wait for the default stream, on which others may do anything.
                self.stream = int(call("cuStreamCreate", int(module.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        except DeviceError:
            _quietly(module, "cuDevicePrimaryCtxRelease", device)
            raise
        _finally(self, _close, module, self._context, device, self.stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the card's context the calling thread's, and the stream this thread's alone. May be nested."""
        with self._lock:
            self._driver.call("cuCtxPushCurrent", self._context)
            try:
                yield
            finally:
                self._driver.call("cuCtxPopCurrent")

    def allocate(self, size: int) -> Memory:
        """Device memory of `size` bytes, all zero."""
        with self.active():
            memory = Memory(int(self._driver.call("cuMemAlloc", size)), size)
            self._free_with(memory, "cuMemFree", memory.pointer)
            self._driver.call("cuMemsetD8Async", memory.pointer, 0, size, self.stream)
        return memory

    def upload(self, array: np.ndarray[Any, Any]) -> Memory:
        """Device memory that holds a copy of `array`, once the call returns."""
        contiguous = np.ascontiguousarray(array)
        with self.active():
            memory = self.allocate(max(contiguous.nbytes, 1))
            self.copy_in(memory.pointer, contiguous)
            self.synchronize()
        return memory

    def pinned(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A float32 array in page-locked host memory, which the card copies from and to without a detour."""
        count = int(np.prod(shape))
        with self.active():
            address = int(self._driver.call("cuMemHostAlloc", 4 * count, 0))
            memory = (ctypes.c_float * count).from_address(address)
            self._free_with(memory, "cuMemFreeHost", address)
        # Every view of the array holds `memory`.
        array: np.ndarray[Any, np.dtype[np.float32]] = np.ctypeslib.as_array(memory).reshape(shape)
        return array

    def copy_in(self, pointer: int, array: np.ndarray[Any, Any]) -> None:
        """Copy a contiguous host array to the card, on the stream; it must stay as it is until `synchronize`."""
        if array.nbytes:
            self._driver.call("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, self.stream)

    def copy_out(self, array: np.ndarray[Any, Any], pointer: int) -> None:
        """Fill a contiguous host array from the card, on the stream; it is filled after `synchronize`."""
        if array.nbytes:
            self._driver.call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self._driver.call("cuStreamSynchronize", self.stream)

    def load_kernel(
        self,
        image: bytes,
        entry: str,
        parameters: Sequence[str],
        *,
        threads: int,
        shared_memory: int,
        cooperative: bool = False,
    ) -> Kernel:
        """Load a kernel.

        Args:
            image: a cubin, or PTX, which the driver then compiles.
            entry: the kernel's name in it.
            parameters: "pointer", "int32" or "float32" of every parameter, in order.
            threads: of a block.
            shared_memory: dynamic, bytes of a block.
            cooperative: launch so that all blocks run at the same time.

        Raises:
            DeviceError: the driver refuses it.
        """
        module, call = self._driver.module, self._driver.call
        with self.active():
            # PTX is a text that ends with a zero; after a cubin one more byte does no harm.
            library = call("cuLibraryLoadData", image + b"\0", [], [], 0, [], [], 0)
            kernel = Kernel(0, parameters, threads=threads, shared_memory=shared_memory, cooperative=cooperative)
            self._free_with(kernel, "cuLibraryUnload", library)
            kernel.function = int(call("cuKernelGetFunction", call("cuLibraryGetKernel", library, entry.encode())))
            if shared_memory > _FREE_SHARED_MEMORY:
                limit = module.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call("cuFuncSetAttribute", kernel.function, limit, shared_memory)
        return kernel

    def launch(self, kernel: Kernel, grid: tuple[int, int], values: Sequence[float]) -> None:
        """Launch a kernel on the stream.

        Args:
            kernel: which.
            grid: blocks along axes 0 and 1.
            values: of the parameters, in order; pointers as addresses.
        """
        # The driver takes an array of the addresses of the values and copies these before it returns.
        cells = [_PARAMETER_TYPES[kind](value) for kind, value in zip(kernel.parameters, values, strict=True)]
        addresses = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        shape = (*grid, 1, kernel.threads, 1, 1, kernel.shared_memory, self.stream, ctypes.addressof(addresses))
        if kernel.cooperative:
            self._driver.call("cuLaunchCooperativeKernel", kernel.function, *shape)
        else:
            self._driver.call("cuLaunchKernel", kernel.function, *shape, 0)

    def capture(self, launches: Callable[[], None]) -> Graph:
        """Record what `launches` puts on the stream, without running it.

        Raises:
            DeviceError: something in it failed; the stream is as it was.
        """
        module, call = self._driver.module, self._driver.call
        with self.active():
            # Relaxed: what other threads, or the collection of garbage, allocate and free meanwhile is no part of it.
            call("cuStreamBeginCapture", self.stream, module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
            try:
                launches()
            except BaseException:
                status, captured = module.cuStreamEndCapture(self.stream)
                if int(status) == 0:
                    _quietly(module, "cuGraphDestroy", captured)
                raise
            captured = call("cuStreamEndCapture", self.stream)
            try:
                graph = Graph(int(call("cuGraphInstantiate", captured, 0)))
            finally:
                _quietly(module, "cuGraphDestroy", captured)
            self._free_with(graph, "cuGraphExecDestroy", graph.handle)
        return graph

    def replay(self, graph: Graph) -> None:
        """Put a captured graph on the stream."""
        self._driver.call("cuGraphLaunch", graph.handle, self.stream)

    def _free_with(self, holder: object, name: str, handle: object) -> None:
        _finally(holder, _release, self, name, handle)

    def release(self, name: str, handle: object) -> None:
        """Give something back, from whatever thread; that it fails helps nobody to know."""
        _in_context(self._driver.module, self._context, name, handle)


def _release(device: Device, name: str, handle: object) -> None:
    device.release(name, handle)


def _close(module: Any, context: object, device: object, stream: int) -> None:  # noqa: ANN401 - as above
    _in_context(module, context, "cuStreamDestroy", stream)
    _quietly(module, "cuDevicePrimaryCtxRelease", device)


def _in_context(module: Any, context: object, name: str, handle: object) -> None:  # noqa: ANN401 - as above
    if int(module.cuCtxPushCurrent(context)[0]) == 0:
        _quietly(module, name, handle)
        module.cuCtxPopCurrent()


def _quietly(module: Any, name: str, handle: object) -> None:  # noqa: ANN401 - as above
    getattr(module, name)(handle)


def _finally(holder: object, function: Callable[..., None], *arguments: object) -> None:
    """Call `function` when `holder` is gone. At exit the process gives everything back at once, in the right order."""
    weakref.finalize(holder, function, *arguments).atexit = False
