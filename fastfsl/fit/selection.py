"""How many Euler steps to deploy, chosen on held-out support and nothing else."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.flow_training import FlowRecipe, train_velocity_field
from fastfsl.fit.prototypes import assign_prototypes
from fastfsl.flow.readout import class_logits, normalize
from fastfsl.flow.solver import Solver, solve, solver_states
from fastfsl.flow.targets import blended_targets
from fastfsl.flow.velocity_field import VelocityField

# Where nothing can be held out (one feature vector a class), the step count is this fraction of the whole path. To the
# text alone it is long, and a flow trained on few samples still gains late; blended targets are near.
DEFAULT_FRACTION = 0.8
DEFAULT_FRACTION_BLENDED = 0.2


@dataclass(frozen=True)
class StepSelection:
    """The chosen step count and the evidence for it.

    Attributes:
        num_steps: M.
        rule: `folds` (stratified cross-validation), `views` (one shot: held-out augmented views), `default` (nothing
            can be held out) or `fixed` (given by the user).
        num_folds: how many trainings the curve is pooled over; 0 for `default` and `fixed`.
        accuracy_by_step: held-out accuracy after 0, 1, ... steps, fractions; empty for `default` and `fixed`.
        held_out: logits after the chosen steps of each sample from the fold that held it out, (n, C), NaN rows for
            samples that never were; None but for `folds`.
    """

    num_steps: int
    rule: Literal["folds", "views", "default", "fixed"]
    num_folds: int = 0
    accuracy_by_step: tuple[float, ...] = ()
    held_out: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The selection as JSON values, without the logits."""
        values = {name: value for name, value in vars(self).items() if name != "held_out"}
        return values | {"accuracy_by_step": list(self.accuracy_by_step)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The selection of a `record`.

        Raises:
            KeyError, TypeError: it has other entries.
        """
        return cls(**{**record, "accuracy_by_step": tuple(record["accuracy_by_step"])})


@dataclass(frozen=True)
class _Fold:
    views: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    positions: Tensor | None  # of the held-out samples in the support; None: they are views of the samples trained on


def select_num_steps(
    views: Tensor,
    plain: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    recipe: FlowRecipe,
    *,
    max_steps: int,
    step_size: float,
    solver: Solver = "euler",
    text_samples: float | None = None,
    num_prototypes: int = 1,
    logit_scale: float = 100.0,
    num_folds: int = 5,
    seed: int = 0,
    on_stage: StageCallback | None = None,
) -> StepSelection:
    """Cross-validate the number of Euler steps on the support set.

    A flow is trained on all folds but one and read out after every step on the samples held out; the accuracies
    are pooled over the folds and the best step wins (`best_step`). With one sample a class the folds are over
    augmented views if the texts alone are the targets; else nothing can be held out and a fixed default is taken.

    Args:
        views: L2-normalised features of augmented views, (n, V, d), to train on.
        plain: features of the samples as they will be classified, (n, d), to be held out.
        labels: class indices, (n,).
        class_embeddings: L2-normalised, (C, d).
        recipe: the recipe of the final training.
        max_steps: steps in the whole path.
        step_size: h.
        solver: what takes the steps.
        text_samples: what the text counts for in the classes' targets (`class_targets`), which every fold makes of
            its own samples.
        num_prototypes: prototypes a class, likewise.
        logit_scale: factor on the cosines.
        num_folds: folds at most; no more than the samples of the smallest class.
        seed: seed of the folds and the trainings.
        on_stage: called with (name of the stage, epochs done, epochs in all).

    Source: FMA (arXiv 2510.14543), early-stopping solver, with the constant chosen on held-out support.
    """
    # Held-out views are of images that were trained on: the farther a flow takes them, the better. On the long way to
    # texts alone that is nearly right; to blended targets it would go too far.
    measurable = text_samples is None or _can_hold_out_samples(labels)
    folds = list(_make_folds(views, plain, labels, num_folds, seed)) if measurable else []
    if not folds:
        fraction = DEFAULT_FRACTION if text_samples is None else DEFAULT_FRACTION_BLENDED
        return StepSelection(num_steps=round(fraction * max_steps), rule="default")
    right: list[Tensor] = []
    trained: list[tuple[VelocityField, Tensor]] = []
    for index, fold in enumerate(folds):
        stage = f"fold {index + 1}/{len(folds)}"
        prototypes = assign_prototypes(fold.views, fold.labels, num_prototypes, seed)
        targets = class_targets(fold.views, fold.labels, class_embeddings, text_samples, prototypes)
        velocity_field = train_velocity_field(
            fold.views,
            fold.labels,
            targets,
            recipe,
            prototypes=prototypes,
            seed=seed,
            logit_scale=logit_scale,
            on_epoch=None if on_stage is None else _named(on_stage, stage),
        )
        with torch.inference_mode():
            states = solver_states(velocity_field, fold.held_out, max_steps, step_size, solver)
            predicted = torch.stack([class_logits(state, targets, logit_scale).argmax(dim=-1) for state in states])
        right.append((predicted == fold.held_out_labels).cpu())
        trained.append((velocity_field, targets))
    accuracy = torch.cat(right, dim=1).double().mean(dim=1).numpy()
    num_steps = best_step(accuracy)
    held_out = np.full((len(labels), len(class_embeddings)), np.nan, dtype=np.float32)
    for fold, (velocity_field, targets) in zip(folds, trained, strict=True):
        if fold.positions is not None:
            with torch.inference_mode():
                state = solve(velocity_field, fold.held_out, num_steps, step_size, solver)
                held_out[fold.positions.cpu().numpy()] = class_logits(state, targets, logit_scale).cpu().numpy()
    return StepSelection(
        num_steps=num_steps,
        rule="views" if folds[0].positions is None else "folds",
        num_folds=len(folds),
        accuracy_by_step=tuple(float(value) for value in accuracy),
        held_out=None if folds[0].positions is None else held_out,
    )


def class_targets(
    views: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    text_samples: float | None,
    prototypes: Tensor | None = None,
) -> Tensor:
    """Where the flow sends each class, (C, d): its text, or with `text_samples` its `blended_targets`."""
    if text_samples is None:
        return class_embeddings
    return blended_targets(normalize(views.mean(dim=1)), labels, class_embeddings, text_samples, prototypes)


def best_step(accuracy: NDArray[np.float64]) -> int:
    """The step of the best accuracy; 0 if no step improves on it, else the latest among equals.

    Small support sets make many ties. A fold's flow has seen fewer samples than the deployed one will, and the more a
    flow has seen, the later its best step: hence the latest. On the demo's training pool, samples outside the support,
    the earliest would cost 0.1 point at 16 shots and 1.9 at 4 (benchmarks/bench_step_selection.py).
    """
    if accuracy[0] == accuracy.max():
        return 0
    return int(np.flatnonzero(accuracy == accuracy.max())[-1])


def _named(on_stage: StageCallback, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: on_stage(stage, done, total)


def _can_hold_out_samples(labels: Tensor) -> bool:
    # At least half of the classes must keep a sample to train on when one is held out.
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    return bool((counts >= 2).float().mean() >= 0.5)


def _make_folds(views: Tensor, plain: Tensor, labels: Tensor, num_folds: int, seed: int) -> Iterator[_Fold]:
    from sklearn.model_selection import StratifiedKFold

    num_samples, num_views, _ = views.shape
    if num_folds < 2:
        return
    if _can_hold_out_samples(labels):
        counts = torch.bincount(labels)
        smallest = int(counts[counts > 1].min())
        splitter = StratifiedKFold(min(num_folds, smallest), shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # A class of one sample among larger ones is in no training fold but its own: that is accepted.
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            splits = list(splitter.split(np.zeros(num_samples), labels.cpu().numpy()))
        for train, held_out in splits:
            train_index = torch.as_tensor(train, device=views.device)
            held_out_index = torch.as_tensor(held_out, device=views.device)
            yield _Fold(
                views[train_index], labels[train_index], plain[held_out_index], labels[held_out_index], held_out_index
            )
    elif num_views >= 2:
        order = np.random.default_rng(seed).permutation(num_views)
        for held_out in np.array_split(order, min(num_folds, num_views)):
            train_views = torch.as_tensor(np.setdiff1d(order, held_out), device=views.device)
            held_out_views = torch.as_tensor(held_out, device=views.device)
            yield _Fold(
                views[:, train_views],
                labels,
                views[:, held_out_views].flatten(0, 1),
                labels.repeat_interleave(len(held_out)),
                None,
            )
