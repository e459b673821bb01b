"""What a method may do before an estimator sees features: tune the encoder, or the texts of the classes.

A source takes an encoder and the support images and leaves another encoder and other class embeddings. Read out with
these it is a method by itself; any estimator on features may come after it.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fastfsl.encoders import Augmentation, Encoder, class_embeddings
from fastfsl.errors import ConfigError, DataError
from fastfsl.fit.batches import Batches, FeatureBatches, ImageBatches
from fastfsl.fit.checkpoint import Checkpoint
from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.objective import Objective
from fastfsl.fit.tuning import Precision, Schedule, TuningRecipe, tune

Templates = str | Sequence[str]

# Between two states of a training on the disk: of a large model they are hundreds of megabytes.
CHECKPOINT_SECONDS = 30.0


class Tuned(Objective, Protocol):
    """An objective, and what is left of it after the training."""

    def tuned_encoder(self) -> Encoder:
        """The encoder with what was trained."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """The trained tensors by name."""
        ...

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take trained tensors.

        Raises:
            DataError: they do not fit.
        """
        ...

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        ...


@dataclass(frozen=True)
class ClassTexts:
    """The classes as an encoder reads them.

    Attributes:
        names: C class names.
        templates: their prompts, as for `class_embeddings`.
        embeddings: of the frozen encoder, L2-normalised, (C, d).
    """

    names: tuple[str, ...]
    templates: Templates
    embeddings: NDArray[np.float32]


@dataclass(frozen=True)
class SourceSupport:
    """What a source is trained on.

    Attributes:
        encoder: frozen, on the device of the training.
        texts: the classes.
        paths: n support images.
        labels: class indices, (n,).
        digests: SHA-256 of the images.
        augmentation: how views vary.
        features: called for the frozen encoder's unit features of the images as they are (n, d) and of their cached
            views (n, V, d).
    """

    encoder: Encoder
    texts: ClassTexts
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    digests: tuple[str, ...]
    augmentation: Augmentation
    features: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]

    def part(self, index: NDArray[np.int64]) -> "SourceSupport":
        """The support with these images alone."""

        def features() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            plain, views = self.features()
            return plain[index], views[index]

        return SourceSupport(
            self.encoder,
            self.texts,
            tuple(self.paths[i] for i in index),
            self.labels[index],
            tuple(self.digests[i] for i in index),
            self.augmentation,
            features,
        )


@dataclass(kw_only=True)
class Source(ABC):
    """The options that all sources have, and their training.

    Attributes:
        epochs: passes over the support; None: as published (see the source).
        batch_size: images an update; None: as published (see the source).
        learning_rate: after `warmup_epochs` at a small constant rate, then half a cosine.
        schedule: what the cosine moves by, `epoch` or `update` (see `TuningRecipe.rate_at`).
        final_rate: where the cosine leads to.
        weight_decay: the optimizer's.
        warmup_epochs: length of the warm-up.
        precision: of the products, `fp32`, `bf16`, `fp16` (CUDA only) or `auto`.
        drop_last: whether the last batch of an epoch is left out where it is smaller; the only one never is.
        micro_batch: images computed at once; None: the batch. Losses over the whole batch stay exactly those.
        seed: of everything random.
        class_embeddings_: what the tuned encoder is read out with, L2-normalised, (C, d).
        num_parameters_: trained numbers.
        fit_seconds_: wall-clock time of `fit`.
        train_seconds_: the same, and the time of what an interrupted one had done before.
        history_: losses by epoch.
    """

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float = 0.002
    schedule: Schedule = "epoch"
    final_rate: float = 0.0
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    drop_last: bool = True
    precision: Precision = "auto"
    micro_batch: int | None = None
    seed: int = 0
    class_embeddings_: NDArray[np.float32] = field(init=False, repr=False)
    num_parameters_: int = field(init=False, repr=False)
    fit_seconds_: float = field(init=False, repr=False)
    train_seconds_: float = field(init=False, repr=False)
    history_: list[dict[str, Any]] = field(init=False, repr=False)
    _state: dict[str, NDArray[Any]] = field(init=False, repr=False)

    takes: ClassVar[Literal["pixels", "features"]]
    # Whether the features' length belongs to the logits when nothing but the class embeddings reads them.
    blended: ClassVar[bool] = False
    # Whether each image has class embeddings of its own, so that there is no fixed classifier to deploy.
    conditional: ClassVar[bool] = False
    num_views: ClassVar[int] = 1
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "sgd"
    published_batch_size: ClassVar[int] = 32
    # Least and greatest area of a view where the user names none; None: that of `Augmentation`.
    view_scale: ClassVar[tuple[float, float] | None] = None

    def __post_init__(self) -> None:
        """Refuse values no training can be done with."""
        self._recipe(1 if self.epochs is None else self.epochs)

    @abstractmethod
    def objective(self, encoder: Encoder, texts: ClassTexts) -> Tuned:
        """The untrained objective around an encoder."""

    @abstractmethod
    def num_epochs(self, num_samples: int, num_classes: int) -> int:
        """Passes over that many images of that many classes where `epochs` is None."""

    @property
    def images_at_once(self) -> int:
        """Images an update."""
        return self.published_batch_size if self.batch_size is None else self.batch_size

    def embeddings_of(self, objective: Tuned, support: SourceSupport) -> NDArray[np.float32]:  # noqa: ARG002  # for others
        """Class embeddings after the training, (C, d): by default the frozen ones."""
        return support.texts.embeddings

    def recipe(self, num_samples: int, num_classes: int) -> TuningRecipe:
        """How that many images of that many classes are trained on."""
        return self._recipe(self.num_epochs(num_samples, num_classes) if self.epochs is None else self.epochs)

    def _recipe(self, epochs: int) -> TuningRecipe:
        return TuningRecipe(
            epochs=epochs,
            batch_size=self.images_at_once,
            num_views=self.num_views,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            final_rate=self.final_rate,
            weight_decay=self.weight_decay,
            warmup_epochs=min(self.warmup_epochs, epochs - 1),  # one epoch of warm-up alone trains nothing
            precision=self.precision,
            micro_batch=self.micro_batch,
        )

    def fit(
        self,
        support: SourceSupport,
        *,
        on_stage: StageCallback | None = None,
        on_warning: Callable[[str], None] | None = None,
        checkpoints: Path | None = None,
    ) -> Self:
        """Train on the support, choosing on it what is to be chosen.

        Args:
            support: images, classes, encoder.
            on_stage: hears of progress.
            on_warning: hears what the user should know.
            checkpoints: folder to go on from and to keep the training's progress in; None: nothing is kept.

        Raises:
            ConfigError: the encoder has no place for this source, or the training diverges.
        """
        if self.takes == "features":
            support.features()  # encoding is not training
        start = time.perf_counter()
        objective = self._fit(support, on_stage or _silent, on_warning or _silent_warning, checkpoints)
        self.class_embeddings_ = self.embeddings_of(objective, support)
        self._state = objective.state()
        self.num_parameters_ = objective.num_parameters
        seconds = sum(float(epoch["seconds"]) for epoch in self.history_)
        self.fit_seconds_ = time.perf_counter() - start
        self.train_seconds_ = max(self.fit_seconds_, seconds)
        return self

    def _fit(
        self,
        support: SourceSupport,
        on_stage: StageCallback,
        on_warning: Callable[[str], None],
        checkpoints: Path | None,
    ) -> Tuned:
        objective, self.history_ = self.trained(support, on_stage, on_warning, checkpoints)
        return objective

    def trained(
        self,
        support: SourceSupport,
        on_stage: StageCallback,
        on_warning: Callable[[str], None],
        checkpoints: Path | None,
        *,
        name: str = "tuning",
        evaluate: Callable[[Tuned, int], dict[str, Any] | None] | None = None,
    ) -> tuple[Tuned, list[dict[str, Any]]]:
        """One training with the options as they are: the objective and its history."""
        encoder = support.encoder
        recipe = self.recipe(len(support.labels), len(support.texts.names))
        with torch.random.fork_rng(devices=[encoder.device] if encoder.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            objective = self.objective(encoder, support.texts)
        checkpoint = None
        if checkpoints is not None:
            fingerprint = {
                "source": type(self).__name__,
                "options": self.options(),
                "recipe": asdict(recipe),
                "encoder": encoder.digest,
                "preprocessing": encoder.preprocessing.to_dict(),
                "cached_views": support.features()[1].shape[1] if self.takes == "features" else None,
                "augmentation": support.augmentation.to_dict(),
                "classes": list(support.texts.names),
                "templates": support.texts.templates
                if isinstance(support.texts.templates, str)
                else list(support.texts.templates),
                "images": list(support.digests),
                "labels": support.labels.tolist(),
            }
            checkpoint = Checkpoint(checkpoints / name, fingerprint, interval=CHECKPOINT_SECONDS, on_message=on_warning)
        history = tune(
            objective,
            self._batches(support, recipe),
            recipe,
            seed=self.seed,
            device=encoder.device,
            checkpoint=checkpoint,
            on_epoch=lambda done, total: on_stage(name, done, total),
            on_log=on_warning,
            evaluate=None if evaluate is None else lambda epoch: evaluate(objective, epoch),
        )
        return objective, history

    def _batches(self, support: SourceSupport, recipe: TuningRecipe) -> Batches:
        if self.takes == "pixels":
            return ImageBatches(
                support.paths,
                support.labels,
                support.encoder.preprocessing,
                support.augmentation,
                num_views=recipe.num_views,
                batch_size=recipe.batch_size,
                seed=self.seed,
                drop_last=self.drop_last,
            )
        _, views = support.features()
        return FeatureBatches(
            views,
            support.labels,
            num_views=recipe.num_views,
            batch_size=recipe.batch_size,
            seed=self.seed,
            drop_last=self.drop_last,
        )

    def restored_objective(self, encoder: Encoder, texts: ClassTexts) -> Tuned:
        """The trained objective around a freshly loaded encoder.

        Raises:
            DataError: what was trained does not fit this encoder.
        """
        objective = self.objective(encoder, texts)
        objective.load_state(self._state)
        return objective

    def tuned(self, encoder: Encoder, texts: ClassTexts) -> Encoder:
        """The encoder with what was trained."""
        return self.restored_objective(encoder, texts).tuned_encoder()

    def embeddings_for(self, encoder: Encoder, texts: ClassTexts) -> NDArray[np.float32]:
        """Class embeddings (C, d) of other classes, which the training did not see: by default as the prompts say.

        Not of a `conditional` source, which has none without images.

        Args:
            encoder: as it was before the training.
            texts: the other classes.
        """
        return class_embeddings(self.tuned(encoder, texts), texts.names, texts.templates)

    def conditional_logits(
        self, encoder: Encoder, texts: ClassTexts, features: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Logits (n, C) of unit features (n, d), each by its own class embeddings; of a `conditional` source alone.

        Raises:
            ConfigError: the source has class embeddings for all images.
        """
        del encoder, texts, features
        raise ConfigError(f"the class embeddings of {type(self).__name__} do not depend on the image")

    def options(self) -> dict[str, Any]:
        """The constructor's parameters."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init}

    def selection_record(self) -> dict[str, Any]:
        """What was chosen on the support, and the losses by epoch, as JSON values."""
        return {"history": self.history_}

    def state(self) -> dict[str, NDArray[Any]]:
        """The trained arrays and the class embeddings by name."""
        return {**self._state, _CLASSES: self.class_embeddings_}

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the source fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: the class embeddings are missing.
        """
        if _CLASSES not in state:
            raise DataError(f"expected the array {_CLASSES} of a tuned encoder, it is missing: train it again")
        self._state = {name: array for name, array in state.items() if name != _CLASSES}
        self.class_embeddings_ = state[_CLASSES]
        self.num_parameters_ = sum(array.size for array in self._state.values())
        self.history_ = list(record.get("history", []))
        return self


_CLASSES = "class_embeddings"


def _silent(name: str, done: int, total: int) -> None:
    """Say nothing."""


def _silent_warning(message: str) -> None:
    """Say nothing."""


def check_weight(name: str, value: float) -> None:
    """Refuse a weight below 0.

    Raises:
        ConfigError: naming the option.
    """
    if not (np.isfinite(value) and value >= 0):
        raise ConfigError(f"expected {name} >= 0, got {value}")
