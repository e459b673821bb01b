"""What a classifier says about one input, and how logits become it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fastfsl.errors import DataError


@dataclass(frozen=True)
class Prediction(dict[str, Any]):
    """The most probable classes of one input, best first.

    It is a dictionary of its fields as well, of Python's own types, so that ``json.dumps(prediction)`` works, and so
    does answering with it from a web framework. It cannot be changed.

    Args:
        labels: class names; empty when the input could not be read.
        probabilities: softmax probability of each label.
        error: why the input could not be read (``on_error="mark"``), or None.
        known: False if the best probability is below the bundle's threshold: the answer is "none of these", and the
            labels are no more than the nearest classes. None if the bundle has no threshold, or on an error.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str | None = None
    known: bool | None = None

    def __post_init__(self) -> None:
        """Take Python's types: numpy's numbers are no JSON."""
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        object.__setattr__(self, "probabilities", tuple(map(float, self.probabilities)))
        object.__setattr__(self, "known", None if self.known is None else bool(self.known))
        dict.update(self, labels=self.labels, probabilities=self.probabilities, error=self.error, known=self.known)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary of JSON values: ``labels`` and ``probabilities`` are lists."""
        return {**self, "labels": list(self.labels), "probabilities": list(self.probabilities)}

    def __reduce__(self) -> tuple[type[Prediction], tuple[Any, ...]]:
        return Prediction, (self.labels, self.probabilities, self.error, self.known)

    def _unchangeable(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a Prediction cannot be changed: change what to_dict() gives")

    __setitem__ = __delitem__ = __ior__ = _unchangeable
    clear = pop = popitem = setdefault = update = _unchangeable

    @property
    def label(self) -> str:
        """The most probable class, even if ``known`` is False.

        Raises:
            DataError: the input could not be read.
        """
        if not self.labels:
            raise DataError(self.error or "the prediction holds no label")
        return self.labels[0]


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Probabilities of each row, computed in float64 from the largest logit down.

    Args:
        logits: (n, C).

    Returns:
        (n, C) float32.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True, initial=-np.inf)
    np.exp(wide, out=wide)
    wide /= wide.sum(axis=1, keepdims=True)
    return wide.astype(np.float32)


def rank(
    logits: np.ndarray[Any, Any], class_names: Sequence[str], top_k: int, *, threshold: float | None = None
) -> list[Prediction]:
    """The ``top_k`` best classes of each row. Equal logits keep the order of the classes.

    Args:
        logits: (n, C).
        class_names: C labels.
        top_k: number of classes to keep; more than C means all.
        threshold: probability of the best class below which the input is none of these.
    """
    probabilities = softmax(logits)
    # By logit, not by probability: far behind the winner several probabilities round to the same zero.
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return [
        Prediction(
            labels=tuple(class_names[index] for index in best),
            probabilities=tuple(float(row[index]) for index in best),
            known=None if threshold is None else bool(row[best[0]] >= threshold),
        )
        for row, best in zip(probabilities, order, strict=True)
    ]
