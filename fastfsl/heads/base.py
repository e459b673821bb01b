"""What all heads have in common: checking, fitting in a canonical order, and prediction through the form."""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.arrays import check_logit_scale, logit_scale_of, unit_rows
from fastfsl.errors import ConfigError, DataError
from fastfsl.heads.blending import Selection
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds, make_folds
from fastfsl.heads.form import Array, KernelForm, LinearForm, form_from_state
from fastfsl.heads.from_logits import FromLogits, also_named
from fastfsl.heads.support import Support, check_support


class Head(FromLogits):
    """A classifier on frozen unit features, fitted on a support set and read out through `form_`.

    `class_embeddings` may be given to the constructor or to `fit`. Without any there is no zero-shot prior: the support
    alone decides (in `ZeroShot` the class means stand for the texts).

    Attributes:
        form_: `LinearForm` or `KernelForm`, all that a deployment needs.
        selection_: how settings and weights were chosen (`Selection`).
        classes_: the classes, ascending; see `fit`.
        n_features_in_: width of the features.
        train_seconds_: wall-clock time of `fit`.
    """

    form_: LinearForm | KernelForm
    selection_: Selection
    logit_scale: float | None = None
    num_folds: int = 4
    seed: int = 0

    @also_named(features="X", labels="y")
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        class_embeddings: ClassEmbeddings = None,
        *,
        class_names: Sequence[Any] | None = None,
        plain_features: ArrayLike | None = None,
        on_stage: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Choose settings and weights on held-out support, then fit on all of it. The samples' order is irrelevant.

        Args:
            X: image features, (n, d), or of V augmented views of each image, (n, V, d); any length. A sample's
                support vector is the renormalised mean of its views.
            y: labels, (n,): texts, numbers or bools. Whole numbers in 0 .. C-1 are indices of rows of
                `class_embeddings`; of other labels the rows follow the distinct ones in ascending order.
            class_embeddings: text features, (C, d), any length, or a vector by class; by default the constructor's.
            class_names: the class of each row, where neither rule is meant. A class that is named may have no sample,
                as in a fold of cross-validation: its text stands in (`check_support`).
            plain_features: features of the same images as they will be classified (not augmented), (n, d): what
                held-out samples are judged by. By default their support vectors.
            on_stage: called with (name of the stage, units done, units in all).

        Returns:
            The estimator.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite, a row is zero, labels and rows cannot be matched or a class has no
                sample.
            ConfigError: if a parameter is out of its range.
        """
        start = time.perf_counter()
        texts = self.class_embeddings if class_embeddings is None else class_embeddings
        support = check_support(X, y, texts, plain_features, class_names)
        self._keep_columns(X, reset=True)
        self.fit_support(support)
        if on_stage is not None:
            on_stage("fitting", 1, 1)
        self.train_seconds_ = time.perf_counter() - start
        return self

    def fit_support(self, support: Support) -> Self:
        """`fit` on arrays that are checked already."""
        start = time.perf_counter()
        self.check_parameters()
        self.form_, self.selection_ = self._fit(support)
        self.n_features_in_ = support.features.shape[1]
        self.classes_ = support.given.names
        self.train_seconds_ = time.perf_counter() - start
        return self

    @also_named(features="X")
    def logits(self, X: ArrayLike) -> Array:
        """Logits, (rows, C), of image features (rows, d) of any length."""
        self._check_fitted()
        rows = unit_rows(X, "features")
        self._keep_columns(X, reset=False)
        self._check_width(rows.shape[1])
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
        return {**self.form_.state(), **self._class_state()}

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
        num_classes, self.n_features_in_ = state["weight"].shape
        self._restore_classes(state, num_classes)
        return self

    @abstractmethod
    def _fit(self, support: Support) -> tuple[LinearForm | KernelForm, Selection]:
        """The fitted form and how it was chosen."""

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does.

        Raises:
            ConfigError: naming the parameter.
        """
        check_logit_scale(self.logit_scale)
        if self.num_folds < 2:
            raise ConfigError(f"expected num_folds >= 2, got {self.num_folds}: one part is held out, the rest trains")

    def _scale(self) -> float:
        return logit_scale_of(self.logit_scale)

    def _folds(self, support: Support) -> Folds:
        return make_folds(support, self.num_folds, self.seed)


def check_grid(name: str, values: tuple[float, ...]) -> None:
    """Refuse a grid that is empty or has a value that is not positive.

    Raises:
        ConfigError: naming the parameter.
    """
    if not values or not all(np.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"expected {name} to be one or more positive numbers, got {values}")
