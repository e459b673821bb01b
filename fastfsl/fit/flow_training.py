"""The training loop of the velocity field."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfsl.errors import ConfigError
from fastfsl.flow.coupling import pair_with_class
from fastfsl.flow.loss import flow_matching_loss
from fastfsl.flow.path import LinearPath, Noise
from fastfsl.flow.solver import VelocityFunction
from fastfsl.flow.velocity_field import VelocityField

# A typing error in a configuration should not fill the memory: at d = 512 a block holds 1.3 M parameters.
MAX_BLOCKS = 256

EpochCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class FlowRecipe:
    """How a velocity field is trained. The default is the paper's recipe.

    Attributes:
        num_blocks: residual blocks of the field.
        epochs: passes over the samples; one augmented view of each is drawn every time.
        batch_size: samples an update.
        learning_rate: AdamW's peak rate, after `warmup_epochs` of linear warm-up, then cosine to 0.
        weight_decay: AdamW's.
        warmup_epochs: length of the warm-up.
        noise: augmentation of the path (see `LinearPath`).
        noise_scale: its scale.
        times_per_batch: distinct times in a batch, stratified over [0, 1] and shared among its samples, so that the
            field's modulations are computed once a time; every sample's time is still uniform. None draws one for
            each sample, as the paper does.

    Source: FMA (arXiv 2510.14543), training details.
    """

    num_blocks: int = 6
    epochs: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_epochs: int = 1
    noise: Noise = "none"
    noise_scale: float = 1.0
    times_per_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse values no training can be done with."""
        for name in ("num_blocks", "epochs", "batch_size", "times_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.num_blocks > MAX_BLOCKS:
            raise ConfigError(f"expected num_blocks <= {MAX_BLOCKS}, got {self.num_blocks}: the paper takes 6")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(f"expected 0 <= warmup_epochs <= epochs, got {self.warmup_epochs} and {self.epochs}")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError(
                f"expected learning_rate > 0 and weight_decay >= 0, got {self.learning_rate}, {self.weight_decay}"
            )


def train_velocity_field(
    views: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    recipe: FlowRecipe,
    *,
    seed: int = 0,
    on_epoch: EpochCallback | None = None,
) -> VelocityField:
    """Fit a velocity field to image features and the text features of their classes.

    Args:
        views: L2-normalised image features, (n, V, d): V augmented views of every sample.
        labels: class indices, (n,).
        class_embeddings: L2-normalised text features, (C, d), on the device of `views`.
        recipe: what to do.
        seed: seed of initialisation, order, views, times and noise.
        on_epoch: called with (epochs done, epochs in all).

    Returns:
        The trained field, on the device of `views`, in eval mode.

    Source: FMA (arXiv 2510.14543), training details.
    """
    device = views.device
    num_samples, num_views, dim = views.shape
    targets = pair_with_class(labels, class_embeddings)
    path = LinearPath(recipe.noise, recipe.noise_scale)
    sigma = views.flatten(0, 1).std(dim=0, correction=0) if recipe.noise == "bridge" else None

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        field = VelocityField(dim, recipe.num_blocks).to(device)
        optimizer = torch.optim.AdamW(
            field.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        batches_per_epoch = math.ceil(num_samples / recipe.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            warmup_cosine(recipe.warmup_epochs * batches_per_epoch, recipe.epochs * batches_per_epoch),
        )
        for epoch in range(recipe.epochs):
            view = torch.randint(num_views, (num_samples,), device=device)
            sources = views[torch.arange(num_samples, device=device), view]
            for batch in torch.randperm(num_samples, device=device).split(recipe.batch_size):
                times, rows = _draw_times(len(batch), recipe.times_per_batch, device)
                times = path.clamp(times)
                sample = path.sample(sources[batch], targets[batch], times[rows], sigma=sigma)
                optimizer.zero_grad()
                flow_matching_loss(_at_times(field, times, rows), sample).backward()
                optimizer.step()
                schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1, recipe.epochs)
    return field.eval().requires_grad_(False)


def _draw_times(num_samples: int, num_times: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times (T,), one in each of T equal parts of [0, 1], and which of them each sample takes, (n,)."""
    rows = torch.arange(num_samples, device=device)
    if num_times is None or num_times >= num_samples:
        return torch.rand(num_samples, device=device), rows
    times = (torch.arange(num_times, device=device) + torch.rand(num_times, device=device)) / num_times
    return times, rows % num_times  # the batch is in random order, so this is a random assignment


def _at_times(field: VelocityField, times: Tensor, rows: Tensor) -> VelocityFunction:
    """The field as a function of x alone, at times that are fixed by batch."""

    def velocity(x: Tensor, _t: Tensor) -> Tensor:
        result: Tensor = field(x, times, rows)
        return result

    return velocity


def warmup_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step: linear from 1/warmup to 1, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor
