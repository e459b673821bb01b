"""What every method is: an estimator on arrays, with scikit-learn's habits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from numpy.typing import ArrayLike, NDArray

from fastfsl.heads.classes import ClassEmbeddings

# Called with (name of the stage, units done, units in all).
StageCallback = Callable[[str, int, int], None]


class Estimator(Protocol):
    """The contract that training, comparison, runs and export rely on.

    Attributes:
        classes_: the classes, ascending.
        train_seconds_: wall-clock time of `fit`.
    """

    classes_: NDArray[Any]
    train_seconds_: float

    def check_parameters(self) -> None:
        """Refuse parameters that `fit` cannot work with, as `fit` does, before there is anything to fit.

        Raises:
            ConfigError: naming the parameter and its range.
        """
        ...

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
        """Fit on a support set; choose what is to be chosen on it alone.

        Args:
            X: image features, (n, d), or of V augmented views of each image, (n, V, d); any length.
            y: labels, (n,): texts, numbers or bools. Whole numbers in 0 .. C-1 are indices of rows of
                `class_embeddings`; of other labels the rows follow the distinct ones in ascending order.
            class_embeddings: text features, (C, d), any length, or a vector by class.
            class_names: the class of each row, where neither rule is meant.
            plain_features: features of the same images as they will be classified (not augmented), (n, d).
            on_stage: hears of progress.
        """
        ...

    def logits(self, X: ArrayLike) -> NDArray[Any]:
        """Logits, (n, C)."""
        ...

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
        """Logits, (n, C); of two classes their difference, (n,)."""
        ...

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Class probabilities, (n, C)."""
        ...

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable of `classes_`, (n,)."""
        ...

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
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
