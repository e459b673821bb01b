"""A training step of MPS-Tuning, ours against the plain one of plain_mps.py: ViT-B/16 with random weights, fp32."""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_mps import ALIGNMENT_WEIGHT, ALPHA, SCULPTING_WEIGHT, UPPER, PlainMPS
from fastfsl.encoders import Encoder
from fastfsl.fit.mps_objective import MPSObjective
from fastfsl.fit.objective import take_gradient
from fastfsl.fit.tuning import TuningRecipe

pytestmark = pytest.mark.slow  # `make bench-all`

THREADS = 2
BACKBONE, BATCH, VIEWS, CLASSES, DIM = "ViT-B-16", 4, 2, 10, 512
LOGIT_SCALE, TEMPERATURE = 100.0, 0.1
TRAINED = 31_105_536
RATIO_AT_MOST = 0.65
ROUNDS, MEMORY_STEPS = 12, 2

Step = Callable[[], None]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def bench_mps_step(benchmark, record, request):
    quick = request.config.getoption("--quick")
    clip = random_clip()
    plain, ours = PlainMPS(clip.visual), our_objective(clip)
    pairs = list(trained_pairs(plain, ours))
    assert sum(mine.numel() for mine, _ in pairs) == ours.num_parameters == TRAINED
    randomise(pairs)
    losses = plain_gradient(plain), our_gradient(ours)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    gradient_error = max(_distance(a.grad, b.grad) for a, b in pairs)
    assert gradient_error < 1e-4

    steps = {"plain": plain_step(plain), "ours": our_step(ours)}
    for step in steps.values():  # the first one allocates momentum
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def turn() -> None:
        for name, step in steps.items():
            start, processor = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start, time.process_time() - processor))

    benchmark.pedantic(turn, rounds=2 if quick else ROUNDS)
    medians = {name: [statistics.median(column) for column in zip(*times[name], strict=True)] for name in steps}
    seconds = {name: wall for name, (wall, _) in medians.items()}
    processor_seconds = {name: processor for name, (_, processor) in medians.items()}
    # Each in a process of its own: the largest resident set from the first step on, weights included.
    memory = {name: _in_new_process(name) for name in steps}
    result = {
        "what": f"a training step of MPS-Tuning, {BACKBONE}, random weights, fp32, ours against the plain one",
        "batch": BATCH,
        "views": VIEWS,
        "classes": CLASSES,
        "threads": THREADS,
        "rounds": len(times["ours"]),
        "rows": [
            {
                "name": name,
                "seconds": round(seconds[name], 3),
                "seconds_min": round(min(times[name])[0], 3),
                "seconds_max": round(max(times[name])[0], 3),
                "processor_seconds": round(processor_seconds[name], 3),
                "peak_mb": round(memory[name] / 1e6, 1),
            }
            for name in steps
        ],
        "ratio": round(seconds["ours"] / seconds["plain"], 4),
        "processor_ratio": round(processor_seconds["ours"] / processor_seconds["plain"], 4),
        "memory_ratio": round(memory["ours"] / memory["plain"], 4),
        "loss_error": abs(losses[1] / losses[0] - 1),
        "gradient_error": gradient_error,
    }
    benchmark.extra_info.update(ratio=result["ratio"], threads=THREADS)
    record("mps_step", result)
    assert memory["ours"] <= memory["plain"]
    assert seconds["ours"] <= RATIO_AT_MOST * seconds["plain"]


def random_clip() -> Any:
    """A CLIP model with drawn weights, in evaluation mode."""
    torch.manual_seed(0)
    return open_clip.create_model(BACKBONE).eval()


def our_objective(clip: nn.Module) -> MPSObjective:
    encoder = cast("Encoder", SimpleNamespace(model=clip, device=torch.device("cpu"), logit_scale=LOGIT_SCALE))
    texts = inputs()[2].numpy()
    return MPSObjective(
        encoder,
        texts,
        texts,
        alpha=ALPHA,
        alignment_weight=ALIGNMENT_WEIGHT,
        sculpting_weight=SCULPTING_WEIGHT,
        temperature=(TEMPERATURE, TEMPERATURE),
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (n, V, 3, 224, 224), labels (n,), class embeddings (C, d)."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(BATCH, VIEWS, 3, 224, 224, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return pixels, labels, F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=-1)


def trained_pairs(plain: PlainMPS, ours: MPSObjective) -> Iterator[tuple[Tensor, Tensor]]:
    """Every trained tensor of the plain model and the same one of ours."""
    tower = cast("Any", ours.tower)
    for a, b in zip(plain.tuned.transformer.resblocks[UPPER:], tower.upper, strict=True):
        yield from ((a.attn.in_proj_weight, b.in_weight), (a.attn.in_proj_bias, b.in_bias))
        for one, other in ((a.ln_1, b.norm_1), (a.attn.out_proj, b.out), (a.ln_2, b.norm_2), (a.mlp, b.mlp)):
            yield from zip(one.parameters(), other.parameters(), strict=True)
    yield from zip(plain.parallel.parameters(), tower.parallel.parameters(), strict=True)
    yield from zip(plain.tuned.ln_post.parameters(), tower.head.norm.parameters(), strict=True)
    yield plain.tuned.proj, tower.head.projection.weight


@torch.no_grad()
def randomise(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Move both alike away from the start, where A is zero and the branches agree."""
    generator = torch.Generator().manual_seed(2)
    for one, other in pairs:
        one.add_(torch.randn(one.shape, generator=generator), alpha=0.01)
        other.copy_(one)


def plain_gradient(plain: PlainMPS) -> float:
    loss = plain.loss(*inputs(), LOGIT_SCALE, TEMPERATURE)
    loss.backward()
    return loss.item()


def our_gradient(ours: MPSObjective) -> float:
    pixels, labels, _ = inputs()
    return take_gradient(ours, pixels, labels, 0.0, seed=0)["loss"]


def plain_step(plain: PlainMPS) -> Step:
    optimizer = sgd(plain)

    def step() -> None:
        optimizer.zero_grad()
        plain_gradient(plain)
        optimizer.step()

    return step


def our_step(ours: MPSObjective) -> Step:
    optimizer = sgd(ours)

    def step() -> None:
        optimizer.zero_grad()
        our_gradient(ours)
        optimizer.step()

    return step


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    recipe = TuningRecipe()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, recipe.warmup_rate, recipe.momentum, weight_decay=recipe.weight_decay, fused=True)


def peak_bytes(name: str) -> int:
    """Largest resident set of this process over a few steps of one side."""
    torch.set_num_threads(THREADS)
    clip = random_clip()
    step = plain_step(PlainMPS(clip.visual)) if name == "plain" else our_step(our_objective(clip))
    if name == "plain":
        del clip
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # what building took does not count
    for _ in range(MEMORY_STEPS):
        step()
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def _in_new_process(name: str) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_bytes, name).result()


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return ((a - b).norm() / a.norm()).item()
