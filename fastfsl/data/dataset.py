"""The two kinds of data set: images on disk, and features already computed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastfsl.data.skipped import Skipped
from fastfsl.errors import DataError

SPLITS = ("train", "val", "test")

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]


@dataclass(frozen=True)
class ImageSample:
    """One labelled image file; `label` indexes the data set's `class_names`."""

    path: Path
    label: int


@dataclass(frozen=True)
class ImageDataset:
    """Labelled image files, in a fixed order.

    Attributes:
        root: Folder that the samples' paths lie in.
        class_names: Names as found (folder names, or the split file's names), position = label.
        splits: Samples by split; keys among "train", "val", "test". A flat folder has only "train".
        kind: Where it came from.
        skipped: Files that were seen and are in no split, by reason; not to be changed.
        notes: What a user should know of the data, a line each.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, tuple[ImageSample, ...]]
    kind: Literal["folder", "split-file", "table"]
    skipped: Skipped = field(default_factory=Skipped)
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[ImageSample, ...]:
        """Samples of one split.

        Raises:
            DataError: The data set has no such split.
        """
        if name not in self.splits:
            raise DataError(_no_such_split(self.root, name, self.splits))
        return self.splits[name]

    def labels(self, name: str) -> LabelArray:
        """Labels of one split, shape (n,)."""
        return np.array([sample.label for sample in self.split(name)], dtype=np.int64)

    def item(self, sample: ImageSample) -> str:
        """The sample's path relative to `root`, with forward slashes: its name in an episode file.

        A table may list files outside of `root`; those have their whole path.
        """
        path = sample.path
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


@dataclass(frozen=True)
class FeatureDataset:
    """Features already computed by some encoder.

    Attributes:
        class_names: One name per class, position = label.
        splits: (features, labels) by split: features (n, d) float32, labels (n,) int64. The features of "train"
            may be (n, V, d): V augmented views per image. Values are kept as stored: not L2-normalised here.
        class_embeddings: Text features (C, d) float32, as stored.
        logit_scale: Factor on cosine similarities, exp of CLIP's learned temperature (100 for OpenAI's CLIP).
        path: The file they were read from, if any.
    """

    class_names: tuple[str, ...]
    splits: dict[str, tuple[FloatArray, LabelArray]]
    class_embeddings: FloatArray
    logit_scale: float = 100.0
    path: Path | None = field(default=None, compare=False)

    def split(self, name: str) -> tuple[FloatArray, LabelArray]:
        """Features and labels of one split.

        Raises:
            DataError: The data set has no such split.
        """
        if name not in self.splits:
            raise DataError(_no_such_split(self.path or "this feature data set", name, self.splits))
        return self.splits[name]

    def labels(self, name: str) -> LabelArray:
        """Labels of one split, shape (n,)."""
        return self.split(name)[1]

    @property
    def embed_dim(self) -> int:
        """The embedding width d."""
        return int(self.class_embeddings.shape[1])


def check_distinct(where: Path, class_names: tuple[str, ...]) -> None:
    """Classes of two data sets are matched by name, and predictions given by name, so no two may share one.

    Raises:
        DataError: Two classes have one name; it is given with both labels.
    """
    label_of: dict[str, int] = {}
    for label, name in enumerate(class_names):
        first = label_of.setdefault(name, label)
        if first != label:
            raise DataError(
                f"{where}: labels {first} and {label} are both called {name!r}: give each class its own name"
            )


def is_text(name: str) -> bool:
    """Whether UTF-8 can say it: lone surrogates, such as stand for a file name's undecodable bytes, it cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_such_split(where: Path | str, name: str, splits: Iterable[str]) -> str:
    return f"{where} has no {name!r} split, only {', '.join(map(repr, splits))}: choose one of these"
