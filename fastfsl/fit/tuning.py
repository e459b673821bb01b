"""The training loop of everything that is tuned by its own objective: towers, adapters, prompts."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from fastfsl.devices import has_fast_bf16
from fastfsl.errors import ConfigError, DeviceError
from fastfsl.fit.batches import Batches, derived_seed
from fastfsl.fit.checkpoint import Checkpoint
from fastfsl.fit.objective import Objective, take_gradient
from fastfsl.fit.processes import join_processes
from fastfsl.fit.tuning_state import History, TuningState

__all__ = ["History", "Objective", "Precision", "TuningRecipe", "tune"]

EpochCallback = Callable[[int, int], None]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
Schedule = Literal["epoch", "update"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TuningRecipe:
    """How an objective is trained. The default is MPS-Tuning's.

    Attributes:
        epochs: passes over the samples.
        batch_size: samples an update.
        num_views: views of every sample in an update.
        optimizer: `sgd`, with momentum, or `adamw`.
        learning_rate: after the warm-up, from where it falls toward `final_rate` as half a cosine (`rate_at`).
        schedule: what the rate and the objective's progress move by: `epoch`, as in the released code of MPS-Tuning,
            CoOp, CoCoOp and CLIP-Adapter, or `update`.
        final_rate: see `rate_at`.
        momentum: SGD's.
        weight_decay: on every trained parameter.
        warmup_epochs: epochs at the constant rate `warmup_rate`.
        warmup_rate: see there.
        precision: `fp32`; `bf16` or `fp16` for products, weights and sums in float32 (fp16, with a scaled loss, on CUDA
            only); or `auto`: bf16 on processors and cards with matrix units for it.
        micro_batch: samples that are carried back at once, for small memories; the outputs are then computed twice.
            Losses over the batch stay those of the whole batch. None: all.

    Source: MPS-Tuning (arXiv 2508.12877), training details.
    """

    epochs: int = 50
    batch_size: int = 32
    num_views: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.002
    schedule: Schedule = "epoch"
    final_rate: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_rate: float = 1e-5
    precision: Precision = "fp32"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse values no training can be done with."""
        for name in ("epochs", "batch_size", "num_views", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(f"expected 0 <= warmup_epochs <= epochs, got {self.warmup_epochs} and {self.epochs}")
        for name in ("learning_rate", "warmup_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"expected {name} > 0, got {getattr(self, name)}")
        if not 0 <= self.final_rate <= self.learning_rate:
            raise ConfigError(f"expected 0 <= final_rate <= learning_rate, got {self.final_rate}, {self.learning_rate}")
        if self.schedule not in ("epoch", "update"):
            raise ConfigError(f"expected schedule 'epoch' or 'update', got {self.schedule!r}")
        if not 0 <= self.momentum < 1 or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"expected momentum in [0, 1) and weight_decay >= 0, got {self.momentum} and {self.weight_decay}"
            )
        if self.optimizer not in ("sgd", "adamw"):
            raise ConfigError(f"expected optimizer 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.precision not in (*_DTYPES, "auto"):
            raise ConfigError(f"expected precision 'fp32', 'bf16', 'fp16' or 'auto', got {self.precision!r}")

    def rate_at(self, update: int, batches_per_epoch: int) -> float:
        """The learning rate of an update, counted from 0.

            rate = final_rate + (learning_rate - final_rate) · (1 + cos πp) / 2

        By `update` p goes from 0, after the warm-up, to 1 at the end. By `epoch` p = (e - warm-up) / epochs in epoch e:
        the whole training's length divides, warm-up included, so that the last epoch does not come near `final_rate`.
        """
        warmup = self.warmup_epochs * batches_per_epoch
        if update < warmup:
            return self.warmup_rate
        if self.schedule == "epoch":
            progress = (update // batches_per_epoch - self.warmup_epochs) / self.epochs
        else:
            progress = (update - warmup) / (self.epochs * batches_per_epoch - warmup)
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final_rate + (self.learning_rate - self.final_rate) * falling

    def progress_at(self, update: int, batches_per_epoch: int) -> float:
        """Fraction of the training done before an update, counted from 0: what an objective's own schedule goes by."""
        if self.schedule == "epoch":
            return (update // batches_per_epoch) / self.epochs
        return update / (self.epochs * batches_per_epoch)

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What products are computed in there, or None for float32.

        Raises:
            ConfigError: fp16 elsewhere than on CUDA.
        """
        if self.precision == "auto":
            return torch.bfloat16 if has_fast_bf16(device) else None
        if self.precision == "fp16" and device.type != "cuda":
            raise ConfigError(f"expected precision fp32, bf16 or auto on {device.type}, got fp16: it needs CUDA")
        return _DTYPES[self.precision]


def tune(
    objective: Objective,
    batches: Batches,
    recipe: TuningRecipe,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    on_epoch: EpochCallback | None = None,
    on_log: Callable[[str], None] | None = None,
    evaluate: Callable[[int], Mapping[str, Any] | None] | None = None,
) -> History:
    """Train an objective, in place. Result and history are functions of (objective, batches, recipe, seed) alone.

    Args:
        objective: what to train, on `device`; in train mode meanwhile, in eval mode afterwards.
        batches: its training set.
        recipe: what to do.
        seed: seed of the objective's random numbers (dropout), drawn anew for every batch.
        device: where to compute.
        checkpoint: where the state is kept; a training that was stopped goes on from there.
        on_epoch: called with (epochs done, epochs in all).
        on_log: told when a stopped training goes on.
        evaluate: called after every epoch with the number of epochs done; what it returns joins the epoch's history.

    Returns:
        By epoch the mean of every loss, the learning rate of its last update, and its seconds.

    Raises:
        ConfigError: nothing to train, a precision that the device does not have, or a training that diverged.
        DeviceError: the objective is on another device, or a batch does not fit this one's memory.
    """
    processes = join_processes(device)
    if not processes.is_main:
        on_epoch = on_log = None
    dtype = recipe.autocast_dtype(device)
    state = _start(objective, recipe, device, scaled=dtype is torch.float16)
    place = state.place
    if checkpoint is not None:
        checkpoint = checkpoint.including(
            recipe=asdict(recipe),
            dtype=str(dtype),
            seed=seed,
            samples=batches.num_samples,
            batches=batches.batches_per_epoch,
            processes=processes.world,
        )
        found = checkpoint.load(state.expected(), silent=not processes.is_main)
        if found is not None:
            state.restore(found)
            if on_log is not None:
                on_log(f"going on after {place.epoch} epochs and {place.batch} batches: {checkpoint.folder}")
    per_epoch = batches.batches_per_epoch
    processes.agree(place.epoch * per_epoch + place.batch, device)

    def keep(*, last: bool = False) -> None:
        if checkpoint is not None and processes.is_main and (last or checkpoint.due):
            checkpoint.save(state.capture())

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(place.epoch, recipe.epochs):
            objective.train()
            last_time = time.monotonic()
            epoch_batches = batches.epoch(epoch, first=place.batch, processes=processes)
            with closing(epoch_batches) as remaining, _memory_of(device, recipe):
                for inputs, labels in remaining:
                    update = epoch * per_epoch + place.batch
                    for group in state.optimizer.param_groups:
                        group["lr"] = recipe.rate_at(update, per_epoch)
                    state.optimizer.zero_grad()
                    losses = take_gradient(
                        objective,
                        inputs.to(device),
                        labels.to(device),
                        recipe.progress_at(update, per_epoch),
                        seed=derived_seed(seed, update),
                        micro_batch=recipe.micro_batch,
                        processes=processes,
                        autocast=partial(torch.autocast, device.type, dtype, enabled=dtype is not None),
                        scale=state.scaler.scale,
                    )
                    state.scaler.step(state.optimizer)
                    state.scaler.update()
                    now = time.monotonic()
                    place.end_batch(losses, len(labels), now - last_time)
                    last_time = now
                    if place.batch < per_epoch:
                        keep()
            if not all(parameter.isfinite().all() for parameter in state.parameters.values()):
                raise ConfigError("the training diverged: expected finite weights: lower learning_rate")
            objective.train(mode=False)
            results = {} if evaluate is None else evaluate(epoch + 1)
            place.end_epoch(recipe.rate_at((epoch + 1) * per_epoch - 1, per_epoch), results or {})
            keep(last=epoch + 1 == recipe.epochs)
            if on_epoch is not None:
                on_epoch(epoch + 1, recipe.epochs)
    objective.train(mode=False)
    return place.history


@contextmanager
def _memory_of(device: torch.device, recipe: TuningRecipe) -> Iterator[None]:
    """Tell what to do where it is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        at_once = min(recipe.micro_batch or recipe.batch_size, recipe.batch_size)
        raise DeviceError(
            f"the memory of {device} is too small for {at_once} samples at once: set micro_batch to fewer"
        ) from error


def _start(objective: Objective, recipe: TuningRecipe, device: torch.device, *, scaled: bool) -> TuningState:
    parameters = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    if not parameters:
        raise ConfigError("expected an objective with trained parameters, got none with requires_grad")
    wrong = {parameter.device for parameter in parameters.values()} - {torch.empty(0, device=device).device}
    if wrong:
        raise DeviceError(f"expected the objective on {device}, got parameters on {', '.join(map(str, wrong))}")
    rate, decay = recipe.learning_rate, recipe.weight_decay
    optimizer: Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters.values(), rate, weight_decay=decay, fused=True)
    else:
        # Fused, SGD takes its first momentum from uninitialised memory where the scaler leaves the first update out.
        fused = None if scaled else True
        optimizer = torch.optim.SGD(parameters.values(), rate, recipe.momentum, weight_decay=decay, fused=fused)
    return TuningState(parameters, optimizer, torch.amp.GradScaler(device.type, enabled=scaled))
