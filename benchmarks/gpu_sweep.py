"""Which tile is best by size: what kernels/tiles.py and kernels/gram_tiles.py should say, from a card.

All kernels of a flow share a tile, so what is timed is a graph of one step of 12 blocks; of the Gram loss it is a graph
of the loss with its gradient, l1, rows normalised. Both in bf16. The tiles are compiled by several processes first,
those that the compiler or the card refuses are left out, and each is timed in this one.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_bounds import LARGE_GRAM, LONG_GRAM, WIDE_GRAM
from benchmarks.gpu_clock import Call, CardClock, Clock, DryClock, Timing
from benchmarks.gpu_flow import FULL
from benchmarks.gpu_gram import DRIFT, loss_and_gradient
from benchmarks.gpu_inputs import distance, manifold_gram_loss, random_features, random_plan, random_tokens, timed_dtype
from benchmarks.gpu_processes import run_each
from benchmarks.gpu_record import Options, Record
from fastfsl.flow import FlowPlan, run_plan
from fastfsl.kernels import gram_loss, gram_tiles
from fastfsl.kernels.flow_executor import FlowExecutor
from fastfsl.kernels.gram_tiles import GramTile, gram_tile
from fastfsl.kernels.tiles import Tile, flow_tile

# Rows that a class is tuned at, and what is tried there: rows, columns and depth of a tile, warps, stages.
FLOW_TRIED: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((16, 32, 64), (16, 32, 64), (64, 128), (2, 4), (3, 5)),
    1024: ((32, 64, 128), (64, 128), (64,), (4, 8), (3, 4)),
    4096: ((64, 128, 256), (128, 256), (32, 64), (4, 8), (3, 4)),
    8192: ((64, 128, 256), (128, 256), (32, 64), (4, 8), (3, 4)),
}
FLOW_DIMS = (512, 1024)
GRAM_TRIED = ((64, 128), (64, 128), (64,), (4, 8), (2, 3, 4))
GRAM_WIDTHS, GRAM_PARTS = (64, 128), (2, 4)
ARCHITECTURE = 90
GRAM_SHAPES = (LONG_GRAM, LARGE_GRAM, WIDE_GRAM)
LONGEST_WHOLE = 512
# What a thread of a card since sm_80 has, less what addresses take; and shared memory of a program on sm_90.
REGISTERS, SHARED_MEMORY = 200, 227 << 10
MOST_DISTANCE = 0.05
SECONDS = 0.12  # each tile
COMPILE_SHARE = 0.6  # of the section's time


@dataclass(frozen=True)
class Trial:
    """A tile at a size.

    Args:
        kind: "flow" or "gram".
        size: (rows, d) or (B, N, d).
        tile: the fields of a `Tile` or a `GramTile`.
        in_table: it is what the tables give a card of `ARCHITECTURE` now.
    """

    kind: str
    size: tuple[int, ...]
    tile: dict[str, Any]
    in_table: bool = False

    def opened(self, options: Options) -> AbstractContextManager[tuple[Call, Callable[[], float]]]:
        """What runs it on inputs that are ready, and how far its result is from float64."""
        return (_flow if self.kind == "flow" else _gram)(self, options)


def run(options: Options) -> None:
    """Try the tiles, and keep the best of each size beside what the tables say."""
    record = Record("sweep", "tiles of the kernels, bf16, replays of a graph", options)
    clock: Clock = DryClock() if options.interpret else CardClock()
    best: list[dict[str, Any]] = []
    tried = _dry_trials() if options.interpret else [trial for trials in sizes(options) for trial in trials]
    usable = tried if options.interpret else list(_compile(tried, record, options))
    for _, trials in itertools.groupby(usable, key=lambda trial: (trial.kind, trial.size)):
        timed = list(_time(list(trials), record, clock, options))
        if timed:
            table_ms = next((row["ms"] for row in timed if row["in_table"]), None)
            best.append({**min(timed, key=lambda row: row["ms"]), "table_ms": table_ms})
            record.keep(best=best)
    record.finish()


def sizes(options: Options) -> Iterator[list[Trial]]:
    """The trials of every size, those first that matter most."""
    for rows in FLOW_TRIED:
        yield flow_trials(rows, FLOW_DIMS[0])
    for shape in GRAM_SHAPES[: 1 if options.quick else None]:
        yield gram_trials(shape)
    if not options.quick:
        for rows in FLOW_TRIED:
            yield flow_trials(rows, FLOW_DIMS[1])


def flow_trials(rows: int, dim: int) -> list[Trial]:
    """Tiles that divide the width, without those that no card has the registers or the shared memory for."""
    tried = [
        tile
        for tile in [Tile(*sizes) for sizes in itertools.product(*FLOW_TRIED[rows])]
        if dim % tile.depth == 0 and 2 <= _outputs(tile, tile.columns) <= 128 and _fits(tile, operands=1)
    ]
    table = flow_tile(ARCHITECTURE, dim, rows, "bf16")
    return [Trial("flow", (rows, dim), asdict(tile), tile == table) for tile in dict.fromkeys([table, *tried])]


def gram_trials(shape: tuple[int, int, int]) -> list[Trial]:
    """Likewise: those that keep W in registers, and those that keep a part of the gradient there."""
    _, count, dim = shape
    table = gram_tile(ARCHITECTURE, count, dim, "bf16")
    tried = {table: None}
    for tile in [Tile(*sizes) for sizes in itertools.product(*GRAM_TRIED)]:
        products = 2 * _outputs(tile, tile.columns)
        chunks = -(-count // tile.columns)
        choices = [GramTile(True, tile, chunks, width) for width in GRAM_WIDTHS if count <= LONGEST_WHOLE]
        choices += [GramTile(False, tile, parts, GRAM_WIDTHS[-1]) for parts in GRAM_PARTS]
        for choice in choices:
            weights = _outputs(tile, tile.columns * chunks) // 2 if choice.whole else 0
            gradient = _outputs(tile, choice.width * (1 if choice.whole else choice.parts))
            registers = max(products, gradient) + weights if choice.whole else products + gradient
            if dim % tile.depth == 0 and registers <= REGISTERS and _fits(tile, operands=2):
                tried[choice] = None
    return [Trial("gram", shape, asdict(tile), tile == table) for tile in tried]


def _dry_trials() -> list[Trial]:
    tile = Tile(16, 32, 32, 4, 2)
    return [
        Trial("flow", (3, 128), asdict(tile)),
        Trial("gram", (1, 5, 128), asdict(GramTile(True, tile, 1, 64))),
    ]


def _outputs(tile: Tile, columns: int) -> int:
    """Of a thread."""
    return tile.rows * columns // (32 * tile.warps)


def _fits(tile: Tile, operands: int) -> bool:
    return 2 * operands * tile.stages * tile.depth * (tile.rows + tile.columns) <= SHARED_MEMORY


def _compile(tried: list[Trial], record: Record, options: Options) -> Iterator[Trial]:
    """The trials that compile and compute right, in their order."""
    jobs = [{**asdict(trial), "options": options.arguments()} for trial in tried]
    end = (1.0 - COMPILE_SHARE) * record.left()
    refusals = {}
    for index, answer, error in run_each("gpu_sweep", jobs, lambda: record.left() - end):
        refusals[index] = error or answer
    for index, trial in enumerate(tried):
        if refusals[index] is None:
            yield trial
        else:
            record.skip(f"{trial.kind} {trial.size} {trial.tile}", refusals[index][-300:])


def refusal(trial: Trial, options: Options) -> str | None:
    """Why a tile cannot be used; None: it can, and its kernels now lie in the cache on disk."""
    with trial.opened(options) as (call, off):
        call()
        found = off()
    return None if found <= MOST_DISTANCE else f"wrong by {found:.3g}"


def _time(trials: list[Trial], record: Record, clock: Clock, options: Options) -> Iterator[dict[str, Any]]:
    for trial in trials:
        about = {"name": trial.kind, "size": list(trial.size), "tile": trial.tile, "in_table": trial.in_table}
        if record.left() < 3.0:
            record.skip(f"{about}", "no time left")
            continue
        with trial.opened(options) as (call, _):
            timing = Timing.of([clock.replay_rounds([call], SECONDS / 2) for _ in range(2)])
        row = {**about, "ms": timing.ms, "spread": timing.spread}
        record.add(row)
        yield row


class _TiledExecutor(FlowExecutor):
    """An executor whose tile is given instead of looked up."""

    def __init__(self, plan: FlowPlan, dtype: torch.dtype, device: torch.device, tile: Tile) -> None:
        super().__init__(plan, dtype, device)
        self._tile = tile

    def tile(self, rows: int) -> Tile:
        """The tile given, whatever the rows."""
        return self._tile


@contextmanager
def _flow(trial: Trial, options: Options) -> Iterator[tuple[Call, Callable[[], float]]]:
    rows, dim = trial.size
    plan = random_plan(dim, 1 if options.interpret else FULL.num_blocks, 1, 0, "fp16").to(options.device)
    x = random_features(rows, dim, 1, "fp16").to(options.device)
    executor = _TiledExecutor(plan, timed_dtype(options.device), x.device, Tile(**trial.tile))
    buffers = executor.buffers(rows, 1)
    buffers["x"].view(x.shape).copy_(x)

    def off() -> float:
        return distance(buffers["states"].view(rows, dim), run_plan(plan.to(dtype=torch.float64), x.double()), x)

    yield lambda: executor.launch(buffers, rows, (1,)), off


@contextmanager
def _gram(trial: Trial, options: Options) -> Iterator[tuple[Call, Callable[[], float]]]:
    batch, count, dim = trial.size
    tile = GramTile(**{**trial.tile, "tile": Tile(**trial.tile["tile"])})
    features, reference = random_tokens((batch, count, dim), DRIFT, 0, timed_dtype(options.device), options.device)
    features.requires_grad_()
    step = loss_and_gradient(gram_loss.gram_alignment_loss)

    def off() -> float:
        pair = features.detach().double().requires_grad_(), reference.double()
        exact = loss_and_gradient(manifold_gram_loss)(*pair)
        return distance(step(features, reference)[1], exact[1])

    with mock.patch.object(gram_tiles, "gram_tile", return_value=tile):
        gram_tiles.loss_variant.cache_clear()  # it remembers the tile of the table, or of the trial before
        yield lambda: step(features, reference), off


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    chosen = Trial(given["kind"], tuple(given["size"]), given["tile"])
    print(json.dumps(refusal(chosen, Options.from_arguments(given["options"]))))
