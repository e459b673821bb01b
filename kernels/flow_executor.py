"""A plan on a device: its weights, its work buffers, its launches, and on a card the CUDA graphs that hold them."""

import math
import threading
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import triton
from torch import Tensor

from fastfsl.bundle.flow_launches import Place, flow_launches, work_buffers
from fastfsl.kernels.flow_kernels import FLOW, constants
from fastfsl.kernels.flow_persistent import launch_persistent
from fastfsl.kernels.tiles import (
    CHUNK_ROWS,
    DEPENDENT_LAUNCHES,
    ROW_CLASSES,
    DTypeName,
    Tile,
    column_tiles,
    flow_tile,
    persistent_tile,
    row_bucket,
    row_class,
)

# Of an executor. A graph of 250 launches is small beside the work buffers, which all graphs of a row class share.
MAX_GRAPHS: Final = 32
DTYPES: Final[dict[torch.dtype, DTypeName]] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Triton's interpreter (TRITON_INTERPRET=1) runs kernels on the CPU, and tells it apart when it is imported.
INTERPRETED: Final = not isinstance(FLOW["first"], triton.JITFunction)

# torch waits for the whole card before a capture, which none that is under way elsewhere would survive.
_CAPTURING: Final = threading.Lock()
_WEIGHTS: Final = ("input_weight", "first_weight", "second_weight", "output_weight", "carry_weight")
_VECTORS: Final = (
    *("input_bias", "first_bias", "second_bias", "output_bias", "carry_bias"),
    *("block_table", "final_table"),
)


class Plan(Protocol):
    """What is needed of a `fastfsl.flow.FlowPlan`; its weights and tables are read by name."""

    @property
    def step_size(self) -> float:
        """Euler step h."""

    @property
    def num_steps(self) -> int:
        """M."""

    @property
    def num_blocks(self) -> int:
        """B."""

    @property
    def dim(self) -> int:
        """d."""

    @property
    def input_weight(self) -> Tensor:
        """W_in, (d, d)."""


@dataclass(frozen=True)
class Way:
    """What a graph is of, besides its rows.

    Args:
        read_steps: steps whose states are read.
        persistent: in one launch.
    """

    read_steps: tuple[int, ...]
    persistent: bool


class FlowExecutor:
    """A plan's weights in the dtype of the products, its work buffers and its CUDA graphs, on one device.

    Calls from several threads and streams are safe: they take turns.

    Args:
        plan: copied; later changes of its tensors are not seen.
        dtype: of the products' operands and of the residual stream, float16, bfloat16 or float32.
        device: a card, or the CPU under Triton's interpreter.
        allow_tf32: float32 products may use TF32.
        dependent: a launch may begin before the one before it ends, on cards that can.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        device: torch.device,
        *,
        allow_tf32: bool = False,
        dependent: bool = DEPENDENT_LAUNCHES,
    ) -> None:
        self.dim, self.num_blocks, self.step_size = plan.dim, plan.num_blocks, plan.step_size
        self._dtype, self._device, self._allow_tf32 = dtype, device, allow_tf32
        kinds = {**dict.fromkeys(_WEIGHTS, dtype), **dict.fromkeys(_VECTORS, torch.float32)}
        self._arrays: dict[str, Tensor] = {
            name: getattr(plan, name).detach().to(device, kind, copy=True).contiguous() for name, kind in kinds.items()
        }
        self._arch = 80
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            self._arch = 10 * major + minor
            self._idle = torch.cuda.Event()
        self._dependent = dependent and self._arch >= 90
        self._lock = threading.Lock()
        self._memory: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._graphs: OrderedDict[tuple[int, Way], torch.cuda.CUDAGraph] = OrderedDict()
        self._streams: set[tuple[int, tuple[int, int]]] = set()

    def states(self, x: Tensor, read_steps: tuple[int, ...], *, persistent: bool = False) -> Tensor:
        """The states after these steps, all above 0, float32 (K, n, d); x (n, d) with n > 0.

        Args:
            x: on the executor's device.
            read_steps: ascending.
            persistent: in one launch; of at most `PERSISTENT_LIMIT` rows and `MAX_STEPS` steps.
        """
        out = torch.empty(len(read_steps), *x.shape, dtype=torch.float32, device=self._device)
        on_card = self._device.type == "cuda" and not INTERPRETED
        run = self._replay if on_card and not torch.cuda.is_current_stream_capturing() else self._run
        with torch.cuda.device(self._device) if on_card else nullcontext():
            for start in range(0, len(x), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                run(x[rows], Way(read_steps, persistent), out[:, rows])
        return out

    def tile(self, rows: int) -> Tile:
        """The tile of a launch for so many rows."""
        return flow_tile(self._arch, self.dim, rows, DTYPES[self._dtype])

    def buffers(self, rows: int, num_states: int) -> dict[str, Tensor]:
        """New work buffers, flat; "h" is "h_0" and "h_1" together, "stats" likewise."""
        shapes = work_buffers(rows, self.dim, column_tiles(self.dim, self.tile(rows)), num_states)
        sizes = {name: (math.prod(shape), kind) for name, (shape, kind) in shapes.items()}
        for name in ("h", "stats"):
            size, kind = sizes.pop(f"{name}_0")
            sizes[name] = (size + sizes.pop(f"{name}_1")[0], kind)
        dtypes = {"float32": torch.float32, "state": self._dtype, "weight": self._dtype}
        found = {
            name: torch.empty(size, dtype=dtypes[kind], device=self._device) for name, (size, kind) in sizes.items()
        }
        for name in ("h", "stats"):
            found[f"{name}_0"], found[f"{name}_1"] = found[name].chunk(2)
        return {**found, "arrived": torch.zeros(2, dtype=torch.int32, device=self._device)}

    def launch(self, buffers: dict[str, Tensor], rows: int, read_steps: tuple[int, ...]) -> None:
        """Enqueue the flow of the rows in `buffers["x"]`; the states are left in `buffers["states"]`."""
        tile = self.tile(rows)
        grid = (column_tiles(self.dim, tile), -(-rows // tile.rows))
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        if self._dependent:
            options["launch_pdl"] = True
        named = {**{name: array.view(-1) for name, array in self._arrays.items()}, **buffers}
        launches = flow_launches(
            rows=rows, dim=self.dim, num_blocks=self.num_blocks, step_size=self.step_size, read_steps=read_steps
        )
        for launch in launches:
            arguments: dict[str, Any] = {
                name: named[value.buffer][value.offset :] if isinstance(value, Place) else value
                for name, value in launch.arguments.items()
            }
            fixed = constants(launch.kernel, self.dim, tile, allow_tf32=self._allow_tf32, dependent=self._dependent)
            FLOW[launch.kernel][grid](**arguments, **fixed, **options)

    def launch_persistent(self, buffers: dict[str, Tensor], rows: int, read_steps: tuple[int, ...]) -> None:
        """The same in one launch."""
        processors = 1 if INTERPRETED else torch.cuda.get_device_properties(self._device).multi_processor_count
        launch_persistent(
            self._arrays,
            buffers,
            rows=rows,
            dim=self.dim,
            num_blocks=self.num_blocks,
            step_size=self.step_size,
            read_steps=read_steps,
            tile=persistent_tile(self.dim, DTYPES[self._dtype]),
            programs=processors,
            allow_tf32=self._allow_tf32,
        )

    def _enqueue(self, buffers: dict[str, Tensor], rows: int, way: Way) -> None:
        (self.launch_persistent if way.persistent else self.launch)(buffers, rows, way.read_steps)

    def _run(self, x: Tensor, way: Way, out: Tensor) -> None:
        """Launch by launch, in buffers of the call's own."""
        buffers = self.buffers(len(x), len(way.read_steps))
        buffers["x"].view(x.shape).copy_(x)
        self._enqueue(buffers, len(x), way)
        out.copy_(buffers["states"].view(out.shape))

    def _replay(self, x: Tensor, way: Way, out: Tensor) -> None:
        """As one CUDA graph of the row bucket."""
        rows, stream = row_bucket(len(x)), torch.cuda.current_stream()
        with self._lock:
            stream.wait_event(self._idle)
            buffers = self._shared_buffers(rows, len(way.read_steps), stream)
            graph = self._graph(buffers, rows, way)
            buffers["x"][: x.numel()].view(x.shape).copy_(x)
            graph.replay()
            states = buffers["states"][: len(way.read_steps) * rows * self.dim].view(-1, rows, self.dim)
            out.copy_(states[:, : len(x)])
            self._idle.record(stream)

    def _shared_buffers(self, rows: int, num_states: int, stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Buffers of the row class, which are not given to others while a stream that has used them is at work."""
        key = (ROW_CLASSES[row_class(rows)] or CHUNK_ROWS, num_states)
        if key not in self._memory:
            self._memory[key] = self.buffers(*key)
            self._memory[key]["x"].zero_()  # rows that only fill a bucket up are computed too
        if (stream.cuda_stream, key) not in self._streams:
            self._streams.add((stream.cuda_stream, key))
            for tensor in (*self._arrays.values(), *self._memory[key].values()):
                tensor.record_stream(stream)
        return self._memory[key]

    def _graph(self, buffers: dict[str, Tensor], rows: int, way: Way) -> torch.cuda.CUDAGraph:
        key = (rows, way)
        if key not in self._graphs:
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self._enqueue(buffers, rows, way)  # compiles and loads the kernels, which no capture allows
            graph = torch.cuda.CUDAGraph()
            with _CAPTURING, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._enqueue(buffers, rows, way)
            current.wait_stream(side)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._idle.synchronize()
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]
