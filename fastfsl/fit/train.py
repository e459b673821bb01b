"""From a data set to a fitted run: episode, tuned encoder, features, class embeddings, estimator."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastfsl.arrays import unit
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
from fastfsl.devices import resolve_device
from fastfsl.encoders import Augmentation, Encoder, class_embeddings, extract_features, load_encoder
from fastfsl.errors import ConfigError
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.methods import check_takes_features, find_source
from fastfsl.fit.processes import join_processes
from fastfsl.fit.run import (
    EncoderRecord,
    Run,
    RunRecord,
    SourceRecord,
    SupportFeatures,
    installed_versions,
    now,
    tuned_for,
)
from fastfsl.fit.source import ClassTexts, Source, SourceSupport
from fastfsl.fit.text_readout import TextReadout


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
    source: Source | None = None


def train(
    data: Path,
    config: TrainConfig,
    *,
    dataset: ImageDataset | FeatureDataset | None = None,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
    checkpoints: Path | None = None,
) -> Run:
    """Train a method on a data set.

    Args:
        data: an image folder, a CoOp split file or a feature file.
        config: what to do.
        dataset: what `data` holds, if it was read already.
        reporter: hears of progress and warnings.
        cache_dir: where features are kept between runs; by default the user's cache folder.
        checkpoints: folder from which the tuning of an encoder goes on, and in which its progress is kept; it is the
            caller's to remove once the run is saved. None: nothing is kept.

    Returns:
        The fitted run; nothing is written but the feature cache and the checkpoints.

    Raises:
        DataError: if the data cannot be used.
        ConfigError: if an option, the model or the checkpoint cannot be used, or the training diverges.
    """
    reporter = reporter or SilentReporter()
    root = None if config.image_root is None else Path(config.image_root)
    dataset = select_classes(load_dataset(data, root) if dataset is None else dataset, config.classes)
    episode = draw_episode(dataset, config.shots, config.seed)

    start = time.perf_counter()
    if isinstance(dataset, FeatureDataset):
        check_takes_features(config.method)
        support = _feature_support(dataset, episode)
    else:
        support = _image_support(dataset, episode, config, reporter, cache_dir, checkpoints)
    source = support.source
    feature_seconds = time.perf_counter() - start - (0.0 if source is None else source.fit_seconds_)

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
        source=None
        if source is None
        else SourceRecord(
            params=source.options(),
            selection=source.selection_record(),
            num_parameters=source.num_parameters_,
            train_seconds=source.train_seconds_,
        ),
        templates=support.templates,
        logit_scale=support.logit_scale,
        num_support=len(support.labels),
        support_digests=support.digests,
        selection=estimator.selection_record(),
        params=estimator.get_params(),
        num_parameters=estimator.num_parameters_ + (0 if source is None else source.num_parameters_),
        feature_seconds=feature_seconds,
        train_seconds=estimator.train_seconds_ + (0.0 if source is None else source.train_seconds_),
        versions=installed_versions(),
        created=now(),
    )
    return Run(record, episode, estimator, source, SupportFeatures(_as_classified(support), support.labels))


def _as_classified(support: _Support) -> NDArray[np.float32]:
    """Unit features (n, d) of the support as new ones are made: not augmented, or the mean of the views' directions."""
    features = support.features if support.plain is None else support.plain
    directions = unit(features, "features")
    rows = directions if directions.ndim == 2 else unit(directions.mean(axis=1), "features")
    return rows.astype(np.float32)


def encode_plain(
    encoder: Encoder,
    samples: tuple[ImageSample, ...],
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Features of images under the encoder's evaluation transform, (n, d), as long as the encoder gives them."""
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
    """Features of support images as they are, (n, d), and of their augmented views, (n, V, d)."""
    plain = encode_plain(
        encoder, samples, cache_dir=cache_dir, progress=lambda done, total: reporter.stage("encoding", done, total)
    )
    views = extract_features(
        encoder,
        [sample.path for sample in samples],
        num_views=config.num_views,
        augmentation=source_augmentation(config),
        seed=config.seed,
        cache_dir=cache_dir,
        progress=lambda done, total: reporter.stage("encoding views", done, total),
    )
    return plain, views


def support_features(
    estimator: Estimator,
    encoder: Encoder,
    samples: tuple[ImageSample, ...],
    config: TrainConfig,
    *,
    reporter: Reporter,
    cache_dir: Path | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of support images as they are, (n, d), and of the views that the estimator is fitted to, (n, V, d)."""
    if isinstance(estimator, TextReadout):  # which does not train on features
        plain = encode_plain(encoder, samples, cache_dir=cache_dir)
        return plain, plain[:, None]
    return encode_support(encoder, samples, config, reporter=reporter, cache_dir=cache_dir)


def source_support(
    encoder: Encoder,
    texts: ClassTexts,
    samples: tuple[ImageSample, ...],
    config: TrainConfig,
    *,
    reporter: Reporter,
    cache_dir: Path | None = None,
) -> SourceSupport:
    """What the method's source is trained on: readable images and the frozen encoder."""
    return SourceSupport(
        encoder=encoder,
        texts=texts,
        paths=tuple(sample.path for sample in samples),
        labels=np.array([sample.label for sample in samples], dtype=np.int64),
        digests=tuple(digest_of(sample.path) for sample in samples),
        augmentation=source_augmentation(config),
        features=functools.cache(
            lambda: encode_support(encoder, samples, config, reporter=reporter, cache_dir=cache_dir)
        ),
    )


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
    checkpoints: Path | None,
) -> _Support:
    templates = resolve_templates(config.templates)
    source_augmentation(config)  # a wrong option is told before anything is read
    train_split = dataset.split("train")
    samples, damaged = check_readable([train_split[index] for index in episode.indices], dataset.class_names)
    for path, reason in damaged:
        reporter.warn(f"skipped {path}: {reason}")
    join_processes(resolve_device(config.device))  # each its card, before a model is loaded
    base = load_encoder(config.backbone, config.pretrained, config.device)
    texts = ClassTexts(
        dataset.class_names, config.templates, class_embeddings(base, dataset.class_names, config.templates)
    )
    known = source_support(base, texts, samples, config, reporter=reporter, cache_dir=cache_dir)
    encoder, source, estimator = base, config.source(), config.estimator(logit_scale=base.logit_scale)
    if source is not None:
        source.fit(known, on_stage=reporter.stage, on_warning=reporter.warn, checkpoints=checkpoints)
        texts = replace(texts, embeddings=source.class_embeddings_)
        encoder = tuned_for(estimator, source, base, texts)
    plain, views = support_features(estimator, encoder, samples, config, reporter=reporter, cache_dir=cache_dir)
    return _Support(
        features=views,
        plain=plain,
        labels=known.labels,
        class_embeddings=texts.embeddings,
        logit_scale=base.logit_scale,
        kind=dataset.kind,
        encoder=EncoderRecord(
            backbone=_lasting(base.backbone),
            pretrained=None if base.pretrained is None else _lasting(base.pretrained),
            digest=base.digest,
            preprocessing=base.preprocessing.to_dict(),
        ),
        templates=list(templates),
        digests=list(known.digests),
        source=source,
    )


def _lasting(name: str) -> str:
    """A model's name or a tag as it is; a folder's or file's so that it means the same from any working folder."""
    scheme, separator, folder = name.partition(":")
    if separator and scheme == "local-dir":
        return f"local-dir:{Path(folder).absolute()}"
    path = Path(name)
    looks_like_file = bool(path.suffix) or len(path.parts) > 1  # a file called as a tag must not stand in for it
    return str(path.absolute()) if looks_like_file and path.is_file() else name


def source_augmentation(config: TrainConfig) -> Augmentation:
    """How views vary: as configured, and where no area of the crop is, as the method's source has it.

    Raises:
        ConfigError: an option under `augmentation` is unknown or out of its range.
    """
    source = find_source(config.method)
    scale = None if source is None else source.implementation.view_scale
    options = {**({} if scale is None else {"scale": scale}), **config.augmentation}
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
        }
        return Augmentation(**values)
    except TypeError as error:
        raise ConfigError(f"unknown option under `augmentation`: {error}") from error
