"""The training loop of the velocity field."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastfsl.devices import has_fast_bf16
from fastfsl.errors import ConfigError
from fastfsl.flow.coupling import pair_with_class
from fastfsl.flow.loss import flow_matching_loss
from fastfsl.flow.path import LinearPath, Noise
from fastfsl.flow.solver import VelocityFunction
from fastfsl.flow.velocity_field import VelocityField

# A typing error in a configuration should not fill the memory: at d = 512 a block holds 1.3 M parameters.
MAX_BLOCKS = 256

# However many updates an epoch is: every sample is seen this often.
MIN_EPOCHS = 5

EpochCallback = Callable[[int, int], None]
Precision = Literal["fp32", "bf16", "auto"]
Warmup = Literal["linear", "released"]


@dataclass(frozen=True)
class FlowRecipe:
    """How a velocity field is trained. The default is the paper's recipe.

    Attributes:
        num_blocks: residual blocks of the field.
        epochs: passes over the samples; one augmented view of each is drawn every time. None: as many whole ones as
            make `updates` updates, and `MIN_EPOCHS` at least.
        updates: what `epochs` None aims at.
        batch_size: samples an update.
        learning_rate: AdamW's peak rate, after `warmup_epochs` of linear warm-up, then cosine to 0.
        weight_decay: AdamW's.
        warmup_epochs: length of the warm-up.
        warmup: `linear`, up to the rate (`warmup_cosine`), or the `released` code's, which stops short of it
            (`released_warmup_cosine`).
        noise: augmentation of the path (see `LinearPath`).
        noise_scale: its scale.
        times_per_batch: distinct times in a batch, stratified over [0, 1] and shared among its samples, so that the
            field's modulations are computed once a time. In a batch that they do not divide, the earlier parts of
            [0, 1] are drawn once more often. None draws a time for each sample, as the paper does.
        cross_entropy_weight: weight of the discriminative term (`endpoint_cross_entropy`); 0, the paper's, is none.
        ema_decay: weights are averaged over the updates and w' is the result: w' <- r w' + (1 - r) w after update
            k + 1, r = min(decay, (k + 1) / (k + 10)), from the weights after the first; None, the paper's, takes the
            last weights.
        precision: `fp32`, `bf16` (products in bfloat16, weights and sums in float32), or `auto`: bf16 on processors
            and cards with matrix units for it.

    Source: FMA (arXiv 2510.14543), training details.
    """

    num_blocks: int = 6
    epochs: int | None = 200
    updates: int = 160
    batch_size: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_epochs: int = 1
    warmup: Warmup = "linear"
    noise: Noise = "none"
    noise_scale: float = 1.0
    times_per_batch: int | None = None
    cross_entropy_weight: float = 0.0
    ema_decay: float | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Refuse values no training can be done with."""
        for name in ("num_blocks", "epochs", "updates", "batch_size", "times_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.num_blocks > MAX_BLOCKS:
            raise ConfigError(f"expected num_blocks <= {MAX_BLOCKS}, got {self.num_blocks}: the paper takes 6")
        if not 0 <= self.warmup_epochs <= (MIN_EPOCHS if self.epochs is None else self.epochs):
            raise ConfigError(f"expected 0 <= warmup_epochs <= epochs, got {self.warmup_epochs} and {self.epochs}")
        if self.warmup not in ("linear", "released"):
            raise ConfigError(f"expected warmup 'linear' or 'released', got {self.warmup!r}")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError(
                f"expected learning_rate > 0 and weight_decay >= 0, got {self.learning_rate}, {self.weight_decay}"
            )
        if not self.cross_entropy_weight >= 0:
            raise ConfigError(f"expected cross_entropy_weight >= 0, got {self.cross_entropy_weight}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"expected ema_decay between 0 and 1, or none, got {self.ema_decay}")
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ConfigError(f"expected precision 'fp32', 'bf16' or 'auto', got {self.precision!r}")

    def num_epochs(self, num_samples: int) -> int:
        """Passes over that many samples."""
        if self.epochs is not None:
            return self.epochs
        return max(MIN_EPOCHS, math.ceil(self.updates / math.ceil(num_samples / self.batch_size)))


def train_velocity_field(
    views: Tensor,
    labels: Tensor,
    class_targets: Tensor,
    recipe: FlowRecipe,
    *,
    prototypes: Tensor | None = None,
    seed: int = 0,
    logit_scale: float = 100.0,
    on_epoch: EpochCallback | None = None,
) -> VelocityField:
    """Fit a velocity field to image features and the targets of their classes.

    Args:
        views: L2-normalised image features, (n, V, d): V augmented views of every sample.
        labels: class indices, (n,).
        class_targets: L2-normalised, (C, d), or (C, K, d) with K prototypes a class, on the device of `views`: the
            class texts, or `blended_targets`.
        recipe: what to do.
        prototypes: to which prototype of its class each sample is sent, (n,); None: a class has one target.
        seed: seed of initialisation, order, views, times and noise.
        logit_scale: factor on the cosines in the discriminative term.
        on_epoch: called with (epochs done, epochs in all).

    Returns:
        The trained field, on the device of `views`, in eval mode.

    Source: FMA (arXiv 2510.14543), training details.
    """
    device = views.device
    num_samples, num_views, dim = views.shape
    targets = pair_with_class(labels, class_targets, prototypes)
    path = LinearPath(recipe.noise, recipe.noise_scale)
    sigma = views.flatten(0, 1).std(dim=0, correction=0) if recipe.noise == "bridge" else None
    low_precision = recipe.precision == "bf16" or (recipe.precision == "auto" and has_fast_bf16(device))

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        field = VelocityField(dim, recipe.num_blocks).to(device)
        averaged = None if recipe.ema_decay is None else AveragedModel(field, multi_avg_fn=_average(recipe.ema_decay))
        optimizer = torch.optim.AdamW(
            field.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        batches_per_epoch = math.ceil(num_samples / recipe.batch_size)
        epochs = recipe.num_epochs(num_samples)
        factor = warmup_cosine if recipe.warmup == "linear" else released_warmup_cosine
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, factor(recipe.warmup_epochs * batches_per_epoch, epochs * batches_per_epoch)
        )
        for epoch in range(epochs):
            view = torch.randint(num_views, (num_samples,), device=device)
            sources = views[torch.arange(num_samples, device=device), view]
            for batch in torch.randperm(num_samples, device=device).split(recipe.batch_size):
                times, rows = _draw_times(len(batch), recipe.times_per_batch, device)
                times = path.clamp(times)
                sample = path.sample(sources[batch], targets[batch], times[rows], sigma=sigma)
                optimizer.zero_grad()
                flow_matching_loss(
                    _at_times(field, times, rows, low_precision=low_precision),
                    sample,
                    weight=recipe.cross_entropy_weight,
                    labels=labels[batch],
                    class_embeddings=class_targets,
                    logit_scale=logit_scale,
                ).backward()
                optimizer.step()
                schedule.step()
                if averaged is not None:
                    averaged.update_parameters(field)
            if on_epoch is not None:
                on_epoch(epoch + 1, epochs)
    if averaged is not None:
        field.load_state_dict(averaged.module.state_dict())
    return field.eval().requires_grad_(False)


def _draw_times(num_samples: int, num_times: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times (T,), one in each of T equal parts of [0, 1], and which of them each sample takes, (n,)."""
    rows = torch.arange(num_samples, device=device)
    if num_times is None or num_times >= num_samples:
        return torch.rand(num_samples, device=device), rows
    times = (torch.arange(num_times, device=device) + torch.rand(num_times, device=device)) / num_times
    return times, rows % num_times  # the batch is in random order, so this is a random assignment


def _at_times(field: VelocityField, times: Tensor, rows: Tensor, *, low_precision: bool) -> VelocityFunction:
    """The field as a function of x alone, at times that are fixed by batch; its velocity in float32."""

    def velocity(x: Tensor, _t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low_precision):
            result: Tensor = field(x, times, rows)
        return result.float()

    return velocity


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential average whose decay rises at first, so that the early weights are forgotten."""
    average: Callable[[float], Callable[[Any, Any, Any], None]] = get_ema_multi_avg_fn
    return lambda averaged, current, number: average(min(decay, float((number + 1) / (number + 10))))(
        averaged, current, number
    )


def warmup_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step: linear from 1/warmup to 1, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def released_warmup_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step, as in the released code: 1, then k/W for 0 < k < W, then half a cosine.

    The rate is set after each update, so that the first one is made at the full rate; and the cosine goes on from the
    last rate of the warm-up, so that its peak is (W - 1)/W of the rate for W steps of warm-up.

    Source: FMA (arXiv 2510.14543), released training loop.
    """
    peak = (warmup_steps - 1) / warmup_steps if warmup_steps > 1 else 1.0

    def factor(step: int) -> float:
        if step == 0:
            return 1.0
        if step < warmup_steps:
            return step / warmup_steps
        # Its first step down is taken at the end of the warm-up; without one, after the first update.
        done = step - max(0, warmup_steps - 1)
        progress = done / max(1, total_steps - warmup_steps)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor
