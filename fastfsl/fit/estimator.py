"""What every method is: an estimator on arrays, with scikit-learn's habits."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Called with (name of the stage, units done, units in all).
StageCallback = Callable[[str, int, int], None]


class Estimator(Protocol):
    """The contract that training, comparison, runs and export rely on.

    Attributes:
        classes_: 0 .. C-1.
        train_seconds_: wall-clock time of `fit`.
    """

    classes_: NDArray[np.int64]
    train_seconds_: float

    def fit(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        class_embeddings: ArrayLike,
        *,
        plain_features: ArrayLike | None = None,
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Fit on a support set; choose what is to be chosen on it alone.

        Args:
            features: image features, (n, d), or of V augmented views of each image, (n, V, d); any length.
            labels: class indices, (n,), rows of `class_embeddings`.
            class_embeddings: text features, (C, d); any length.
            plain_features: features of the same images as they will be classified (not augmented), (n, d).
            on_stage: hears of progress.
        """
        ...

    def decision_function(self, features: ArrayLike) -> NDArray[Any]:
        """Logits, (n, C)."""
        ...

    def predict_proba(self, features: ArrayLike) -> NDArray[Any]:
        """Class probabilities, (n, C)."""
        ...

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """Class indices, (n,)."""
        ...

    def score(self, features: ArrayLike, labels: ArrayLike) -> float:
        """Accuracy, fraction."""
        ...

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002  # scikit-learn's signature
        """The constructor's parameters."""
        ...

    @property
    def num_parameters_(self) -> int:
        """Numbers that the fit determined."""
        ...

    def selection_record(self) -> dict[str, Any]:
        """How settings were chosen, as JSON values; NaN as None."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays by name."""
        ...

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the estimator fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: they are not those of an estimator with these parameters.
        """
        ...
