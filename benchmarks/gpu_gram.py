"""Timing of the Gram loss with its gradient on a card, and the memory it takes, against torch, eager and compiled."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu_bounds import LARGE_GRAM, LONG_GRAM, WIDE_GRAM
from benchmarks.gpu_clock import Call, CardClock, Ceilings, Clock, DryClock, compare
from benchmarks.gpu_inputs import distance, manifold_gram_loss, plain_gram_loss, random_tokens, timed_dtype
from benchmarks.gpu_record import Options, Record
from fastfsl.kernels import gram_loss

Shape = tuple[int, int, int]
Kind = Literal["l1", "squared"]
Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SHAPES: tuple[Shape, ...] = (LONG_GRAM, WIDE_GRAM, LARGE_GRAM, (12, 1024, 512))
SMALL: tuple[Shape, ...] = ((2, 5, 128),)
DRIFT = 1e-2  # mean |S - S'|, as in the middle of a training
MOST_LOSS_ERROR, MOST_GRADIENT_DISTANCE = 1e-2, 0.05
SECONDS = 0.3  # each version and shape, for either of the two times


def run(options: Options) -> None:
    """Time every shape in the published form, and what else the kernel can do on the first."""
    record = Record("gram", "Gram alignment loss with its gradient, bf16 features, forward and backward", options)
    clock: Clock = DryClock() if options.interpret else CardClock()
    ceilings = clock.ceilings()
    record.keep(ceilings=vars(ceilings), drift=DRIFT)
    shapes = SMALL if options.interpret else SHAPES[:2] if options.quick else SHAPES
    for shape in shapes:
        _time_shape(record, clock, ceilings, shape, "l1", options, everything=True, normalize=True)
    others: list[tuple[Kind, bool, Shape]] = [("l1", False, shapes[0]), ("squared", True, shapes[0])]
    if len(shapes) > 2:
        others.append(("squared", True, shapes[2]))
    for kind, normalize, shape in others:
        _time_shape(record, clock, ceilings, shape, kind, options, everything=False, normalize=normalize)
    record.finish()


def prepare(options: Options) -> None:
    """Compile torch's versions for every shape once: the results stay in the cache on disk."""
    for shape in SHAPES[:2] if options.quick else SHAPES:
        features, reference = random_tokens(shape, DRIFT, 0, timed_dtype(options.device), options.device)
        for loss in compiled_losses(dry=options.interpret).values():
            loss_and_gradient(loss)(features.requires_grad_(), reference)


def compiled_losses(*, dry: bool) -> dict[str, Loss]:
    """Both torch versions by torch.compile."""
    torch.compiler.reset()
    losses: dict[str, Loss] = {"plain, compiled": plain_gram_loss, "manifold, compiled": manifold_gram_loss}
    backend = "eager" if dry else "inductor"
    return {name: torch.compile(loss, dynamic=False, backend=backend) for name, loss in losses.items()}


def loss_and_gradient(loss: Loss) -> Step:
    """The loss, and its gradient times a constant that keeps 16-bit gradients off the smallest numbers."""

    def step(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(features, reference)
        (gradient,) = torch.autograd.grad(value, features, torch.full_like(value, gradient_scale(features)))
        return value.detach(), gradient

    return step


def gradient_scale(features: Tensor) -> float:
    """A power of two near N sqrt(N d): the gradient of the mean over N^2 entries then has entries of about one."""
    count, dim = features.shape[-2:]
    return 2.0 ** round(math.log2(count * math.sqrt(count * dim)))


def flops(shape: Shape) -> float:
    """The fewest: half of the symmetric S - S' from two products of depth d, and one product for the gradient."""
    batch, count, dim = shape
    return 4.0 * batch * count**2 * dim


def num_bytes(shape: Shape) -> float:
    """16-bit features and reference in, gradient out."""
    batch, count, dim = shape
    return 3.0 * 2 * batch * count * dim


def _time_shape(
    record: Record,
    clock: Clock,
    ceilings: Ceilings,
    shape: Shape,
    kind: Kind,
    options: Options,
    *,
    everything: bool,
    normalize: bool,
) -> None:
    about = {"shape": list(shape), "kind": kind, "normalize": normalize, "dtype": str(timed_dtype(options.device))}
    if record.left() < 8.0:
        record.skip(f"{about}", "no time left")
        return
    copies = clock.copies(int(num_bytes(shape)))
    pairs = [random_tokens(shape, DRIFT, seed, timed_dtype(options.device), options.device) for seed in range(copies)]
    pairs = [(features.requires_grad_(), reference) for features, reference in pairs]
    losses: dict[str, Loss] = {
        "kernel": lambda f, r: gram_loss.gram_alignment_loss(f, r, kind, normalize=normalize),
        "plain, eager": lambda f, r: plain_gram_loss(f, r, kind, normalize=normalize),
    }
    if everything:
        losses["manifold, eager"] = manifold_gram_loss
        losses |= compiled_losses(dry=options.interpret)
    exact = _exact(*pairs[0], kind, normalize=normalize)

    calls: dict[str, list[Call]] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        step = loss_and_gradient(loss)
        try:
            value, gradient = step(*pairs[0])
            figures[name] = {
                "loss_error": abs(float(value) / float(exact[0]) - 1.0),
                "gradient_distance": distance(gradient, exact[1]),
            }
            del value, gradient
            if not options.interpret:
                figures[name] |= _memory(step, pairs[0], shape)
        except Exception as error:  # noqa: BLE001 - one version that fails leaves the others their times
            record.skip(f"{about}: {name}", f"{type(error).__name__}: {error}"[:500])
            continue
        calls[name] = list(_calls(step, pairs))
    queued = compare(clock.queued_rounds, calls, SECONDS)
    for name, timing in queued.items():
        row = {
            **about,
            "name": name,
            "ms": timing.ms,
            "spread": timing.spread,
            "roofline_ms": ceilings.roofline_ms(flops(shape), num_bytes(shape)),
            **figures[name],
        }
        try:
            replayed = compare(clock.replay_rounds, {name: calls[name]}, SECONDS)[name]
            row |= {"device_ms": replayed.ms, "device_spread": replayed.spread}
        except Exception as error:  # noqa: BLE001 - what cannot be captured keeps its other time
            record.skip(f"{about}: {name}, in a graph", f"{type(error).__name__}: {error}"[:500])
        if name == "kernel":
            errors = figures[name]["loss_error"], figures[name]["gradient_distance"]
            row["ok"] = errors[0] <= MOST_LOSS_ERROR and errors[1] <= MOST_GRADIENT_DISTANCE
        record.add(row)


def _exact(features: Tensor, reference: Tensor, kind: Kind, *, normalize: bool) -> tuple[Tensor, Tensor]:
    def loss(features: Tensor, reference: Tensor) -> Tensor:
        return manifold_gram_loss(features, reference, kind, normalize=normalize)

    return loss_and_gradient(loss)(features.detach().double().requires_grad_(), reference.double())


def _memory(step: Step, pair: tuple[Tensor, Tensor], shape: Shape) -> dict[str, float]:
    """Peak past the inputs and the returned gradient, and its share of one float32 N x N matrix for each Gram."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradient = step(*pair)
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - gradient.numel() * gradient.element_size()
    return {"memory_mb": beyond / 1e6, "memory_share": beyond / (4 * shape[0] * shape[1] ** 2)}


def _calls(step: Step, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Call]:
    for features, reference in pairs:
        yield partial(step, features, reference)
