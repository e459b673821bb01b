"""Flow Matching Alignment as an estimator on arrays, with scikit-learn's habits."""

import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from torch import Tensor

from fastfsl.arrays import check_labels, check_width, unit_rows, unit_views
from fastfsl.devices import resolve_device
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.flow_training import FlowRecipe, train_velocity_field
from fastfsl.fit.selection import StepSelection, select_num_steps
from fastfsl.flow.path import Noise
from fastfsl.flow.plan import FlowPlan, build_plan, run_plan
from fastfsl.flow.readout import class_logits, normalize
from fastfsl.flow.solver import check_steps
from fastfsl.flow.velocity_field import VelocityField

# Far beyond what any flow needs, and few enough for the exported graph, which unrolls them.
MAX_STEPS = 1000


class FlowMatchingAlignment(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """FMA: a velocity field moves image features toward the text feature of their class in a few Euler steps.

    The defaults are a short form, a twelfth of the updates, of the published recipe (200 epochs, batches of 32,
    learning rate 2e-4, a time of its own for each sample), which `FlowRecipe` has as its defaults.

    Args:
        num_blocks: residual blocks of the velocity field.
        num_steps: Euler steps M to deploy; None chooses M by cross-validation on the support set.
        max_steps: steps that reach the end of the path; the step size is 1 / max_steps.
        epochs: passes over the support set.
        batch_size: samples an update.
        learning_rate: AdamW's peak learning rate.
        weight_decay: AdamW's weight decay.
        warmup_epochs: linear warm-up, before the cosine.
        noise: path augmentation, `none`, `bridge` (the paper's) or `interpolant` (the released code's).
        noise_scale: its scale.
        times_per_batch: distinct times in a batch, shared among its samples; None draws one for each.
        num_folds: cross-validation folds at most.
        logit_scale: factor on the cosine similarities; None means 100.
        seed: seed of everything random.
        device: torch device to train and to predict on, or `auto`.

    Attributes:
        num_steps_: the step count in use.
        selection_: how it was chosen (`StepSelection`), with the held-out accuracy by step.
        velocity_field_: the trained `VelocityField`.
        plan_: the `FlowPlan` that `transport` runs and the exporter writes.
        class_embeddings_: L2-normalised, (C, d), float32.
        classes_: 0 .. C-1.
        train_seconds_: wall-clock time of `fit`.

    Source: FMA (arXiv 2510.14543).
    """

    def __init__(
        self,
        *,
        num_blocks: int = 6,
        num_steps: int | None = None,
        max_steps: int = 10,
        epochs: int = 60,
        batch_size: int = 128,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_epochs: int = 1,
        noise: Noise = "none",
        noise_scale: float = 1.0,
        times_per_batch: int | None = 16,
        num_folds: int = 3,
        logit_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.num_steps = num_steps
        self.max_steps = max_steps
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.noise = noise
        self.noise_scale = noise_scale
        self.times_per_batch = times_per_batch
        self.num_folds = num_folds
        self.logit_scale = logit_scale
        self.seed = seed
        self.device = device

    def fit(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        class_embeddings: ArrayLike,
        *,
        plain_features: ArrayLike | None = None,
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Choose the step count on held-out support, then train on all of it.

        Args:
            features: image features, (n, d), or of V augmented views of each image, (n, V, d); any length.
            labels: class indices, (n,), rows of `class_embeddings`.
            class_embeddings: text features, (C, d); any length.
            plain_features: features of the same images as they will be classified (not augmented), (n, d); they are
                what the step count is chosen on. By default the mean over the views.
            on_stage: called with (name of the stage, epochs done, epochs in all).

        Returns:
            The estimator.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite, a row is zero, a label names no class or no class has a sample.
            ConfigError: if a parameter is out of its range.
        """
        start = time.perf_counter()
        recipe = FlowRecipe(**{field.name: getattr(self, field.name) for field in fields(FlowRecipe)})
        step_size = self._step_size()
        device = resolve_device(self.device)
        views = _on(device, unit_views(_off_torch(features), "features", np.float32))
        embeddings = _on(device, unit_rows(_off_torch(class_embeddings), "class_embeddings", np.float32))
        targets = _on(device, check_labels(_off_torch(labels), len(views), len(embeddings)))
        check_width(views.shape[2], embeddings.shape[1])
        if plain_features is None:
            plain = normalize(views.mean(dim=1))
        else:
            plain = _on(device, unit_rows(_off_torch(plain_features), "plain_features", np.float32))
        if plain.shape != (views.shape[0], views.shape[2]):
            raise ShapeError(f"expected plain_features {(views.shape[0], views.shape[2])}, got {tuple(plain.shape)}")

        if self.num_steps is None:
            selection = select_num_steps(
                views,
                plain,
                targets,
                embeddings,
                recipe,
                max_steps=self.max_steps,
                step_size=step_size,
                num_folds=self.num_folds,
                seed=self.seed,
                on_stage=on_stage,
            )
        else:
            selection = StepSelection(num_steps=self.num_steps, rule="fixed")
        field = train_velocity_field(
            views,
            targets,
            embeddings,
            recipe,
            seed=self.seed,
            on_epoch=None if on_stage is None else lambda done, total: on_stage("training", done, total),
        )
        self._adopt(field, embeddings, selection)
        self.train_seconds_ = time.perf_counter() - start
        return self

    def transport(self, features: ArrayLike) -> NDArray[np.float32]:
        """Features after `num_steps_` Euler steps, L2-normalised, (n, d)."""
        return self._to_numpy(normalize(self._transported(features)))

    def decision_function(self, features: ArrayLike) -> NDArray[np.float32]:
        """Logits, (n, C): logit scale times cosine similarity of the transported features."""
        return self._to_numpy(self._logits(features))

    def predict_proba(self, features: ArrayLike) -> NDArray[np.float32]:
        """Class probabilities, (n, C): softmax of the logits."""
        return self._to_numpy(self._logits(features).softmax(dim=-1))

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """Class indices, (n,)."""
        predicted: NDArray[np.int64] = self._logits(features).argmax(dim=-1).cpu().numpy()
        return predicted

    def score(self, features: ArrayLike, labels: ArrayLike) -> float:
        """Accuracy on features (n, d) with labels (n,), a fraction."""
        predicted = self.predict(features)
        expected = np.asarray(labels)
        if expected.shape != predicted.shape:  # numpy would compare each with each
            raise ShapeError(f"expected labels {predicted.shape}, one a sample, got {expected.shape}")
        return float((predicted == expected).mean())

    @property
    def num_parameters_(self) -> int:
        """Trained parameters of the velocity field."""
        return sum(parameter.numel() for parameter in self.velocity_field_.parameters())

    def selection_record(self) -> dict[str, Any]:
        """How the step count was chosen, as JSON values."""
        return asdict(self.selection_) | {"accuracy_by_step": list(self.selection_.accuracy_by_step)}

    def state(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays by name: what `restore` needs beside the parameters and the selection."""
        tensors = {f"velocity_field.{name}": value for name, value in self.velocity_field_.state_dict().items()}
        tensors["class_embeddings"] = self.class_embeddings_
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the estimator fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: if they are not those of a field with this estimator's parameters.
        """
        prefix = "velocity_field."
        try:
            selection = StepSelection(**{**record, "accuracy_by_step": tuple(record["accuracy_by_step"])})
            embeddings = torch.from_numpy(state["class_embeddings"])
            with torch.device("meta"):  # nothing is drawn for weights that are replaced at once
                field = VelocityField(embeddings.shape[1], self.num_blocks)
            field.load_state_dict(
                {name.removeprefix(prefix): torch.from_numpy(value) for name, value in state.items() if prefix in name},
                assign=True,
            )
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise DataError(f"expected the tensors of an FMA run, got others ({error}): train it again") from error
        if selection.accuracy_by_step and len(selection.accuracy_by_step) != self.max_steps + 1:
            raise DataError(
                f"expected accuracy_by_step of {self.max_steps + 1} steps, got {len(selection.accuracy_by_step)}: "
                "train it again"
            )
        device = resolve_device(self.device)
        self._adopt(field.to(device).eval().requires_grad_(False), embeddings.to(device), selection)
        return self

    def _adopt(self, field: VelocityField, embeddings: Tensor, selection: StepSelection) -> None:
        self.velocity_field_ = field
        self.class_embeddings_ = embeddings
        self.selection_ = selection
        self.num_steps_ = selection.num_steps
        self.plan_: FlowPlan = build_plan(field, selection.num_steps, self._step_size())
        self.classes_ = np.arange(len(embeddings))

    def _step_size(self) -> float:
        if not 1 <= self.max_steps <= MAX_STEPS:
            raise ConfigError(f"expected max_steps in 1..{MAX_STEPS}, got {self.max_steps}")
        if self.num_folds < 2:
            raise ConfigError(
                f"expected num_folds >= 2, got {self.num_folds}: set num_steps to do without cross-validation"
            )
        if self.num_steps is not None:
            check_steps(self.num_steps, 1.0 / self.max_steps)
        return 1.0 / self.max_steps

    @property
    def logit_scale_(self) -> float:
        """Factor on the cosine similarities."""
        return 100.0 if self.logit_scale is None else self.logit_scale

    def _logits(self, features: ArrayLike) -> Tensor:
        return class_logits(self._transported(features), self.class_embeddings_, self.logit_scale_)

    def _transported(self, features: ArrayLike) -> Tensor:
        if not hasattr(self, "plan_"):
            raise ConfigError("this FlowMatchingAlignment is not fitted: call fit first")
        rows = unit_rows(_off_torch(features), "features", np.float32)
        with torch.inference_mode():
            return run_plan(self.plan_, _on(self.class_embeddings_.device, rows))

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.cpu().numpy()
        return array


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(device)


def _off_torch(values: ArrayLike) -> ArrayLike:
    """A tensor, wherever it is, as an array; anything else as it is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
