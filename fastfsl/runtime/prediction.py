"""What a classifier says about one input, and how logits become it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfsl.errors import DataError


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one input, best first.

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
