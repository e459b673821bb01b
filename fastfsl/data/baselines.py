"""What an accuracy is worth: chance, always answering the commonest class, zero-shot, and how sure the figure is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.data.dataset import LabelArray

# Standard normal quantile of a two-sided 95 % interval.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Predicted:
    """What a score is made of.

    Attributes:
        class_names: By index.
        probabilities: (n, C).
        labels: Class indices, (n,).
        paths: Of the images, n of them; empty where features were scored.
        zero_shot_accuracy: Of the class texts alone on the same samples, fraction; None if there are no texts.
    """

    class_names: Sequence[str]
    probabilities: NDArray[Any]
    labels: LabelArray
    paths: tuple[Path, ...] = ()
    zero_shot_accuracy: float | None = None


@dataclass(frozen=True)
class Standing:
    """An accuracy beside what it has to be compared with.

    Attributes:
        accuracy: Fraction; None if nothing was measured.
        interval: Its 95 % interval (Wilson), fractions.
        num_samples: It is measured on so many.
        chance: Of guessing among the classes, fraction.
        majority_class: The commonest class of the samples.
        majority_share: Its share of them, fraction: what always answering it would reach.
        zero_shot_accuracy: Of the class texts alone, fraction; None if there are no texts.
    """

    accuracy: float | None
    interval: tuple[float, float] | None
    num_samples: int
    chance: float
    majority_class: str
    majority_share: float
    zero_shot_accuracy: float | None

    @property
    def below_majority(self) -> bool | None:
        """Whether always answering the commonest class would be right more often; None if nothing was measured."""
        return None if self.accuracy is None else self.accuracy < self.majority_share

    def fields(self) -> dict[str, Any]:
        """What a JSON document says of it beside the accuracy."""
        return {
            "interval": None if self.interval is None else list(self.interval),
            "chance": self.chance,
            "majority_class": self.majority_class,
            "majority_share": self.majority_share,
            "zero_shot_accuracy": self.zero_shot_accuracy,
            "below_majority": self.below_majority,
        }

    def sentence(self, what: str = "accuracy") -> str:
        """One line for a person."""
        if self.accuracy is None or self.interval is None:
            measured = f"no {what}: nothing could be held out"
        else:
            low, high = self.interval
            measured = (
                f"{what} {_percent(self.accuracy)} (95 % interval {_percent(low)} to {_percent(high)}, "
                f"{self.num_samples} samples)"
            )
        texts = "unknown" if self.zero_shot_accuracy is None else _percent(self.zero_shot_accuracy)
        beside = [
            f"zero-shot {texts}",
            f"majority class {self.majority_class!r} {_percent(self.majority_share)}",
            f"chance {_percent(self.chance)}",
        ]
        doubt = self.doubt()
        return f"{measured}; {', '.join(beside)}{'' if doubt is None else f'. {doubt}'}"

    def warning(self) -> str | None:
        """What to say of a classifier that is worse than always giving the same answer; None if it is not."""
        if self.accuracy is None or not self.below_majority:
            return None
        return (
            f"the classifier stays below the majority class: it is right for {_percent(self.accuracy)} of "
            f"{self.num_samples} samples, and always answering {self.majority_class!r} would be for "
            f"{_percent(self.majority_share)}. Check the labels, add images, or take another backbone"
        )

    def doubt(self) -> str | None:
        """What to say of one that may be no better than that; None if it is surely better, or worse."""
        if self.interval is None or self.below_majority or self.interval[0] > self.majority_share:
            return None
        return (
            f"On so few samples it is not certain that it beats always answering {self.majority_class!r}: the interval "
            f"reaches down to {_percent(self.interval[0])}"
        )


def standing(
    accuracy: float | None,
    num_samples: int,
    labels: LabelArray,
    class_names: Sequence[str],
    zero_shot_accuracy: float | None = None,
) -> Standing:
    """An accuracy beside chance, majority class and zero-shot.

    Args:
        accuracy: Fraction of right answers; None if nothing was measured.
        num_samples: Of so many.
        labels: Class indices of the samples, (n,), n > 0.
        class_names: The classes chosen among, by index.
        zero_shot_accuracy: Fraction; None if there are no class texts.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    commonest = int(counts.argmax())
    return Standing(
        accuracy=accuracy,
        interval=None if accuracy is None else wilson_interval(accuracy, num_samples),
        num_samples=num_samples,
        chance=1 / len(class_names),
        majority_class=str(class_names[commonest]),
        majority_share=float(counts[commonest] / len(labels)),
        zero_shot_accuracy=zero_shot_accuracy,
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share measured on `count` samples, within 0 and 1 even for 0 and 1 themselves.

        (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if count < 1:
        return 0.0, 1.0
    squared = _Z**2 / count
    middle = share + squared / 2
    half = _Z * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    return max(0.0, (middle - half) / (1 + squared)), min(1.0, (middle + half) / (1 + squared))


def text_accuracy(features: NDArray[Any], texts: NDArray[Any], labels: LabelArray) -> float:
    """Accuracy of cosines with class texts: zero-shot, which has learnt from no image.

    Args:
        features: Image features, (n, d), of any length.
        texts: Of the classes, (C, d), of any length.
        labels: Class indices, (n,).
    """
    unit_texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return float(((features @ unit_texts.T).argmax(axis=1) == labels).mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
