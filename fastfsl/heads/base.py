"""What all heads have in common: checking, fitting in a canonical order, and prediction through the form."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator

from fastfsl.arrays import check_labels, unit_rows
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.heads.blending import Selection
from fastfsl.heads.folds import Folds, make_folds
from fastfsl.heads.form import Array, KernelForm, LinearForm, form_from_state
from fastfsl.heads.support import Support, check_support


class FromLogits(ABC):
    """Probabilities, predictions and accuracy of an estimator that gives logits.

    Attributes:
        classes_: 0 .. C-1.
    """

    classes_: NDArray[np.int64]

    @abstractmethod
    def decision_function(self, features: ArrayLike) -> NDArray[Any]:
        """Logits, (rows, C), of image features (rows, d) of any length."""

    def predict_proba(self, features: ArrayLike) -> Array:
        """Class probabilities, (rows, C): softmax of the logits."""
        probabilities: Array = softmax(self.decision_function(features), axis=1)
        return probabilities

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """The most probable class, (rows,)."""
        predicted: NDArray[np.int64] = self.decision_function(features).argmax(axis=1)
        return predicted

    def score(self, features: ArrayLike, labels: ArrayLike) -> float:
        """Accuracy, fraction."""
        predicted = self.predict(features)
        return float((predicted == check_labels(labels, len(predicted), len(self.classes_))).mean())


class Head(FromLogits, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """A classifier on frozen unit features, fitted on a support set and read out through `form_`.

    Attributes:
        form_: `LinearForm` or `KernelForm`, all that a deployment needs.
        selection_: how settings and weights were chosen (`Selection`).
        classes_: 0 .. C-1.
        train_seconds_: wall-clock time of `fit`.
    """

    form_: LinearForm | KernelForm
    selection_: Selection
    logit_scale: float | None = None
    num_folds: int = 4
    seed: int = 0

    def fit(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        class_embeddings: ArrayLike,
        *,
        plain_features: ArrayLike | None = None,
        on_stage: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Choose settings and weights on held-out support, then fit on all of it. The samples' order is irrelevant.

        Args:
            features: image features, (n, d), or of V augmented views of each image, (n, V, d); any length. A sample's
                support vector is the renormalised mean of its views.
            labels: class indices, (n,), rows of `class_embeddings`; every class has a sample.
            class_embeddings: text features, (C, d); any length.
            plain_features: features of the same images as they will be classified (not augmented), (n, d): what
                held-out samples are judged by. By default their support vectors.
            on_stage: called with (name of the stage, units done, units in all).

        Returns:
            The estimator.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite, a row is zero, a label names no class or a class has no sample.
            ConfigError: if a parameter is out of its range.
        """
        start = time.perf_counter()
        self.fit_support(check_support(features, labels, class_embeddings, plain_features))
        if on_stage is not None:
            on_stage("fitting", 1, 1)
        self.train_seconds_ = time.perf_counter() - start
        return self

    def fit_support(self, support: Support) -> Self:
        """`fit` on arrays that are checked already."""
        start = time.perf_counter()
        self._check_parameters()
        self.form_, self.selection_ = self._fit(support)
        self.classes_ = np.arange(support.num_classes)
        self.train_seconds_ = time.perf_counter() - start
        return self

    def decision_function(self, features: ArrayLike) -> Array:
        """Logits, (rows, C), of image features (rows, d) of any length."""
        if not hasattr(self, "form_"):
            raise ConfigError(f"this {type(self).__name__} is not fitted: call fit first")
        rows = unit_rows(features, "features")
        linear = self.form_.linear if isinstance(self.form_, KernelForm) else self.form_
        if rows.shape[1] != linear.weight.shape[1]:
            raise ShapeError(
                f"expected features of width {linear.weight.shape[1]}, got {rows.shape[1]}: "
                "use the encoder that the support came from"
            )
        return self.form_.apply(rows)

    @property
    def num_parameters_(self) -> int:
        """Numbers that the fit determined."""
        return self.form_.num_parameters

    def selection_record(self) -> dict[str, Any]:
        """How settings and weights were chosen, as JSON values."""
        return self.selection_.record()

    def state(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays by name."""
        return self.form_.state()

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the estimator fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: they are not a head's.
        """
        self.form_ = form_from_state(state)
        try:
            self.selection_ = Selection.from_record(record)
        except TypeError as error:
            raise DataError(f"expected the selection of a head, got another ({error}): train it again") from error
        self.classes_ = np.arange(len(state["weight"]))
        return self

    @abstractmethod
    def _fit(self, support: Support) -> tuple[LinearForm | KernelForm, Selection]:
        """The fitted form and how it was chosen."""

    def _check_parameters(self) -> None:
        scale = self._scale()
        if not (np.isfinite(scale) and scale > 0):
            raise ConfigError(f"expected a positive logit_scale, got {scale}")
        if self.num_folds < 2:
            raise ConfigError(f"expected num_folds >= 2, got {self.num_folds}: one part is held out, the rest trains")

    def _scale(self) -> float:
        return 100.0 if self.logit_scale is None else self.logit_scale

    def _folds(self, support: Support) -> Folds:
        return make_folds(support, self.num_folds, self.seed)


def check_grid(name: str, values: tuple[float, ...]) -> None:
    """Refuse a grid that is empty or has a value that is not positive.

    Raises:
        ConfigError: naming the parameter.
    """
    if not values or not all(np.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"expected {name} to be one or more positive numbers, got {values}")
