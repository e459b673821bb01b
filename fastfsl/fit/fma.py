"""Flow Matching Alignment as an estimator on arrays, with scikit-learn's habits."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastfsl.arrays import check_logit_scale, check_width, logit_scale_of, unit_rows, unit_views
from fastfsl.devices import resolve_device
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.flow_training import FlowRecipe, Precision, Warmup, train_velocity_field
from fastfsl.fit.prototypes import assign_prototypes
from fastfsl.fit.selection import StepSelection, class_targets, select_num_steps
from fastfsl.flow.early_exit import check_exits, euler_early_exit
from fastfsl.flow.path import Noise
from fastfsl.flow.plan import FlowPlan, build_plan, plan_states
from fastfsl.flow.readout import check_read_steps, class_logits, normalize, read_out
from fastfsl.flow.solver import Solver, check_solver, check_steps, solver_states
from fastfsl.flow.targets import text_target_frame, text_targets
from fastfsl.flow.velocity_field import VelocityField
from fastfsl.heads import ClassEmbeddings, FromLogits, also_named, match_classes, unit_class_means
from fastfsl.heads.blending import fit_weights

# Far beyond what any flow needs, and few enough for the exported graph, which unrolls them.
MAX_STEPS = 1000

# Fitted tensors beside the field's, each the attribute of that name with an underscore.
_CLASS_TENSORS = ("class_embeddings", "class_targets", "target_shift")
_CENTRE = "target_centre"
_SCALE = "logit_scale"
# A smaller factor means that the logits are wrong about as often as chance, so that no scale is likeliest. The texts'
# bound is higher: a flow also learns from images, which texts that say little cannot speak for.
_LEAST_FACTOR = 1e-3
_LEAST_OF_TEXTS = 0.25


class FlowMatchingAlignment(FromLogits):
    """FMA: a velocity field moves image features toward the text feature of their class in a few Euler steps.

    The defaults are not the published recipe, which `FlowRecipe` has as its own: targets blend text and support, a
    discriminative term is added, and training is short. benchmarks/results/compare_*_paper.json has both side by side.

    Args:
        num_blocks: residual blocks of the velocity field.
        num_steps: Euler steps M to deploy; None chooses M by cross-validation on the support set.
        max_steps: steps that reach the end of the path; the step size is 1 / max_steps.
        epochs: passes over the support set; None: as many as make `updates` updates.
        updates: what `epochs` None aims at.
        batch_size: samples an update.
        learning_rate: AdamW's peak learning rate.
        weight_decay: AdamW's weight decay.
        warmup_epochs: warm-up, before the cosine.
        warmup: `linear`, or as in the `released` code (see `FlowRecipe`).
        noise: path augmentation, `none`, `bridge` (the paper's) or `interpolant` (the released code's).
        noise_scale: its scale.
        times_per_batch: distinct times in a batch, shared among its samples; None draws one for each.
        text_samples: the target of a class is its text and its support together, about the images' mean, the text
            counting as this many samples (`blended_targets`); 0: the support alone; None: the text alone, as published.
        num_prototypes: targets a class, one for each cluster of its support; the nearest one counts. More than one
            needs `text_samples`.
        cross_entropy_weight: weight of the discriminative term (`endpoint_cross_entropy`); 0, as published: none.
        ema_decay: decay of the average over the updates that becomes the weights; None, as published: no average.
        precision: of the products in training, `fp32`, `bf16` or `auto`.
        read_steps: Euler steps whose probabilities are averaged, ascending; the last one is M, and nothing is chosen.
            The released code reads 0, 4, 8. None: the final feature alone.
        solver: `euler`, which is what exports; `heun` or `rk4`, for predictions in torch.
        exit_margin: a sample whose two best probabilities differ by this much takes no further step (in torch; an
            exported flow takes M steps for each).
        exit_velocity: likewise one whose velocity is shorter than this.
        num_folds: cross-validation folds at most.
        logit_scale: factor on the cosine similarities in training, and in predicting with `text_samples` None; None
            means 100.
        seed: seed of everything random.
        device: torch device to train and to predict on, or `auto`.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        num_steps_: the step count in use.
        selection_: how it was chosen (`StepSelection`), with the held-out accuracy by step.
        velocity_field_: the trained `VelocityField`.
        plan_: the `FlowPlan` that `transport` runs and the exporter writes.
        class_embeddings_: the class texts, L2-normalised, (C, d), float32.
        class_targets_: where the flow sends each class, and what it is read out with, L2-normalised, (C, d), or
            (C, K, d) with K prototypes a class, float32.
        logit_scale_: factor on the cosine similarities in predicting: with `text_samples` the likeliest one on
            held-out samples or, at one shot, that of the texts alone.
        target_shift_, target_centre_: what takes the text of another class to its target (`text_targets`), (d,) each;
            the centre is None in runs that were trained before it was kept.
        classes_: the classes, ascending; see `fit`.
        n_features_in_: d.
        train_seconds_: wall-clock time of `fit`.

    Source: FMA (arXiv 2510.14543).
    """

    def __init__(
        self,
        *,
        num_blocks: int = 6,
        num_steps: int | None = None,
        max_steps: int = 10,
        epochs: int | None = None,
        updates: int = 160,
        batch_size: int = 128,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_epochs: int = 1,
        warmup: Warmup = "linear",
        noise: Noise = "none",
        noise_scale: float = 1.0,
        times_per_batch: int | None = 16,
        text_samples: float | None = 8.0,
        num_prototypes: int = 1,
        cross_entropy_weight: float = 0.2,
        ema_decay: float | None = None,
        precision: Precision = "auto",
        read_steps: tuple[int, ...] | None = None,
        solver: Solver = "euler",
        exit_margin: float | None = None,
        exit_velocity: float | None = None,
        num_folds: int = 3,
        logit_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_steps = num_steps
        self.max_steps = max_steps
        self.epochs = epochs
        self.updates = updates
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.warmup = warmup
        self.noise = noise
        self.noise_scale = noise_scale
        self.times_per_batch = times_per_batch
        self.text_samples = text_samples
        self.num_prototypes = num_prototypes
        self.cross_entropy_weight = cross_entropy_weight
        self.ema_decay = ema_decay
        self.precision = precision
        self.read_steps = read_steps
        self.solver = solver
        self.exit_margin = exit_margin
        self.exit_velocity = exit_velocity
        self.num_folds = num_folds
        self.logit_scale = logit_scale
        self.seed = seed
        self.device = device
        self.class_embeddings = class_embeddings

    @also_named(features="X", labels="y")
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        class_embeddings: ClassEmbeddings = None,
        *,
        class_names: Sequence[Any] | None = None,
        plain_features: ArrayLike | None = None,
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Choose the step count on held-out support, then train on all of it.

        Args:
            X: image features, (n, d), or of V augmented views of each image, (n, V, d); any length.
            y: labels, (n,): texts, numbers or bools. Whole numbers in 0 .. C-1 are indices of rows of
                `class_embeddings`; of other labels the rows follow the distinct ones in ascending order.
            class_embeddings: text features, (C, d), any length, or a vector by class; by default the constructor's.
                Without any the support alone decides, as with `text_samples` 0.
            class_names: the class of each row, where neither rule is meant. A class may have no sample.
            plain_features: features of the same images as they will be classified (not augmented), (n, d); they are
                what the step count is chosen on. By default the mean over the views.
            on_stage: called with (name of the stage, epochs done, epochs in all).

        Returns:
            The estimator.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite, a row is zero, or labels and rows cannot be matched.
            ConfigError: if a parameter is out of its range.
        """
        start = time.perf_counter()
        self.check_parameters()
        recipe, step_size = self._recipe(), self._step_size()
        device = resolve_device(self.device)
        views = _on(device, unit_views(X, "features", np.float32))
        texts = self.class_embeddings if class_embeddings is None else class_embeddings
        classes = match_classes(y, len(views), texts, class_names)
        targets = _on(device, classes.labels)
        text_samples = 0.0 if classes.class_embeddings is None else self.text_samples
        if classes.class_embeddings is None:
            means = unit_class_means(views.mean(dim=1).cpu().numpy(), classes.labels, len(classes.names))
            embeddings = _on(device, means.astype(np.float32))
        else:
            embeddings = _on(device, unit_rows(classes.class_embeddings, "class_embeddings", np.float32))
            check_width(views.shape[2], embeddings.shape[1])
        self._keep_columns(X, reset=True)
        if plain_features is None:
            plain = normalize(views.mean(dim=1))
        else:
            plain = _on(device, unit_rows(plain_features, "plain_features", np.float32))
        if plain.shape != (views.shape[0], views.shape[2]):
            raise ShapeError(f"expected plain_features {(views.shape[0], views.shape[2])}, got {tuple(plain.shape)}")

        if self.read_steps is not None:
            selection = StepSelection(num_steps=self.read_steps[-1], rule="fixed")
        elif self.num_steps is None:
            selection = select_num_steps(
                views,
                plain,
                targets,
                embeddings,
                recipe,
                max_steps=self.max_steps,
                step_size=step_size,
                solver=self.solver,
                text_samples=text_samples,
                num_prototypes=self.num_prototypes,
                logit_scale=self._scale(),
                num_folds=self.num_folds,
                seed=self.seed,
                on_stage=on_stage,
            )
        else:
            selection = StepSelection(num_steps=self.num_steps, rule="fixed")
        prototypes = assign_prototypes(views, targets, self.num_prototypes, self.seed)
        class_points = class_targets(views, targets, embeddings, text_samples, prototypes)
        field = train_velocity_field(
            views,
            targets,
            class_points,
            recipe,
            prototypes=prototypes,
            seed=self.seed,
            logit_scale=self._scale(),
            on_epoch=None if on_stage is None else lambda done, total: on_stage("training", done, total),
        )
        shift = centre = torch.zeros_like(embeddings[0])
        if text_samples is not None:
            shift, centre = text_target_frame(normalize(views.mean(dim=1)), targets, embeddings)
        self._adopt(field, embeddings, class_points, shift, centre, selection)
        factor = 1.0 if text_samples is None else self._likeliest_factor(plain, targets, embeddings, text_samples)
        self.logit_scale_ *= factor
        if selection.held_out is not None:
            self.selection_ = replace(selection, held_out=np.float32(factor) * selection.held_out)
        self.classes_ = classes.names
        self.train_seconds_ = time.perf_counter() - start
        return self

    def targets_of(self, class_embeddings: ArrayLike) -> NDArray[np.float32]:
        """Where this flow sends classes that it was not trained on, (C', d): what their features are read out with.

        Args:
            class_embeddings: their text features, (C', d).
        """
        texts = _on(self.class_targets_.device, unit_rows(class_embeddings, "class_embeddings", np.float32))
        return self._to_numpy(text_targets(texts, self.target_shift_, self.target_centre_))

    def transport(self, features: ArrayLike) -> NDArray[np.float32]:
        """Features after `num_steps_` Euler steps, L2-normalised, (n, d)."""
        return self._to_numpy(normalize(self._states(features)[-1]))

    @also_named(features="X")
    def logits(self, X: ArrayLike) -> NDArray[np.float32]:
        """Logits, (n, C): logit scale times cosine similarity of the transported features (`read_out`)."""
        return self._to_numpy(self._logits(X))

    @property
    def num_parameters_(self) -> int:
        """Trained parameters of the velocity field."""
        return sum(parameter.numel() for parameter in self.velocity_field_.parameters())

    def selection_record(self) -> dict[str, Any]:
        """How the step count was chosen, as JSON values."""
        return self.selection_.record()

    def state(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays by name: what `restore` needs beside the parameters and the selection."""
        tensors = {f"velocity_field.{name}": value for name, value in self.velocity_field_.state_dict().items()}
        tensors |= {name: getattr(self, f"{name}_") for name in _CLASS_TENSORS}
        if self.target_centre_ is not None:
            tensors[_CENTRE] = self.target_centre_
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        arrays[_SCALE] = np.array([self.logit_scale_])
        return arrays | self._class_state()

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the estimator fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: if they are not those of a field with this estimator's parameters.
        """
        prefix = "velocity_field."
        try:
            selection = StepSelection.from_record(record)
            embeddings, points, shift = (torch.from_numpy(state[name]) for name in _CLASS_TENSORS)
            with torch.device("meta"):  # nothing is drawn for weights that are replaced at once
                field = VelocityField(embeddings.shape[1], self.num_blocks)
            field.load_state_dict(
                {name.removeprefix(prefix): torch.from_numpy(value) for name, value in state.items() if prefix in name},
                assign=True,
            )
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise DataError(f"expected the tensors of an FMA run, got others ({error}): train it again") from error
        if (points.ndim > 2) != (self.num_prototypes > 1):
            raise DataError(f"expected num_prototypes {self.num_prototypes}, got other targets: train it again")
        if selection.accuracy_by_step and len(selection.accuracy_by_step) != self.max_steps + 1:
            raise DataError(
                f"expected accuracy_by_step of {self.max_steps + 1} steps, got {len(selection.accuracy_by_step)}: "
                "train it again"
            )
        device = resolve_device(self.device)
        field = field.to(device).eval().requires_grad_(False)
        centre = torch.from_numpy(state[_CENTRE]).to(device) if _CENTRE in state else None
        self._adopt(field, embeddings.to(device), points.to(device), shift.to(device), centre, selection)
        if _SCALE in state:
            self.logit_scale_ = float(state[_SCALE][0])
        self._restore_classes(state, len(points))
        return self

    def _adopt(
        self,
        field: VelocityField,
        embeddings: Tensor,
        points: Tensor,
        shift: Tensor,
        centre: Tensor | None,
        selection: StepSelection,
    ) -> None:
        self.velocity_field_ = field
        self.class_embeddings_, self.class_targets_ = embeddings, points
        self.target_shift_, self.target_centre_ = shift, centre
        self.selection_ = selection
        self.num_steps_ = selection.num_steps
        self.logit_scale_ = self._scale()
        self.plan_: FlowPlan = build_plan(field, selection.num_steps, self._step_size())
        self.read_steps_ = self.read_steps or (selection.num_steps,)
        self.n_features_in_ = embeddings.shape[1]

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does.

        Raises:
            ConfigError: naming the parameter.
        """
        self._recipe()
        self._step_size()
        check_logit_scale(self.logit_scale)

    def _recipe(self) -> FlowRecipe:
        return FlowRecipe(**{field.name: getattr(self, field.name) for field in fields(FlowRecipe)})

    def _likeliest_factor(self, plain: Tensor, labels: Tensor, texts: Tensor, text_samples: float) -> float:
        """The factor on the logits that maximises the likelihood of labels they were not fitted to; 1 if there is none.

        These are the logits of held-out samples or, at one shot, those of the texts alone if they say enough.
        """
        if self.selection_.held_out is not None:
            logits, least = self.selection_.held_out.astype(np.float64), _LEAST_FACTOR
        elif self.selection_.rule == "default" and text_samples > 0:
            points = text_targets(texts, self.target_shift_, self.target_centre_)
            logits, least = class_logits(plain, points, self.logit_scale_).double().cpu().numpy(), _LEAST_OF_TEXTS
        else:
            return 1.0
        rows = np.isfinite(logits).all(axis=1)
        factor = float(fit_weights(logits[None, rows], labels.cpu().numpy()[rows], np.ones(1))[0])
        return factor if factor > least else 1.0

    def _step_size(self) -> float:
        if not 1 <= self.max_steps <= MAX_STEPS:
            raise ConfigError(f"expected max_steps in 1..{MAX_STEPS}, got {self.max_steps}")
        if self.num_folds < 2:
            raise ConfigError(
                f"expected num_folds >= 2, got {self.num_folds}: set num_steps to do without cross-validation"
            )
        if self.num_steps is not None:
            check_steps(self.num_steps, 1.0 / self.max_steps)
        if self.read_steps is not None:
            check_read_steps(self.read_steps, self.max_steps)
            if self.num_steps not in (None, self.read_steps[-1]):
                raise ConfigError(
                    f"expected num_steps to be the last of read_steps {self.read_steps}, got {self.num_steps}: leave "
                    "num_steps out"
                )
        if self.num_prototypes < 1 or (self.num_prototypes > 1 and self.text_samples is None):
            raise ConfigError(
                f"expected num_prototypes >= 1, and text_samples if more than one, got {self.num_prototypes} and "
                f"{self.text_samples}: a text alone is one target"
            )
        check_solver(self.solver)
        check_exits(self.exit_margin, self.exit_velocity)
        if self._exits() and (self.solver != "euler" or self.read_steps is not None):
            raise ConfigError(
                f"expected solver 'euler' and no read_steps with an early exit, got {self.solver!r} and "
                f"{self.read_steps}: leave out exit_margin and exit_velocity"
            )
        if self.text_samples is not None and not self.text_samples >= 0:
            raise ConfigError(f"expected text_samples >= 0, or none for the text alone, got {self.text_samples}")
        return 1.0 / self.max_steps

    def _exits(self) -> bool:
        return self.exit_margin is not None or self.exit_velocity is not None

    def _scale(self) -> float:
        """Factor on the cosine similarities in training."""
        return float(logit_scale_of(self.logit_scale))

    def _logits(self, features: ArrayLike) -> Tensor:
        with torch.inference_mode():
            return read_out(self._states(features), self.class_targets_, self.logit_scale_)

    def _states(self, features: ArrayLike) -> list[Tensor]:
        """The states that are read out, each (n, d)."""
        self._check_fitted()
        rows = unit_rows(features, "features", np.float32)
        self._keep_columns(features, reset=False)
        self._check_width(rows.shape[1])
        x_0 = _on(self.class_targets_.device, rows)
        steps = (self.num_steps_, self.plan_.step_size)
        with torch.inference_mode():
            if self._exits():
                exited, _ = euler_early_exit(
                    self.velocity_field_,
                    x_0,
                    *steps,
                    self.class_targets_,
                    self.logit_scale_,
                    margin=self.exit_margin,
                    velocity_norm=self.exit_velocity,
                )
                return [exited]
            if self.solver == "euler":
                return plan_states(self.plan_, x_0, self.read_steps_)
            states = list(solver_states(self.velocity_field_, x_0, *steps, self.solver))
            return [states[step] for step in self.read_steps_]

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.cpu().numpy()
        return array


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(device)
