"""Which samples of the support are held out together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fastfsl.heads.support import Labels, Support

# `folds`: stratified folds. `one-shot`: nothing can be held out of most classes, so that weights follow a rule.
Rule = Literal["folds", "one-shot"]


@dataclass(frozen=True)
class Folds:
    """A partition of the support.

    Attributes:
        rule: what the folds can be used for.
        fold_of: the fold that a sample is held out in, (n,); -1: never.
        labels: class indices, (n,).
        num_classes: C.
    """

    rule: Rule
    fold_of: Labels
    labels: Labels
    num_classes: int

    @cached_property
    def held_out(self) -> Labels:
        """Positions of the samples that are held out once, ascending."""
        return np.flatnonzero(self.fold_of >= 0)

    def __len__(self) -> int:
        return int(self.fold_of.max()) + 1

    def __iter__(self) -> Iterator[tuple[Labels, Labels]]:
        """Positions to train on and positions held out, fold by fold."""
        for fold in range(len(self)):
            held_out = self.fold_of == fold
            yield np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def seen(self) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """Whether class c had a sample to train on when sample i was held out, (n, C)."""
        seen = np.ones((len(self.labels), self.num_classes), dtype=np.bool_)
        for train, held_out in self:
            seen[held_out] = np.bincount(self.labels[train], minlength=self.num_classes) > 0
        return seen


def make_folds(support: Support, num_folds: int, seed: int) -> Folds:
    """Deal the samples of every class over the folds, in a random order.

    With at least two samples in at least half of the classes the folds are stratified: as many as the typical class
    has samples, `num_folds` at most; the only sample of a class is never held out, so that every class can always
    be trained on. Otherwise (one shot) whole classes vanish with their fold: such folds tell nothing about the right
    class, only how the scores of the wrong ones scatter.
    """
    rng = np.random.default_rng(seed)
    labels, counts = support.labels, support.counts
    shared = counts >= 2
    if shared.mean() < 0.5:
        size = min(num_folds, len(labels))
        return Folds("one-shot", rng.permutation(len(labels)) % size, labels, support.num_classes)
    size = max(2, min(num_folds, int(np.median(counts[shared]))))
    fold_of = np.full(len(labels), -1)
    start = 0  # continued from class to class: the folds come out equally large
    for label in np.flatnonzero(shared):
        samples = rng.permutation(np.flatnonzero(labels == label))
        fold_of[samples] = (start + np.arange(len(samples))) % size
        start += len(samples)
    return Folds("folds", fold_of, labels, support.num_classes)
