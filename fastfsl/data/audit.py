"""What a user should know of a data set before trusting its figures: imbalance, missing classes, duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastfsl.arrays import unit
from fastfsl.data.dataset import FloatArray, LabelArray
from fastfsl.data.duplicates import MAX_COMPARED, NEAR_COSINE, near_between_classes

# Largest class over smallest beyond which a pool is called imbalanced.
IMBALANCE_FACTOR = 10.0

# Similarities held in memory at a time: 64 MiB.
_MAX_ENTRIES = 2**24

_NUM_SHOWN = 3


@dataclass(frozen=True)
class Duplicates:
    """Pairs of samples that are the same, or nearly.

    Attributes:
        num_samples: samples of the second set (or, within one set, of any but the first of its kind) that have a twin.
        num_other_label: those of them whose twins all have another label.
        first: positions of the first pairs, (first set, second set).
    """

    num_samples: int = 0
    num_other_label: int = 0
    first: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        class_counts: training samples by class, (C,).
        untested: names of the classes without a test sample.
        within: exact duplicates within the training pool.
        across: near-duplicates between the training pool and the test split.
        between: near-duplicates of several classes within the training pool, copies left out; pairs of positions.
        train_items: what messages call the training samples; None: their numbers.
        test_items: what they call those of the test split.
    """

    class_counts: tuple[int, ...]
    untested: tuple[str, ...]
    within: Duplicates
    across: Duplicates
    between: tuple[tuple[int, ...], ...] = ()
    train_items: Sequence[str] | None = None
    test_items: Sequence[str] | None = None

    def warnings(self) -> list[str]:
        """One line for each thing that stands in the way of trusting the figures."""
        lines = []
        least, most = min(self.class_counts), max(self.class_counts)
        if most > IMBALANCE_FACTOR * least:
            lines.append(
                f"the training pool is imbalanced: {least} to {most} samples a class; look at the macro accuracy"
            )
        if self.untested:
            lines.append(
                f"{len(self.untested)} of {len(self.class_counts)} classes have no test sample: "
                f"{_some([repr(name) for name in self.untested])}; nothing is said about them"
            )
        if self.within.num_samples:
            lines.append(
                f"{self.within.num_samples} training samples are exact copies of others"
                f"{_mislabelled(self.within)}: {_some(self._pairs(self.within, 'train'))}"
            )
        if self.between:
            pairs = [f"{self._called('train', one)} = {self._called('train', other)}" for one, other in self.between]
            lines.append(
                f"{len(pairs)} pairs of training samples of different classes are nearly the same (cosine above "
                f"{NEAR_COSINE}): {_some(pairs)}"
            )
        if self.across.num_samples:
            lines.append(
                f"{self.across.num_samples} test samples have a near-duplicate (cosine above {NEAR_COSINE}) in the "
                f"training pool{_mislabelled(self.across)}, so accuracies are too high: "
                f"{_some(self._pairs(self.across, 'test'))}"
            )
        return lines

    def _pairs(self, duplicates: Duplicates, second: str) -> list[str]:
        shown = [f"{self._called('train', one)} = {self._called(second, other)}" for one, other in duplicates.first]
        return shown + ["..."] * (duplicates.num_samples > len(shown))

    def _called(self, split: str, position: int) -> str:
        items = self.train_items if split == "train" else self.test_items
        return f"{split} {position}" if items is None else items[position]


def audit(
    class_names: Sequence[str],
    train_features: FloatArray,
    train_labels: LabelArray,
    test_features: FloatArray,
    test_labels: LabelArray,
    *,
    train_items: Sequence[str] | None = None,
    test_items: Sequence[str] | None = None,
) -> Audit:
    """Look a data set over.

    Args:
        class_names: by label.
        train_features: the training pool, (n, d), or of V augmented views of each image, (n, V, d); any length.
        train_labels: (n,).
        test_features: (m, d).
        test_labels: (m,).
        train_items: what messages call the training samples; default their numbers.
        test_items: likewise.
    """
    tested = np.bincount(test_labels, minlength=len(class_names)) > 0
    return Audit(
        class_counts=tuple(np.bincount(train_labels, minlength=len(class_names)).tolist()),
        untested=tuple(name for name, found in zip(class_names, tested, strict=True) if not found),
        within=exact_duplicates(train_features, train_labels),
        across=near_duplicates(train_features, train_labels, test_features, test_labels),
        between=_between(train_features, train_labels),
        train_items=train_items,
        test_items=test_items,
    )


def exact_duplicates(features: FloatArray, labels: LabelArray) -> Duplicates:
    """Samples whose features equal those of an earlier one, bit by bit."""
    earlier: dict[bytes, list[int]] = {}
    found = []
    for position, row in enumerate(np.ascontiguousarray(features)):
        twins = earlier.setdefault(row.tobytes(), [])
        if twins:
            found.append((twins[0], position, all(labels[twin] != labels[position] for twin in twins)))
        twins.append(position)
    return Duplicates(
        len(found), sum(other for *_, other in found), tuple((first, second) for first, second, _ in found[:_NUM_SHOWN])
    )


def near_duplicates(
    train_features: FloatArray, train_labels: LabelArray, test_features: FloatArray, test_labels: LabelArray
) -> Duplicates:
    """Test samples with a training sample at a cosine above `NEAR_COSINE`; of several views the mean direction counts.

    All pairs are looked at, a block at a time: memory stays bounded, time grows with n · m · d.
    """
    train, test = _directions(train_features), _directions(test_features)
    step = max(1, min(len(test), _MAX_ENTRIES // len(train)))
    width = max(1, _MAX_ENTRIES // step)
    twin = np.full(len(test), -1)
    same = np.zeros(len(test), dtype=bool)
    for top in range(0, len(test), step):
        rows = test[top : top + step]
        for left in range(0, len(train), width):
            hit, which = np.nonzero(rows @ train[left : left + width].T > NEAR_COSINE)
            hit, which = hit + top, which + left
            # Backwards, so that the first training sample of each is what stays.
            unseen = twin[hit] < 0
            twin[hit[unseen][::-1]] = which[unseen][::-1]
            same[hit[train_labels[which] == test_labels[hit]]] = True
    found = np.flatnonzero(twin >= 0)
    first = tuple((int(twin[position]), int(position)) for position in found[:_NUM_SHOWN])
    return Duplicates(len(found), int((~same[found]).sum()), first)


def _directions(features: FloatArray) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = unit(features, "features")
    if rows.ndim == 2:
        return rows
    mean = rows.mean(axis=1)
    directions: NDArray[np.float32] = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return directions


def _between(features: FloatArray, labels: LabelArray) -> tuple[tuple[int, ...], ...]:
    """Pairs of different classes that are nearly, and not bit by bit, the same."""
    if len(features) > MAX_COMPARED:
        return ()
    pairs = near_between_classes(_directions(features), labels).groups
    return tuple(pair for pair in pairs if not np.array_equal(features[pair[0]], features[pair[1]]))


def _mislabelled(duplicates: Duplicates) -> str:
    return f" ({duplicates.num_other_label} under another label)" if duplicates.num_other_label else ""


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
