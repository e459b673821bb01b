"""What is compared on: episodes of the train split, and the test split, as features and if need be as images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.data import ImageDataset, ImageSample, Skipped, check_readable, draw_episode, file_account
from fastfsl.data.scoring import features_to_score, images_to_score, skipped_in_all
from fastfsl.data.skipped import NOT_DRAWN, OTHER_SPLIT
from fastfsl.encoders import Encoder, class_embeddings, load_encoder
from fastfsl.fit.comparison_plan import check_split
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.methods import check_takes_features, find_source
from fastfsl.fit.source import ClassTexts
from fastfsl.fit.train import Reporter, encode_plain, encode_support, warn_of_few


@dataclass(frozen=True)
class Support:
    """What a method may see: features (n, d) or (n, V, d), labels (n,), and features (n, d) of the plain images."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    plain: NDArray[np.float32] | None = None

    @property
    def as_classified(self) -> NDArray[np.float32]:
        """Features that come nearest to those of the same images when they are classified."""
        return self.features if self.plain is None else self.plain

    def __getitem__(self, rows: NDArray[np.int64]) -> "Support":
        """Some of the samples."""
        return Support(self.features[rows], self.labels[rows], None if self.plain is None else self.plain[rows])


@dataclass(frozen=True)
class ScoredSplit:
    """What methods are scored on: features (m, d), labels (m,)."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """The images behind a pool, for methods that tune the encoder.

    Attributes:
        encoder: frozen; it made the pool's features.
        texts: the classes.
        train: of the rows of the pool's `train`.
        test: of the rows of its `test`.
        config: how images are prepared and varied.
        cache_dir: where features are kept; None: the user's cache folder.
    """

    encoder: Encoder
    texts: ClassTexts
    train: tuple[ImageSample, ...]
    test: tuple[ImageSample, ...]
    config: TrainConfig
    cache_dir: Path | None


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
        images: None for a feature file, and where no method tunes the encoder.
        files: what became of every file of the data; None for a feature file.
        train_items: what messages call the rows of `train`; None: their numbers.
        test_items: what they call those of `test`.
        notes: what a user should know of the data beside their features.
    """

    class_names: tuple[str, ...]
    class_embeddings: NDArray[np.float32]
    logit_scale: float
    train: Support
    episodes: dict[tuple[int | None, int], NDArray[np.int64]]
    test: ScoredSplit
    images: Images | None = None
    files: dict[str, Any] | None = None
    train_items: tuple[str, ...] | None = None
    test_items: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def support(self, shots: int | None, seed: int) -> Support:
        """The samples of an episode."""
        return self.train[self.episodes[shots, seed]]

    def digest(self, shots: int | None, seed: int) -> str:
        """SHA-256, hex, of all that a method is given of an episode and is scored on."""
        support = self.support(shots, seed)
        arrays: list[NDArray[Any]] = [
            support.features,
            support.labels,
            self.class_embeddings,
            self.test.features,
            self.test.labels,
        ]
        if support.plain is not None:
            arrays.append(support.plain)
        hashed = hashlib.sha256(repr((self.class_names, self.logit_scale)).encode())
        for array in arrays:
            hashed.update(f"{array.dtype} {array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()


def load_pool(
    data: Path,
    methods: Sequence[str],
    shots: Sequence[int | None],
    seeds: Sequence[int],
    *,
    split: str,
    config: TrainConfig,
    reporter: Reporter,
    cache_dir: Path | None = None,
) -> Pool:
    """Read the data, draw every episode, and encode the images there are.

    Raises:
        DataError: the data cannot be used, lack `split`, or have classes with fewer samples than an episode asks for.
        ConfigError: `split` is the one that episodes are drawn from, the encoder cannot be had, or a method tunes it
            and the data are a feature file.
    """
    dataset = config.dataset(data)
    check_split(split, data, dataset.splits)
    if not isinstance(dataset, ImageDataset):
        for method in methods:
            check_takes_features(method)
    drawn = {
        (number, seed): draw_episode(dataset, number, seed, exact=config.exact_shots).indices
        for number in shots
        for seed in seeds
    }
    warn_of_few(dataset, max((number for number in shots if number is not None), default=None), reporter)
    episodes = {key: np.array(indices, dtype=np.int64) for key, indices in drawn.items()}
    if isinstance(dataset, ImageDataset):
        pool = _image_pool(dataset, episodes, split, config, reporter, cache_dir)
        return pool if any(map(find_source, methods)) else replace(pool, images=None)
    features, labels = dataset.split("train")
    return Pool(
        class_names=dataset.class_names,
        class_embeddings=dataset.class_embeddings,
        logit_scale=dataset.logit_scale,
        train=Support(features, labels),
        episodes=episodes,
        test=ScoredSplit(*features_to_score(dataset, split, dataset.class_names, dataset.embed_dim)),
    )


def _image_pool(
    dataset: ImageDataset,
    episodes: dict[tuple[int | None, int], NDArray[np.int64]],
    split: str,
    config: TrainConfig,
    reporter: Reporter,
    cache_dir: Path | None,
) -> Pool:
    """Each image that an episode drew is encoded once; those that cannot be read are left out of every episode."""
    drawn = np.unique(np.concatenate(list(episodes.values())))
    train = dataset.split("train")
    dataset.skipped.check(strict=config.strict)
    samples, damaged = check_readable([train[row] for row in drawn], dataset.class_names)
    skipped = skipped_in_all(
        replace(dataset, splits={"train": train}), "train", damaged, reporter.warn, strict=config.strict
    )
    unreadable = {path for path, _ in damaged}
    readable = [row for row in drawn if train[row].path not in unreadable]
    place = {row: position for position, row in enumerate(readable)}
    scored = images_to_score(
        replace(dataset, splits={split: dataset.split(split)}, skipped=Skipped(), notes=()),
        split,
        dataset.class_names,
        set(),
        reporter.warn,
        strict=config.strict,
    )
    tested = scored.samples
    for reason, number in scored.files["reasons"].items():
        skipped.add(reason, scored.files["examples"][reason], number)
    for other, others in dataset.splits.items():
        if other not in ("train", split):
            skipped.add(OTHER_SPLIT, others[0].path, len(others), detail=other)
    left = sorted(set(range(len(train))) - set(drawn.tolist()))
    skipped.add(NOT_DRAWN, train[left[0]].path if left else "", len(left))
    encoder = load_encoder(config.backbone, config.pretrained, config.device)
    texts = ClassTexts(
        dataset.class_names, config.templates, class_embeddings(encoder, dataset.class_names, config.templates)
    )
    plain, views = encode_support(encoder, samples, config, reporter=reporter, cache_dir=cache_dir)
    return Pool(
        class_names=dataset.class_names,
        class_embeddings=texts.embeddings,
        logit_scale=encoder.logit_scale,
        train=Support(views, _labels(samples), plain),
        episodes={
            key: np.array([place[row] for row in rows if row in place], dtype=np.int64)
            for key, rows in episodes.items()
        },
        test=ScoredSplit(
            encode_plain(
                encoder,
                tested,
                cache_dir=cache_dir,
                progress=lambda done, total: reporter.stage("encoding what is scored on", done, total),
            ),
            _labels(tested),
        ),
        images=Images(encoder, texts, samples, tested, config, cache_dir),
        files=file_account(len(samples) + len(tested), skipped),
        train_items=tuple(dataset.item(sample) for sample in samples),
        test_items=tuple(dataset.item(sample) for sample in tested),
        notes=dataset.notes,
    )


def _labels(samples: Sequence[ImageSample]) -> NDArray[np.int64]:
    return np.array([sample.label for sample in samples], dtype=np.int64)
