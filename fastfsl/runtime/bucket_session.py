"""An ONNX Runtime session on a card that computes buckets of rows, as CUDA graphs where it may.

Rows are filled up with zeros to the next bucket, so that only so many shapes occur. For each there are fixed buffers on
the card, and a CUDA graph that ONNX Runtime captures over them: it replays kernels with the addresses that it saw, so
no buffer may move and one thread at a time may run it. Before a graph answers for the first time its replay is
compared with a plain run; where it differs, or nothing can be captured, plain runs go on.

Not yet run on a card: written by ONNX Runtime's documentation and tested on a stand-in.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.bundle.flow_launches import MAX_BUCKET, row_bucket
from fastfsl.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from fastfsl.runtime.session import Node, Session

    Arrays = dict[str, np.ndarray[Any, Any]]

# Shapes whose buffers and graphs are kept; more occur only where classes are added again and again.
MAX_KEPT = 32
# A graph replays the kernels of the plain run; sums within a product may come in another order.
_TOLERANCE = 1e-3
_NO_GRAPH = "-1"

_log = logging.getLogger("fastfsl.runtime")


@dataclass(frozen=True)
class _Work:
    """Buffers of one shape, and the name of the graph over them."""

    inputs: Mapping[str, Any]
    outputs: Sequence[Any]
    binding: Any
    options: Any


class BucketSession:
    """A session on the card. Several threads may call it; the card takes one of them at a time.

    Args:
        session: an ``onnxruntime.InferenceSession`` on the card.
        onnxruntime: its module.
        refused: why there can be no CUDA graphs; None: they are tried.
    """

    def __init__(self, session: Any, onnxruntime: ModuleType, refused: str | None = None) -> None:  # noqa: ANN401 - ships no types
        self._session = session
        self._onnxruntime = onnxruntime
        self._refused = refused
        self._row_inputs = {node.name for node in session.get_inputs()}
        self._kept: OrderedDict[tuple[Any, ...], _Work] = OrderedDict()
        self._graph_ids = count(1)  # never used twice: ONNX Runtime keeps what it captured
        self._lock = threading.Lock()

    @property
    def graphs(self) -> str:
        """Whether it computes by CUDA graphs, and if not, why."""
        return "captured" if self._refused is None else f"none: {self._refused}"

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute the named outputs; the first dimension of every output and of the graph's inputs is the rows.

        Inputs that have a value of their own are the same for every row.
        """
        names = [node.name for node in self._session.get_outputs()] if output_names is None else list(output_names)
        total = min(len(values) for name, values in input_feed.items() if name in self._row_inputs)
        parts = []
        for start in range(0, total, MAX_BUCKET):
            rows = min(MAX_BUCKET, total - start)
            feed = {
                name: _filled_up(values[start : start + rows]) if name in self._row_inputs else np.asarray(values)
                for name, values in input_feed.items()
            }
            with self._lock:
                parts.append([output[:rows] for output in self._compute(names, feed)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _compute(self, names: list[str], feed: Arrays) -> list[Any]:
        if self._refused is None:
            key = (*names, *sorted((name, array.shape, array.dtype.str) for name, array in feed.items()))
            work = self._kept.get(key)
            try:
                if work is None:
                    return self._first(key, names, feed)
                self._kept.move_to_end(key)
                return self._replay(work, feed)
            except Exception as error:  # noqa: BLE001 - onnxruntime raises a type of its own for each status code
                self._refused = str(error).partition("\n")[0] or type(error).__name__
                self._kept.clear()
                _log.warning("no CUDA graphs from now on: %s", self._refused)
        return self._plain(names, feed)

    def _first(self, key: tuple[Any, ...], names: list[str], feed: Arrays) -> list[Any]:
        """The outputs of a plain run, once a graph has been captured on zeros and replayed on these inputs."""
        expected = self._plain(names, feed)
        work = self._allocate(names, feed, expected)
        self._replay(work, {name: np.zeros_like(array) for name, array in feed.items()})
        for found, wanted in zip(self._replay(work, feed), expected, strict=True):
            scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
            if not np.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True):
                raise DeviceError("a replayed CUDA graph gives something else than a plain run")
        self._kept[key] = work
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return expected

    def _allocate(self, names: list[str], feed: Arrays, expected: list[Any]) -> _Work:
        def buffer(array: np.ndarray[Any, Any]) -> Any:  # noqa: ANN401 - ships no types
            value = self._onnxruntime.OrtValue
            return value.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cuda", 0)

        inputs = {name: buffer(array) for name, array in feed.items()}
        outputs = [buffer(array) for array in expected]
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(names, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Work(inputs, outputs, binding, self._options(str(next(self._graph_ids))))

    def _replay(self, work: _Work, feed: Arrays) -> list[Any]:
        for name, array in feed.items():
            work.inputs[name].update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(work.binding, work.options)
        work.binding.synchronize_outputs()
        return [value.numpy() for value in work.outputs]

    def _plain(self, names: list[str], feed: Arrays) -> list[Any]:
        outputs: list[Any] = self._session.run(names, feed, self._options(_NO_GRAPH))
        return outputs

    def _options(self, graph: str) -> Any:  # noqa: ANN401 - ships no types
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        return options

    def get_inputs(self) -> list[Node]:
        """The graph's inputs."""
        return self._inner().get_inputs()

    def get_overridable_initializers(self) -> list[Node]:
        """The graph's inputs that have a value of their own."""
        return self._inner().get_overridable_initializers()

    def get_outputs(self) -> list[Node]:
        """The graph's outputs."""
        return self._inner().get_outputs()

    def get_providers(self) -> list[str]:
        """The execution providers that really came up, best first."""
        return self._inner().get_providers()

    def _inner(self) -> Session:
        session: Session = self._session
        return session


def _filled_up(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of an array and then zeros, as many as its bucket has."""
    filled = np.zeros((row_bucket(len(rows)), *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled
