"""Bit for bit the same over repeats, on an idle card and beside other work on another stream."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_gram import loss_and_gradient
from benchmarks.gpu_inputs import Precision, flow_options, random_features, random_plan, random_tokens, timed_dtype
from benchmarks.gpu_record import Options, Record
from fastfsl.kernels import gram_loss
from fastfsl.kernels.flow_step import euler_flow

REPEATS = 20
FLOWS: tuple[tuple[Precision, int, int], ...] = (
    *(("bf16", rows, 512) for rows in (1, 64, 1000, 9000)),
    ("fp16", 130, 768),
    ("fp32", 130, 640),
)
GRAMS = ((8, 197, 768), (2, 2304, 1024))

Computed = Callable[[], Tensor | tuple[Tensor, ...]]


def run(options: Options) -> None:
    """Repeat every case."""
    record = Record("determinism", "runs whose every bit is compared", options)
    for precision, rows, dim in (("fp32", 17, 128), ("fp16", 3, 128)) if options.interpret else FLOWS:
        plan = random_plan(dim, 2, 3, dim, precision).to(options.device)
        x = random_features(rows, dim, 5, precision).to(options.device)
        how = flow_options(precision)
        for persistent in (False, True) if rows <= 64 else (False,):
            name = f"flow{' in one launch' if persistent else ''}, {precision}, ({rows}, {dim})"
            _repeat(record, name, partial(euler_flow, plan, x, **how, persistent=persistent), options)
    dtype = timed_dtype(options.device)
    for shape in ((1, 5, 128),) if options.interpret else GRAMS:
        for kind in ("l1", "squared"):
            features, reference = random_tokens(shape, 1e-2, 3, dtype, options.device)
            features.requires_grad_()
            step = loss_and_gradient(partial(gram_loss.gram_alignment_loss, kind=kind))
            _repeat(record, f"gram, {kind}, {shape}", partial(step, features, reference), options)
    record.finish()


def _repeat(record: Record, name: str, compute: Computed, options: Options) -> None:
    """Compare repeats with the first run; on this turn's inputs, so before the next turn begins."""
    if record.left() < 5.0:
        record.skip(name, "no time left")
        return
    repeats = 2 if options.interpret else REPEATS
    first = [part.clone() for part in _parts(compute())]
    alone = [_same(first, compute()) for _ in range(repeats)]
    beside = alone[:0] if options.interpret else [_same(first, _beside_others(compute)) for _ in range(repeats)]
    finite = all(bool(part.isfinite().all()) for part in first)
    row = {"name": name, "repeats": repeats, "same": sum(alone), "same_beside_other_work": sum(beside)}
    record.add({**row, "ok": finite and all(alone) and all(beside)})


def _parts(computed: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return computed if isinstance(computed, tuple) else (computed,)


def _same(first: list[Tensor], again: Tensor | tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, _parts(again), strict=True))


def _beside_others(compute: Computed) -> Tensor | tuple[Tensor, ...]:
    """Compute while another stream keeps the card busy."""
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        a = torch.randn(4096, 4096, device="cuda")
        for _ in range(4):
            a = a @ a / 64.0
    out = compute()
    torch.cuda.synchronize()
    return out
