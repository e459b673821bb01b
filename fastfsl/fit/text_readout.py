"""Reading out a tuned encoder with the class embeddings that it was tuned to, and nothing else."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.arrays import check_logit_scale, check_width, numbers, unit_rows, unit_views
from fastfsl.errors import DataError, ShapeError
from fastfsl.fit.estimator import StageCallback
from fastfsl.heads import ClassEmbeddings, FromLogits, LinearForm, also_named, match_classes, unit_class_means


class TextReadout(FromLogits):
    """logits = s · x Tᵀ of features x as they are: a blend of two encoders' features carries meaning in its length.

    Args:
        normalized: take the features at unit length, as of an ordinary encoder.
        logit_scale: s, exp of CLIP's learned temperature; None means 100.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        form_: the linear form, all that a deployment needs.
        classes_: the classes, ascending; see `fit`.
        n_features_in_: d.
        train_seconds_: wall-clock time of `fit`.

    Source: CLIP (arXiv 2103.00020); for the blend MPS-Tuning (arXiv 2508.12877).
    """

    form_: LinearForm

    def __init__(
        self, *, normalized: bool = True, logit_scale: float | None = None, class_embeddings: ClassEmbeddings = None
    ) -> None:
        self.normalized = normalized
        self.logit_scale = logit_scale
        self.class_embeddings = class_embeddings

    def check_parameters(self) -> None:
        """Refuse a logit scale that is none, as `fit` does.

        Raises:
            ConfigError: it is not a positive number.
        """
        check_logit_scale(self.logit_scale)

    @also_named(features="X", labels="y")
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        class_embeddings: ClassEmbeddings = None,
        *,
        class_names: Sequence[Any] | None = None,
        plain_features: ArrayLike | None = None,  # noqa: ARG002  # every estimator takes them
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Keep the class embeddings; the support is checked, and used where there are none: its means stand for them.

        Args:
            X: image features, (n, d) or (n, V, d).
            y: labels, (n,), as for every estimator (`Head.fit`).
            class_embeddings: text features, (C, d), any length, or a vector by class; by default the constructor's.
            class_names: the class of each row, where neither rule for `y` is meant.
            plain_features: not used.
            on_stage: called with (name of the stage, units done, units in all).

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite or labels and rows cannot be matched.
        """
        start = time.perf_counter()
        views = unit_views(X, "features")
        texts = self.class_embeddings if class_embeddings is None else class_embeddings
        classes = match_classes(y, len(views), texts, class_names)
        if classes.class_embeddings is None:
            embeddings = unit_class_means(views.mean(axis=1), classes.labels, len(classes.names))
        else:
            embeddings = unit_rows(classes.class_embeddings, "class_embeddings")
        check_width(views.shape[2], embeddings.shape[1])
        scale = check_logit_scale(self.logit_scale)
        self._keep_columns(X, reset=True)
        self.form_ = LinearForm(scale * embeddings, np.zeros(len(embeddings)))
        self.n_features_in_ = embeddings.shape[1]
        self.classes_ = classes.names
        if on_stage is not None:
            on_stage("fitting", 1, 1)
        self.train_seconds_ = time.perf_counter() - start
        return self

    @also_named(features="X")
    def logits(self, X: ArrayLike) -> NDArray[Any]:
        """Logits, (rows, C), of image features (rows, d)."""
        self._check_fitted()
        rows = unit_rows(X, "features") if self.normalized else numbers(X, "features")
        if rows.ndim != 2:
            raise ShapeError(
                f"expected features (rows, {self.n_features_in_}), got {rows.shape}. Reshape your data: one sample is "
                "features[None]"
            )
        self._keep_columns(X, reset=False)
        self._check_width(rows.shape[1])
        return self.form_.apply(rows)

    @property
    def num_parameters_(self) -> int:
        """None of these numbers is fitted here."""
        return 0

    def selection_record(self) -> dict[str, Any]:
        """Nothing is chosen."""
        return {"rule": "fixed"}

    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {**self.form_.state(), **self._class_state()}

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:  # noqa: ARG002  # see fit
        """Make the estimator fitted again from `state()`.

        Raises:
            DataError: it is another estimator's.
        """
        if set(state) - {"classes", "class_names"} != {"weight", "bias"} or state["weight"].ndim != 2:
            raise DataError(f"expected the arrays weight and bias, got {sorted(state)}: train it again")
        self.form_ = LinearForm(state["weight"], state["bias"])
        num_classes, self.n_features_in_ = state["weight"].shape
        self._restore_classes(state, num_classes)
        return self
