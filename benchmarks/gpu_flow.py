"""Timing of the flow on a card: the kernels against the plain module and against its tables, eager and compiled.

Width 512, 12 blocks, 10 steps, bf16 products everywhere. Beside each figure stands the roofline: the longer of the
operations over the measured peak and of the bytes that must move over the measured bandwidth, every weight read once;
and `launches_ms`, what so many kernels take that each wait for the one before.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_clock import Call, CardClock, Ceilings, Clock, DryClock, compare
from benchmarks.gpu_inputs import distance, random_features, random_field, timed_dtype
from benchmarks.gpu_processes import run_each
from benchmarks.gpu_record import Options, Record
from fastfsl.flow import FlowPlan, VelocityField, build_plan, euler, run_plan
from fastfsl.kernels.flow_step import euler_flow

Flow = Callable[[Tensor], Tensor]
# In the order of worth: those with a bound first.
BATCHES = (1, 4096, 65536, 256, 64, 8, 1024, 16384)
PERSISTENT_ROWS = 64
CHECKED_ROWS = 256
MOST_DISTANCE = 0.05  # of the displacement, after 10 steps of bf16 products
SECONDS = 0.35  # each version and batch, for either of the two times
PREPARING = 4  # processes


@dataclass(frozen=True)
class Size:
    """Of the flow that is timed."""

    dim: int
    num_blocks: int
    num_steps: int

    @property
    def num_products(self) -> int:
        """Matrix products of all steps: two a block, one to carry u on or to leave, and one to enter."""
        return self.num_steps * (2 * self.num_blocks + 1) + 1

    def flops(self, rows: int) -> float:
        """Of the products alone."""
        return 2.0 * rows * self.dim**2 * self.num_products

    def num_bytes(self, rows: int) -> float:
        """16-bit weights and float32 tables once, float32 rows in and out."""
        weights = 2 * (2 * self.num_blocks + 3) * self.dim**2
        tables = 4 * self.num_steps * (3 * self.num_blocks + 2) * self.dim
        return float(weights + tables + 2 * 4 * rows * self.dim)


FULL, SMALL = Size(512, 12, 10), Size(128, 2, 2)


def run(options: Options) -> None:
    """Time every batch, as long as there is time."""
    size = SMALL if options.interpret else FULL
    record = Record(
        "flow", f"euler_flow in bf16, d={size.dim}, {size.num_blocks} blocks, {size.num_steps} steps", options
    )
    clock: Clock = DryClock() if options.interpret else CardClock()
    ceilings = clock.ceilings()
    record.keep(ceilings=vars(ceilings), size=vars(size))
    field, plan = field_and_plan(size, options.device)
    for batch in batches(options):
        if record.left() < 8.0:
            record.skip(f"batch {batch}", "no time left")
            continue
        _time_batch(record, clock, ceilings, size, batch, field, plan, options)
    # Last: one launch whose programs wait for each other is what may never end.
    for batch in [batch for batch in sorted(batches(options)) if batch <= PERSISTENT_ROWS and record.left() > 5.0]:
        _time_batch(record, clock, ceilings, size, batch, None, plan, options)
    record.finish()


def prepare(options: Options) -> None:
    """Compile torch's version for every batch once: its result stays in the cache on disk."""
    for _, _, error in run_each("gpu_flow", batches(options), lambda: options.seconds, PREPARING):
        if error is not None:
            print(f"not compiled ahead: {error}", flush=True)


def batches(options: Options) -> tuple[int, ...]:
    """Those that are timed."""
    if options.interpret:
        return (1, 3)
    return (1, 256, 4096) if options.quick else BATCHES


def field_and_plan(size: Size, device: str) -> tuple[VelocityField, FlowPlan]:
    """The module, and the float32 plan made of it."""
    field = random_field(size.dim, size.num_blocks, seed=0).to(device)
    return field, build_plan(field, size.num_steps, 1 / size.num_steps)


def module_flow(field: VelocityField, num_steps: int, dtype: torch.dtype) -> Flow:
    """The plain module: as in training, and as research code runs it, every row brings its own t."""
    field = field.to(dtype)

    @torch.inference_mode()
    def flow(x: Tensor) -> Tensor:
        return euler(lambda state, t: field(state, t.expand(len(state))), x, num_steps, 1 / num_steps)

    return flow


def tables_flow(plan: FlowPlan, dtype: torch.dtype) -> Flow:
    """The plan, with its tables instead of the modulations."""
    rounded = plan.to(dtype=dtype)
    return torch.inference_mode()(lambda x: run_plan(rounded, x))


def compiled_tables(plan: FlowPlan, dtype: torch.dtype, *, dry: bool) -> Flow:
    """The same by torch.compile for one number of rows, with its CUDA graphs, which need not copy the weights."""
    torch.compiler.reset()
    rounded = plan.to(dtype=dtype)
    for value in vars(rounded).values():
        if isinstance(value, Tensor):
            torch._dynamo.mark_static_address(value)  # noqa: SLF001 - documented, without another name

    def flow(x: Tensor) -> Tensor:
        return run_plan(rounded, x)

    if dry:
        return torch.compile(flow, dynamic=False, fullgraph=True, backend="eager")
    return torch.compile(flow, dynamic=False, fullgraph=True, mode="reduce-overhead")


def _prepare_batch(batch: int) -> None:
    _, plan = field_and_plan(FULL, "cuda")
    dtype = timed_dtype("cuda")
    x = random_features(batch, FULL.dim, 1, "bf16").to("cuda", dtype)
    with torch.no_grad():
        compiled_tables(plan, dtype, dry=False)(x)
        torch.cuda.synchronize()


@torch.no_grad()
def _time_batch(
    record: Record,
    clock: Clock,
    ceilings: Ceilings,
    size: Size,
    batch: int,
    field: VelocityField | None,
    plan: FlowPlan,
    options: Options,
) -> None:
    """One batch: the default and its competitors, or without a field the two ways of the default."""
    dtype = timed_dtype(options.device)
    x = random_features(batch, size.dim, batch, "bf16").to(options.device)
    inputs = [x.roll(shift, 0) if batch > 1 else x.roll(shift, 1) for shift in range(clock.copies(4 * x.numel()))]
    rounded = [x.to(dtype) for x in inputs]
    exact = run_plan(plan.to(dtype=torch.float64), x[:CHECKED_ROWS].double())
    versions: dict[str, tuple[Flow, list[Tensor]]] = {}
    if field is None:
        versions["in one launch"] = (lambda x: euler_flow(plan, x, dtype=dtype, persistent=True), inputs)
        versions["launch by launch"] = (lambda x: euler_flow(plan, x, dtype=dtype, persistent=False), inputs)
    else:
        versions["euler_flow"] = (lambda x: euler_flow(plan, x, dtype=dtype), inputs)
        versions["module, eager"] = module_flow(field, size.num_steps, dtype), rounded
        versions["tables, eager"] = tables_flow(plan, dtype), rounded
        versions["tables, compiled"] = compiled_tables(plan, dtype, dry=options.interpret), rounded

    calls: dict[str, list[Call]] = {}
    distances = {}
    for name, (flow, given) in versions.items():
        try:
            out = flow(given[0])[:CHECKED_ROWS]
        except Exception as error:  # noqa: BLE001 - one version that fails leaves the others their times
            record.skip(f"batch {batch}: {name}", f"{type(error).__name__}: {error}"[:500])
            continue
        distances[name] = distance(out, exact, x[:CHECKED_ROWS])
        calls[name] = list(_calls(flow, given))
    single = compare(clock.call_rounds, calls, SECONDS)
    queued = compare(clock.queued_rounds, calls, SECONDS)
    roofline_ms = ceilings.roofline_ms(size.flops(batch), size.num_bytes(batch))
    for name, timing in single.items():
        row = {
            "batch": batch,
            "name": name,
            "ms": timing.ms,
            "spread": timing.spread,
            "rounds": timing.rounds,
            "queued_ms": queued[name].ms,
            "queued_spread": queued[name].spread,
            "roofline_ms": roofline_ms,
            "launches_ms": 1e-3 * ceilings.launch_us * size.num_products,
            "share_of_peak": size.flops(batch) / (1e9 * timing.ms * ceilings.tflops),
            "distance": distances[name],
        }
        ours = name in {"euler_flow", "in one launch", "launch by launch"}
        record.add({**row, "ok": distances[name] <= MOST_DISTANCE} if ours else row)


def _calls(flow: Flow, inputs: list[Tensor]) -> Iterator[Call]:
    for x in inputs:
        yield partial(flow, x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _prepare_batch(json.loads(sys.argv[1]))
    print(json.dumps("compiled"))
