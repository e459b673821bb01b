"""What makes a scikit-learn classifier of an estimator that gives logits."""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import validate_data

from fastfsl.arrays import check_weights, label_array
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.heads.classes import same_kind

_P = ParamSpec("_P")
_R = TypeVar("_R")


class UnfittedError(ConfigError, NotFittedError):  # type: ignore[misc]  # scikit-learn is untyped
    """An estimator is used before it was fitted."""


def also_named(**others: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let arguments be passed under another name as well: `fit(features=...)` for `fit(X=...)`.

    Args:
        others: the name in the signature by the other name.
    """

    def decorate(method: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(method)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for other, name in others.items():
                if other in kwargs:
                    if name in kwargs:
                        raise TypeError(f"expected {name} or {other}, got both")
                    kwargs[name] = kwargs.pop(other)
            return method(*args, **kwargs)

        return called

    return decorate


class FromLogits(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """A scikit-learn classifier: predictions, probabilities and accuracy from logits.

    Features are called `X` and labels `y`, as in scikit-learn; `features=` and `labels=` are accepted as well. Metadata
    routing hands on `class_embeddings` and `class_names` without being asked to.

    Attributes:
        classes_: the classes, ascending, (C,): texts, numbers or bools, as the labels were.
        n_features_in_: width of the features.
        feature_names_in_: names of the columns of the data frame that it was fitted on; missing for other data.
    """

    classes_: NDArray[Any]
    n_features_in_: int
    class_embeddings: Any = None

    # What scikit-learn's routers pass on to `fit` by default.
    __metadata_request__fit = {"class_embeddings": True, "class_names": True}  # noqa: RUF012  # read by scikit-learn

    @abstractmethod
    def logits(self, X: ArrayLike) -> NDArray[Any]:
        """Logits, (rows, C), of image features (rows, d) of any length."""

    @also_named(features="X")
    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
        """Logits, (rows, C); of two classes, as scikit-learn has it, the second one's less the first one's, (rows,)."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    @also_named(features="X")
    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Class probabilities, (rows, C): softmax of the logits."""
        probabilities: NDArray[Any] = softmax(self.logits(X), axis=1)
        return probabilities

    @also_named(features="X")
    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class, one of `classes_`, (rows,)."""
        best = self.logits(X).argmax(axis=1)
        predicted: NDArray[Any] = self.classes_[best]
        return predicted

    @also_named(features="X", labels="y")
    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy, fraction; with `sample_weight` (rows,) the share of their weight that is right.

        A class that the estimator does not know counts as wrong, as in scikit-learn. Where classes are counted from 0
        such a label is an error, as in `fit`.

        Raises:
            ShapeError: not one label, or weight, per row.
            DataError: labels of another kind than the fitted ones, none of them known, or an index out of range.
        """
        predicted = self.predict(X)
        labels = label_array(y, len(predicted))
        weights = check_weights(sample_weight, len(predicted))
        known = np.isin(labels, self.classes_) if same_kind(labels, self.classes_) else np.zeros(len(labels), np.bool_)
        if not known.any() or (not known.all() and _are_indices(self.classes_)):
            some = np.unique(labels[~known])[:5].tolist()
            raise DataError(f"expected labels in {_listed(self.classes_)}, got {', '.join(map(repr, some))}")
        return float(np.average(predicted == labels, weights=weights))

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002  # scikit-learn's signature
        """The constructor's parameters; tensors with a gradient without it, so that they can be copied."""
        params: dict[str, Any] = super().get_params(deep)
        for name in {"class_embeddings", "logit_scale"}.intersection(params):
            params[name] = _detached(params[name])
        return params

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` or `restore` came to its end."""
        return hasattr(self, "classes_")

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise UnfittedError(f"this {type(self).__name__} is not fitted: call fit first")

    def _keep_columns(self, X: object, *, reset: bool) -> None:
        """Remember, or compare, the names of a data frame's columns."""
        validate_data(self, X, skip_check_array=True, ensure_2d=False, reset=reset)

    def _check_width(self, width: int) -> None:
        expected = self.n_features_in_
        if width != expected:
            raise ShapeError(
                f"expected features of width {expected}, got {width}: use the encoder that the support came from "
                f"(X has {width} features, but {type(self).__name__} is expecting {expected} features as input)"
            )

    def _class_state(self) -> dict[str, NDArray[Any]]:
        """The classes as arrays that safetensors holds; nothing where they are 0 .. C-1."""
        if _are_indices(self.classes_) and self.classes_.dtype.kind == "i":
            return {}
        if self.classes_.dtype.kind != "U":
            return {"classes": self.classes_}
        return {"class_names": np.frombuffer(json.dumps(self.classes_.tolist()).encode(), np.uint8)}

    def _restore_classes(self, state: Mapping[str, NDArray[Any]], num_classes: int) -> None:
        classes = state.get("classes", np.arange(num_classes))
        if "class_names" in state:
            try:
                classes = np.array(json.loads(state["class_names"].tobytes()), dtype=np.str_)
            except ValueError as error:
                raise DataError(f"expected class_names to be JSON ({error}): train it again") from error
        if classes.shape != (num_classes,):
            raise DataError(f"expected {num_classes} classes, got {classes.shape}: train it again")
        self.classes_ = classes


def _detached(values: Any) -> Any:  # noqa: ANN401  # whatever class embeddings may be
    """The same object, or, of tensors that require a gradient, a copy that does not: torch copies no others."""
    if getattr(values, "requires_grad", False):
        return values.detach()
    if isinstance(values, Mapping) and any(getattr(value, "requires_grad", False) for value in values.values()):
        return {key: _detached(value) for key, value in values.items()}
    if isinstance(values, list | tuple) and any(getattr(value, "requires_grad", False) for value in values):
        return [_detached(value) for value in values]
    return values


def _are_indices(classes: NDArray[Any]) -> bool:
    return classes.dtype.kind in "if" and bool((classes == np.arange(len(classes))).all())


def _listed(classes: NDArray[Any]) -> str:
    if _are_indices(classes):
        return f"0..{len(classes) - 1}"
    return ", ".join(map(repr, classes[:5].tolist())) + (", ..." if len(classes) > 5 else "")
