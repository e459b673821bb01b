"""An onnxruntime whose CUDA is the CPU, and whose CUDA graphs remember where they were captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Value:
    """An OrtValue on the card: its address is the array it holds."""

    def __init__(self, shape, element_type) -> None:
        self.array = np.full(shape, 7, element_type)  # whatever was there

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, element_type, device_type, device_id) -> Value:
        assert (device_type, device_id) == ("cuda", 0)
        return cls(shape, element_type)

    def update_inplace(self, array) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        assert array.flags.c_contiguous
        self.array[...] = array

    def numpy(self) -> Any:
        return self.array.copy()


class RunOptions:
    """Only the graph's name."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key, value) -> None:
        self.entries[key] = value


class Binding:
    """Values by name."""

    def __init__(self) -> None:
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}
        self.bind_ortvalue_input = self.inputs.__setitem__
        self.bind_ortvalue_output = self.outputs.__setitem__
        self.synchronized = False

    def synchronize_outputs(self) -> None:
        self.synchronized = True


class Session:
    """A session that says it is on CUDA; a graph replays what it was captured with, whatever is bound later."""

    def __init__(self, real, settings: dict[str, str]) -> None:
        self._real = real
        self._settings = settings
        self.captured: dict[str, Binding] = {}
        self.replays = self.plain_runs = 0
        self.fail: Exception | None = None
        self.stale = False

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_providers(self):
        return [CUDA, CPU]

    def run(self, names, feed, options=None):
        if self._settings.get("enable_cuda_graph") == "1":  # else it would capture a graph of this one shape
            assert options.entries == {"gpu_graph_id": "-1"}
        self.plain_runs += 1
        return self._real.run(names, feed)

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        if self.fail is not None:
            raise self.fail
        graph = options.entries["gpu_graph_id"]
        assert graph != "-1"
        if graph not in self.captured:
            self.captured[graph] = binding
        elif self.stale:
            return
        else:
            self.replays += 1
        captured = self.captured[graph]
        outputs = self._real.run(list(captured.outputs), {name: value.array for name, value in captured.inputs.items()})
        for value, output in zip(captured.outputs.values(), outputs, strict=True):
            value.array[...] = output


class CudaOnnxruntime:
    """The module.

    Args:
        refuse_graphs: sessions that are to capture graphs are not created.
    """

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions
    OrtValue = Value
    RunOptions = RunOptions

    def __init__(self, *, refuse_graphs: bool = False) -> None:
        self.sessions: list[Session] = []
        self.settings: list[dict[str, str]] = []
        self._refuse_graphs = refuse_graphs

    def get_available_providers(self):
        return [CUDA, CPU]

    def InferenceSession(self, model, options, providers, enable_fallback, disabled_optimizers=()) -> Any:  # noqa: N802 - onnxruntime's name
        real = onnxruntime.InferenceSession(model, options, providers=[CPU], enable_fallback=enable_fallback)
        if providers == [CPU]:
            return real
        ((name, settings), cpu) = providers
        assert (name, cpu) == (CUDA, CPU)
        self.settings.append(settings)
        if self._refuse_graphs and "enable_cuda_graph" in settings:
            raise RuntimeError("not all nodes are on CUDA")
        self.sessions.append(self.session(real, settings))
        return self.sessions[-1]

    def session(self, real, settings) -> Session:
        return Session(real, settings)
