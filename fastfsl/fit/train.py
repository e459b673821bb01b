"""From a data set to a fitted run: episode, features, class embeddings, estimator."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastfsl.data import (
    Episode,
    FeatureDataset,
    ImageDataset,
    ImageSample,
    check_readable,
    draw_episode,
    load_dataset,
    resolve_templates,
    select_classes,
)
from fastfsl.data.scoring import digest_of
from fastfsl.encoders import Augmentation, Encoder, class_embeddings, extract_features, load_encoder
from fastfsl.errors import ConfigError
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.run import EncoderRecord, Run, RunRecord, installed_versions, now


class Reporter(Protocol):
    """Where a training tells how far it is."""

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of the stage `name` are finished."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


class SilentReporter:
    """A reporter that says nothing."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class _Support:
    features: NDArray[np.float32]
    plain: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    class_embeddings: NDArray[np.float32]
    logit_scale: float
    kind: Literal["folder", "split-file", "features"]
    encoder: EncoderRecord | None
    templates: list[str]
    digests: list[str]


def train(data: Path, config: TrainConfig, *, reporter: Reporter | None = None, cache_dir: Path | None = None) -> Run:
    """Train a method on a data set.

    Args:
        data: an image folder, a CoOp split file or a feature file.
        config: what to do.
        reporter: hears of progress and warnings.
        cache_dir: where features are kept between runs; by default the user's cache folder.

    Returns:
        The fitted run; nothing is written but the feature cache.

    Raises:
        DataError: if the data cannot be used.
        ConfigError: if an option, the model or the checkpoint cannot be used, or the training diverges.
    """
    reporter = reporter or SilentReporter()
    root = None if config.image_root is None else Path(config.image_root)
    dataset = select_classes(load_dataset(data, root), config.classes)
    episode = draw_episode(dataset, config.shots, config.seed)

    start = time.perf_counter()
    if isinstance(dataset, FeatureDataset):
        support = _feature_support(dataset, episode)
    else:
        support = _image_support(dataset, episode, config, reporter, cache_dir)
    feature_seconds = time.perf_counter() - start

    estimator = config.estimator(logit_scale=support.logit_scale)
    estimator.fit(
        support.features,
        support.labels,
        support.class_embeddings,
        plain_features=support.plain,
        on_stage=reporter.stage,
    )
    for name, array in estimator.state().items():
        if not np.isfinite(array).all():
            raise ConfigError(f"the training diverged, {name} holds NaN or infinite values: try a lower learning_rate")
    record = RunRecord(
        config=config,
        data_kind=support.kind,
        data_path=str(data),
        class_names=list(dataset.class_names),
        embed_dim=support.class_embeddings.shape[1],
        encoder=support.encoder,
        templates=support.templates,
        logit_scale=support.logit_scale,
        num_support=len(support.labels),
        support_digests=support.digests,
        selection=estimator.selection_record(),
        params=estimator.get_params(),
        num_parameters=estimator.num_parameters_,
        feature_seconds=feature_seconds,
        train_seconds=estimator.train_seconds_,
        versions=installed_versions(),
        created=now(),
    )
    return Run(record, episode, estimator)


def encode_plain(
    encoder: Encoder,
    samples: tuple[ImageSample, ...],
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Features of images under the encoder's evaluation transform, (n, d), L2-normalised."""
    paths = [sample.path for sample in samples]
    features = extract_features(encoder, paths, num_views=0, cache_dir=cache_dir, progress=progress)
    return features[:, 0]


def encode_support(
    encoder: Encoder,
    samples: tuple[ImageSample, ...],
    config: TrainConfig,
    *,
    reporter: Reporter,
    cache_dir: Path | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of support images as they are, (n, d), and of their augmented views, (n, V, d), L2-normalised."""
    plain = encode_plain(
        encoder, samples, cache_dir=cache_dir, progress=lambda done, total: reporter.stage("encoding", done, total)
    )
    views = extract_features(
        encoder,
        [sample.path for sample in samples],
        num_views=config.num_views,
        augmentation=_augmentation(config),
        seed=config.seed,
        cache_dir=cache_dir,
        progress=lambda done, total: reporter.stage("encoding views", done, total),
    )
    return plain, views


def _feature_support(dataset: FeatureDataset, episode: Episode) -> _Support:
    features, labels = dataset.split("train")
    index = np.array(episode.indices)
    return _Support(
        features=features[index],
        plain=None,
        labels=labels[index],
        class_embeddings=dataset.class_embeddings,
        logit_scale=dataset.logit_scale,
        kind="features",
        encoder=None,
        templates=[],
        digests=[],
    )


def _image_support(
    dataset: ImageDataset,
    episode: Episode,
    config: TrainConfig,
    reporter: Reporter,
    cache_dir: Path | None,
) -> _Support:
    templates = resolve_templates(config.templates)
    _augmentation(config)  # told before anything is read
    train_split = dataset.split("train")
    samples, damaged = check_readable([train_split[index] for index in episode.indices], dataset.class_names)
    for path, reason in damaged:
        reporter.warn(f"skipped {path}: {reason}")
    encoder = load_encoder(config.backbone, config.pretrained, config.device)
    plain, views = encode_support(encoder, samples, config, reporter=reporter, cache_dir=cache_dir)
    return _Support(
        features=views,
        plain=plain,
        labels=np.array([sample.label for sample in samples], dtype=np.int64),
        class_embeddings=class_embeddings(encoder, dataset.class_names, config.templates),
        logit_scale=encoder.logit_scale,
        kind=dataset.kind,
        encoder=EncoderRecord(
            backbone=_lasting(encoder.backbone),
            pretrained=None if encoder.pretrained is None else _lasting(encoder.pretrained),
            digest=encoder.digest,
            preprocessing=encoder.preprocessing.to_dict(),
        ),
        templates=list(templates),
        digests=[digest_of(sample.path) for sample in samples],
    )


def _lasting(name: str) -> str:
    """A model's name or a tag as it is; a folder's or file's so that it means the same from any working folder."""
    scheme, separator, folder = name.partition(":")
    if separator and scheme == "local-dir":
        return f"local-dir:{Path(folder).absolute()}"
    path = Path(name)
    looks_like_file = bool(path.suffix) or len(path.parts) > 1  # a file called as a tag must not stand in for it
    return str(path.absolute()) if looks_like_file and path.is_file() else name


def _augmentation(config: TrainConfig) -> Augmentation:
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.augmentation.items()
        }
        return Augmentation(**values)
    except TypeError as error:
        raise ConfigError(f"unknown option under `augmentation`: {error}") from error
