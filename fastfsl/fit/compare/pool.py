"""What is compared on: episodes of the train split, and the test split, all as features."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastfsl.data import ImageDataset, draw_episode, load_dataset
from fastfsl.data.scoring import features_to_score
from fastfsl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Support:
    """What a method may see: features (n, d) or (n, V, d), labels (n,), and features (n, d) of the plain images."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    plain: NDArray[np.float32] | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> "Support":
        """Some of the samples."""
        return Support(self.features[rows], self.labels[rows], None if self.plain is None else self.plain[rows])


@dataclass(frozen=True)
class TestSplit:
    """What methods are scored on: features (m, d), labels (m,)."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """A data set as a comparison uses it.

    Attributes:
        class_names: by label.
        class_embeddings: (C, d).
        logit_scale: factor on the cosine similarities.
        train: the train split, or of images those that any episode drew.
        episodes: rows of `train` by (shots, seed).
        test: the split that is scored on.
        num_train: samples in the train split.
    """

    class_names: tuple[str, ...]
    class_embeddings: NDArray[np.float32]
    logit_scale: float
    train: Support
    episodes: dict[tuple[int | None, int], NDArray[np.int64]]
    test: TestSplit
    num_train: int

    def support(self, shots: int | None, seed: int) -> Support:
        """The samples of an episode."""
        return self.train[self.episodes[shots, seed]]

    def digest(self, shots: int | None, seed: int) -> str:
        """SHA-256, hex, of all that a method is given of an episode and is scored on."""
        support = self.support(shots, seed)
        arrays = [support.features, support.labels, self.class_embeddings, self.test.features, self.test.labels]
        hashed = hashlib.sha256(repr((self.class_names, self.logit_scale)).encode())
        for array in arrays if support.plain is None else [*arrays, support.plain]:
            hashed.update(f"{array.dtype} {array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()


def shots_label(shots: int | None) -> int | str:
    """Shots as they are shown: None is `all`."""
    return "all" if shots is None else shots


def load_pool(data: Path, shots: Sequence[int | None], seeds: Sequence[int], *, split: str = "test") -> Pool:
    """Read the data and draw every episode.

    Raises:
        DataError: the data cannot be used, lack `split`, or have classes with fewer samples than an episode asks for.
        ConfigError: `split` is the one that episodes are drawn from.
    """
    if split == "train":
        raise ConfigError("expected a split to score on that no episode is drawn from, got 'train': try 'test'")
    dataset = load_dataset(data)
    if split not in dataset.splits:
        raise DataError(
            f"{data} has no {split!r} split to score on, only {', '.join(map(repr, dataset.splits))}: "
            "add one, or name another with --split"
        )
    episodes = {(number, seed): draw_episode(dataset, number, seed) for number in shots for seed in seeds}
    rows = {key: np.array(episode.indices, dtype=np.int64) for key, episode in episodes.items()}
    if isinstance(dataset, ImageDataset):
        raise DataError("expected a feature file")
    features, labels = dataset.split("train")
    return Pool(
        class_names=dataset.class_names,
        class_embeddings=dataset.class_embeddings,
        logit_scale=dataset.logit_scale,
        train=Support(features, labels),
        episodes=rows,
        test=TestSplit(*features_to_score(dataset, split, dataset.class_names, dataset.embed_dim)),
        num_train=len(labels),
    )
