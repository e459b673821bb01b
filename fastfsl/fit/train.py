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
    file_account,
    resolve_templates,
)
from fastfsl.data.baselines import text_accuracy
from fastfsl.data.duplicates import support_warnings
from fastfsl.data.scoring import digest_of, skipped_in_all
from fastfsl.data.skipped import NOT_DRAWN
from fastfsl.devices import resolve_device
from fastfsl.encoders import Augmentation, Encoder, class_embeddings, extract_features, load_encoder
from fastfsl.errors import ConfigError
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.methods import check_takes_features, find_source, recorded_params
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
    kind: Literal["folder", "split-file", "table", "features"]
    encoder: EncoderRecord | None
    templates: list[str]
    digests: list[str]
    texts: NDArray[np.float32]  # the classes' before any training, which zero-shot reads
    zero_shot_accuracy: float
    source: Source | None = None
    files: dict[str, Any] | None = None


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
        data: an image folder, a CoOp split file, a table of paths and labels or a feature file.
        config: what to do.
        dataset: `config.dataset(data)`, if it was read already.
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
    dataset = config.dataset(data) if dataset is None else dataset
    episode = draw_episode(dataset, config.shots, config.seed, exact=config.exact_shots)
    warn_of_few(dataset, config.shots, reporter)
    config.check_options()  # encoding may take an hour

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
        class_counts=np.bincount(support.labels, minlength=len(dataset.class_names)).tolist(),
        files=support.files,
        support_digests=support.digests,
        selection=estimator.selection_record(),
        params=recorded_params(estimator.get_params()),
        num_parameters=estimator.num_parameters_ + (0 if source is None else source.num_parameters_),
        feature_seconds=feature_seconds,
        train_seconds=estimator.train_seconds_ + (0.0 if source is None else source.train_seconds_),
        versions=installed_versions(),
        created=now(),
    )
    classified = SupportFeatures(_as_classified(support), support.labels, support.zero_shot_accuracy)
    return Run(record, episode, estimator, source, classified, support.texts)


def _as_classified(support: _Support) -> NDArray[np.float32]:
    """Unit features (n, d) of the support as new ones are made: not augmented, or the mean of the views' directions."""
    return _as_one(support.features if support.plain is None else support.plain)


def _as_one(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit features (n, d), of several views the mean of their directions."""
    directions = unit(features, "features")
    rows = directions if directions.ndim == 2 else unit(directions.mean(axis=1), "features")
    return rows.astype(np.float32)


def warn_of_few(dataset: ImageDataset | FeatureDataset, shots: int | None, reporter: Reporter) -> None:
    """Say which classes have fewer samples than were asked for, and so give all they have."""
    counts = np.bincount(dataset.labels("train"), minlength=len(dataset.class_names))
    few = [
        f"{name!r} ({count})" for name, count in zip(dataset.class_names, counts, strict=True) if count < (shots or 0)
    ]
    if few:
        more = f" and {len(few) - 10} more" if len(few) > 10 else ""
        reporter.warn(
            f"{len(few)} of {len(counts)} classes have fewer than {shots} images and give all they have: "
            f"{', '.join(few[:10])}{more}; --exact-shots refuses them"
        )


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
    features, labels = features[index], labels[index]
    return _Support(
        features=features,
        plain=None,
        labels=labels,
        class_embeddings=dataset.class_embeddings,
        logit_scale=dataset.logit_scale,
        kind="features",
        encoder=None,
        templates=[],
        digests=[],
        texts=dataset.class_embeddings,
        zero_shot_accuracy=text_accuracy(_as_one(features), dataset.class_embeddings, labels),
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
    dataset.skipped.check(strict=config.strict)
    samples, damaged = check_readable([train_split[index] for index in episode.indices], dataset.class_names)
    skipped = skipped_in_all(dataset, "train", damaged, reporter.warn, strict=config.strict)
    drawn = set(episode.indices)
    others = [sample.path for position, sample in enumerate(train_split) if position not in drawn]
    skipped.add(NOT_DRAWN, others[0] if others else "", len(others))
    for note in dataset.notes:
        reporter.warn(note)
    join_processes(resolve_device(config.device))  # each its card, before a model is loaded
    reporter.stage("loading the encoder", 0, 1)
    base = load_encoder(config.backbone, config.pretrained, config.device)
    texts = ClassTexts(
        dataset.class_names, config.templates, class_embeddings(base, dataset.class_names, config.templates)
    )
    reporter.stage("loading the encoder", 1, 1)
    known = source_support(base, texts, samples, config, reporter=reporter, cache_dir=cache_dir)
    encoder, source, estimator = base, config.source(), config.estimator(logit_scale=base.logit_scale)
    frozen = encode_plain(
        base, samples, cache_dir=cache_dir, progress=lambda done, total: reporter.stage("encoding", done, total)
    )
    untrained = texts.embeddings
    if source is not None:
        source.fit(known, on_stage=reporter.stage, on_warning=reporter.warn, checkpoints=checkpoints)
        texts = replace(texts, embeddings=source.class_embeddings_)
        encoder = tuned_for(estimator, source, base, texts)
    plain, views = support_features(estimator, encoder, samples, config, reporter=reporter, cache_dir=cache_dir)
    for line in support_warnings(samples, known.digests, plain, dataset.class_names):
        reporter.warn(line)
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
        texts=untrained,
        zero_shot_accuracy=text_accuracy(frozen, untrained, known.labels),
        source=source,
        files=file_account(len(samples), skipped),
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
