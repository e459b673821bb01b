"""Which tile is best by number of rows: what kernels/tiles.py should say, from a card.

All kernels of a flow share a tile, so what is timed is a graph of one step of 12 blocks in bf16. The tiles are compiled
by several processes first, those that the compiler or the card refuses are left out, and each is timed in this one.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu_clock import CardClock, Clock, DryClock, Timing
from benchmarks.gpu_flow import FULL, Size
from benchmarks.gpu_inputs import DTYPES, Precision, distance, random_features, random_plan
from benchmarks.gpu_processes import run_each
from benchmarks.gpu_record import Options, Record
from fastfsl.flow import FlowPlan, run_plan
from fastfsl.kernels.flow_executor import FlowExecutor
from fastfsl.kernels.tiles import Tile

DIMS = (512, 1024)
SMALL = Size(128, 1, 1)
# Rows that a class is tuned at, and what is tried there: rows, columns and depth of a tile, warps, stages.
CANDIDATES: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((16, 32, 64), (16, 32, 64), (64, 128), (2, 4), (3, 5)),
    1024: ((32, 64, 128), (64, 128), (64,), (4, 8), (3, 4)),
    8192: ((64, 128, 256), (128, 256), (32, 64), (4, 8), (3, 4)),
}
MOST_DISTANCE = 0.05
SECONDS = 0.15  # each tile
COMPILE_SHARE = 0.6  # of the section's time


class TiledExecutor(FlowExecutor):
    """An executor whose tile is given instead of looked up."""

    def __init__(self, plan: FlowPlan, dtype: torch.dtype, device: torch.device, tile: Tile) -> None:
        """Hold the plan on the device."""
        super().__init__(plan, dtype, device)
        self._tile = tile

    def tile(self, rows: int) -> Tile:
        """The tile given."""
        return self._tile


def run(options: Options) -> None:
    """Try the tiles, and keep the best of each number of rows beside the one of the table."""
    record = Record("sweep", "tiles of the flow kernels, bf16, one step of 12 blocks as a graph", options)
    clock: Clock = DryClock() if options.interpret else CardClock()
    best: list[dict[str, Any]] = []
    for dim in (SMALL.dim,) if options.interpret else DIMS[:1] if options.quick else DIMS:
        compiled = _compile(dim, record, options)
        for rows in (3,) if options.interpret else CANDIDATES:
            timed = list(_time_tiles(dim, rows, compiled, record, clock, options))
            if timed:
                best.append(min(timed, key=lambda row: row["ms"]))
                record.keep(best=best)
    record.finish()


def tiles(dim: int, rows: int) -> list[Tile]:
    """What is tried: tiles that divide the width, without those that no card has the shared memory or threads for."""
    tried = [Tile(*sizes) for sizes in itertools.product(*CANDIDATES[rows])]
    return [tile for tile in tried if dim % tile.depth == 0 and _fits(tile)]


def _fits(tile: Tile) -> bool:
    operands = 2 * tile.stages * tile.depth * (tile.rows + tile.columns)
    outputs_a_thread = tile.rows * tile.columns / (32 * tile.warps)
    return operands <= 227 << 10 and 2 <= outputs_a_thread <= 128


def _compile(dim: int, record: Record, options: Options) -> dict[int, list[Tile]]:
    """By number of rows, the tiles that compile and compute right."""
    if options.interpret:
        return {3: [Tile(16, 32, 32, 4, 2)]}
    tried = [(rows, tile) for rows in CANDIDATES for tile in tiles(dim, rows)]
    found: dict[int, list[Tile]] = {rows: [] for rows in CANDIDATES}
    jobs = [{"dim": dim, "rows": rows, "tile": asdict(tile), "options": options.arguments()} for rows, tile in tried]
    end = (1.0 - COMPILE_SHARE) * record.left()
    for index, answer, error in run_each("gpu_sweep", jobs, lambda: record.left() - end):
        rows, tile = tried[index]
        if error is None and answer is None:
            found[rows].append(tile)
        else:
            record.skip(f"d={dim}, {rows} rows, {tile}", (error or answer)[-300:])
    return found


def _refusal(dim: int, rows: int, tile: Tile, options: Options) -> str | None:
    """Why a tile cannot be used; None: it can, and its kernels now lie in the cache on disk."""
    executor, buffers, plan, x = _prepared(dim, rows, tile, options)
    executor.launch(buffers, rows, (1,))
    off = distance(buffers["states"].view(rows, dim), run_plan(plan.to(dtype=torch.float64), x.double()), x)
    return None if off <= MOST_DISTANCE else f"wrong by {off:.3g}"


def _time_tiles(
    dim: int, rows: int, compiled: dict[int, list[Tile]], record: Record, clock: Clock, options: Options
) -> Iterator[dict[str, Any]]:
    for tile in compiled[rows]:
        if record.left() < 5.0:
            record.skip(f"d={dim}, {rows} rows, {tile}", "no time left")
            continue
        executor, buffers, _, _ = _prepared(dim, rows, tile, options)
        call = lambda: executor.launch(buffers, rows, (1,))  # noqa: B023, E731 - called in this turn
        timing = Timing.of([clock.replay_rounds([call], SECONDS / 2) for _ in range(2)])
        row = {"name": "flow", "dim": dim, "rows": rows, "tile": asdict(tile), "ms": timing.ms, "spread": timing.spread}
        record.add(row)
        yield row


def _prepared(
    dim: int, rows: int, tile: Tile, options: Options
) -> tuple[TiledExecutor, dict[str, torch.Tensor], FlowPlan, torch.Tensor]:
    """Executor, its buffers with rows in them, plan and rows; in fp16 where the interpreter runs it."""
    precision: Precision = "fp16" if options.interpret else "bf16"
    size = SMALL if options.interpret else FULL
    plan = random_plan(dim, size.num_blocks, 1, 0, precision).to(options.device)
    x = random_features(rows, dim, 1, precision).to(options.device)
    executor = TiledExecutor(plan, DTYPES[precision], torch.device(options.device), tile)
    buffers = executor.buffers(rows, 1)
    buffers["x"].view(x.shape).copy_(x)
    return executor, buffers, plan, x


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    job = given["dim"], given["rows"], Tile(**given["tile"]), Options.from_arguments(given["options"])
    print(json.dumps(_refusal(*job)))
