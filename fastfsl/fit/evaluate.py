"""Accuracy of a fitted run on a split of a data set, in torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.data import (
    ClassSelection,
    Columns,
    FeatureDataset,
    ImageDataset,
    ImageSample,
    load_dataset,
    select_classes,
)
from fastfsl.data.baselines import Predicted, text_accuracy
from fastfsl.data.scoring import Evaluation, features_to_score, images_to_score, score
from fastfsl.encoders import Encoder, class_embeddings, load_encoder
from fastfsl.errors import BundleError, ConfigError, DataError
from fastfsl.fit.mps import MPS
from fastfsl.fit.run import Run
from fastfsl.fit.train import Reporter, SilentReporter, encode_plain


@dataclass(frozen=True)
class Samples:
    """What a run is judged on.

    Attributes:
        features: (n, d), of any length.
        labels: positions among the classifier's class names, (n,).
        num_unreadable: images that could not be decoded, not among them.
        num_excluded: images of a flat folder left out because they were the support.
        files: what became of every file; None for features.
        paths: of the images; empty for features.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    num_unreadable: int = 0
    num_excluded: int = 0
    files: dict[str, Any] | None = None
    paths: tuple[Path, ...] = ()

    def score(
        self,
        predicted: NDArray[np.int64],
        class_names: Sequence[str],
        probabilities: NDArray[np.floating] | None = None,
        threshold: float | None = None,
    ) -> Evaluation:
        """The score of class indices (n,), and of the probabilities (n, C) that they come from."""
        return score(
            predicted,
            self.labels,
            class_names,
            probabilities=probabilities,
            threshold=threshold,
            num_unreadable=self.num_unreadable,
            num_excluded=self.num_excluded,
            files=self.files,
        )


def evaluate_run(
    run: Run,
    data: Path,
    *,
    split: str = "test",
    classes: ClassSelection = "all",
    device: str = "auto",
    image_root: Path | None = None,
    columns: Columns | None = None,
    strict: bool = False,
    alpha: float | None = None,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
    dataset: ImageDataset | FeatureDataset | None = None,
    on_predicted: Callable[[Predicted], None] | None = None,
) -> Evaluation:
    """Score a run on a split, or on those of its samples that are of base or of new classes.

    Args:
        run: what to score.
        data: on what.
        split: `train`, `val` or `test`.
        classes: which classes of the data.
        device: device of the encoder.
        image_root: folder that the paths of a split file or table are relative to.
        columns: names of a table's columns.
        strict: refuse data of which files would be skipped that may have been meant.
        alpha: another weight of the tuned branch in a blend than that of the training.
        reporter: hears of progress and warnings.
        cache_dir: where features are kept between runs.
        dataset: what `data` holds of these classes, if it was read already.
        on_predicted: hears what the score is made of.

    Raises:
        ConfigError: if `alpha` is given and the run's encoder is no blend, or it is out of range.
        DataError: if the data are of another kind than the run's or have a class it does not know.
        BundleError: if the run's encoder can no longer be found as it was.
    """
    if dataset is None:
        dataset = select_classes(load_dataset(data, image_root, columns), classes)
    if alpha is not None and isinstance(dataset, FeatureDataset):
        raise ConfigError("alpha weighs the branches of the encoder, and features have left it: give it images")
    names, hears = run.record.class_names, reporter or SilentReporter()
    samples = samples_to_score(
        run,
        dataset,
        names,
        split,
        lambda: run_encoder(run, device=device, alpha=alpha),
        hears,
        cache_dir,
        strict=strict,
    )
    probabilities = run.probabilities(samples.features, lambda: base_encoder(run, device=device))
    if on_predicted is not None:
        zero_shot = _zero_shot_accuracy(run, dataset, samples, device, hears, cache_dir)
        on_predicted(Predicted(names, probabilities, samples.labels, samples.paths, zero_shot))
    return samples.score(probabilities.argmax(axis=1), names, probabilities, run.threshold)


def _zero_shot_accuracy(
    run: Run,
    dataset: ImageDataset | FeatureDataset,
    samples: Samples,
    device: str,
    reporter: Reporter,
    cache_dir: Path | None,
) -> float | None:
    """Accuracy of the class texts alone on the same samples; None where they are not at hand."""
    texts, features = run.texts, samples.features
    if isinstance(dataset, FeatureDataset):
        if texts is None and list(dataset.class_names) == list(run.record.class_names):
            texts = dataset.class_embeddings
    elif texts is None or run.source is not None:  # a run of an older version, or features of a tuned encoder
        encoder = base_encoder(run, device=device)
        texts = class_embeddings(encoder, run.record.class_names, run.record.config.templates)
        if run.source is not None:
            images = tuple(map(ImageSample, samples.paths, samples.labels.tolist()))
            features = encode_plain(
                encoder,
                images,
                cache_dir=cache_dir,
                progress=lambda done, total: reporter.stage("encoding for zero-shot", done, total),
            )
    return None if texts is None else text_accuracy(features, texts, samples.labels)


def samples_to_score(
    run: Run,
    dataset: ImageDataset | FeatureDataset,
    class_names: Sequence[str],
    split: str,
    encoder: Callable[[], Encoder],
    reporter: Reporter,
    cache_dir: Path | None = None,
    *,
    strict: bool = False,
) -> Samples:
    """A split's features, labelled by `class_names`.

    Args:
        run: whose encoder's features, and whose support is kept out.
        dataset: images or features.
        class_names: of the classifier.
        split: `train`, `val` or `test`.
        encoder: loads the run's encoder; called for images, once all else is known to be right.
        reporter: hears of progress and warnings.
        cache_dir: where features are kept between runs; by default the user's cache folder.
        strict: refuse data of which files would be skipped that may have been meant.

    Raises:
        DataError: if the data have a class that is not among them, the split is missing or nothing is left to score.
        ShapeError: if features are of another width than the run's.
    """
    if isinstance(dataset, FeatureDataset):
        return Samples(*features_to_score(dataset, split, class_names, run.record.embed_dim))
    images = images_to_score(dataset, split, class_names, set(run.record.support_digests), reporter.warn, strict=strict)
    features = encode_plain(
        encoder(),
        images.samples,
        cache_dir=cache_dir,
        progress=lambda done, total: reporter.stage("encoding", done, total),
    )
    labels = np.array([sample.label for sample in images.samples], dtype=np.int64)
    paths = tuple(sample.path for sample in images.samples)
    return Samples(features, labels, images.num_unreadable, images.num_excluded, images.files, paths)


def run_encoder(run: Run, *, device: str = "cpu", alpha: float | None = None) -> Encoder:
    """The encoder whose features a run's estimator takes: tuned, where the method tunes it.

    Args:
        run: the run.
        device: torch device.
        alpha: another weight of the tuned branch in a blend than that of the training.

    Raises:
        ConfigError: if `alpha` is given and the encoder is no blend, or it is out of range.
        DataError: if the run was trained on features.
        BundleError: if the weights found now, or what they want done to an image, are not those of the training.
    """
    if alpha is not None and (not isinstance(run.source, MPS) or not 0 <= alpha <= 1):
        if isinstance(run.source, MPS):
            raise ConfigError(f"expected alpha from 0 to 1, got {alpha}")
        raise ConfigError(f"alpha weighs the two branches of mps, and this run's method is {run.record.config.method}")
    return run.tuned(base_encoder(run, device=device), alpha)


def base_encoder(run: Run, *, device: str = "cpu") -> Encoder:
    """The encoder that a run's training began with.

    Raises:
        DataError: if the run was trained on features.
        BundleError: if the weights found now, or what they want done to an image, are not those of the training.
    """
    record = run.record.encoder
    if record is None:
        raise DataError("this run was trained on a feature file and knows no encoder: give it features, not images")
    encoder = load_encoder(record.backbone, record.pretrained, device)
    if encoder.digest != record.digest:
        raise BundleError(
            f"the weights of {record.backbone} ({record.pretrained}) are not those this run was trained with "
            f"(expected digest {record.digest[:12]}, got {encoder.digest[:12]}): restore the checkpoint or train again"
        )
    if encoder.preprocessing.to_dict() != record.preprocessing:
        raise BundleError(
            f"{record.backbone} ({record.pretrained}) prepares images differently than when this run was trained "
            f"(expected {record.preprocessing}, got {encoder.preprocessing.to_dict()}): restore its "
            "open_clip_config.json or train again"
        )
    return encoder
