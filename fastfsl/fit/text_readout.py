"""Reading out a tuned encoder with the class embeddings that it was tuned to, and nothing else."""

import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from fastfsl.arrays import check_labels, check_width, numbers, unit_rows, unit_views
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.estimator import StageCallback
from fastfsl.heads import FromLogits, LinearForm


class TextReadout(FromLogits, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """logits = s · x Tᵀ of features x as they are: a blend of two encoders' features carries meaning in its length.

    Args:
        normalized: take the features at unit length, as of an ordinary encoder.
        logit_scale: s, exp of CLIP's learned temperature; None means 100.

    Attributes:
        form_: the linear form, all that a deployment needs.
        classes_: 0 .. C-1.
        train_seconds_: wall-clock time of `fit`.

    Source: CLIP (arXiv 2103.00020); for the blend MPS-Tuning (arXiv 2508.12877).
    """

    form_: LinearForm

    def __init__(self, *, normalized: bool = True, logit_scale: float | None = None) -> None:
        self.normalized = normalized
        self.logit_scale = logit_scale

    def fit(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        class_embeddings: ArrayLike,
        *,
        plain_features: ArrayLike | None = None,  # noqa: ARG002  # every estimator takes them
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Keep the class embeddings; the support is checked and not used.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite or a label names no class.
        """
        start = time.perf_counter()
        embeddings = unit_rows(class_embeddings, "class_embeddings")
        views = unit_views(features, "features")
        check_labels(labels, len(views), len(embeddings))
        check_width(views.shape[2], embeddings.shape[1])
        scale = 100.0 if self.logit_scale is None else self.logit_scale
        self.form_ = LinearForm(scale * embeddings, np.zeros(len(embeddings)))
        self.classes_ = np.arange(len(embeddings))
        if on_stage is not None:
            on_stage("fitting", 1, 1)
        self.train_seconds_ = time.perf_counter() - start
        return self

    def decision_function(self, features: ArrayLike) -> NDArray[Any]:
        """Logits, (rows, C), of image features (rows, d)."""
        if not hasattr(self, "form_"):
            raise ConfigError("this TextReadout is not fitted: call fit first")
        rows = unit_rows(features, "features") if self.normalized else numbers(features, "features")
        if rows.ndim != 2 or rows.shape[1] != self.form_.weight.shape[1]:
            raise ShapeError(
                f"expected features (rows, {self.form_.weight.shape[1]}), got {rows.shape}: use the encoder that the "
                "class embeddings came from"
            )
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
        return self.form_.state()

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:  # noqa: ARG002  # see fit
        """Make the estimator fitted again from `state()`.

        Raises:
            DataError: it is another estimator's.
        """
        if set(state) != {"weight", "bias"} or state["weight"].ndim != 2:
            raise DataError(f"expected the arrays weight and bias, got {sorted(state)}: train it again")
        self.form_ = LinearForm(state["weight"], state["bias"])
        self.classes_ = np.arange(len(state["weight"]))
        return self
