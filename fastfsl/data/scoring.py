"""What an evaluation scores, and the score: the one place that reads test labels."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.arrays import unit
from fastfsl.data.dataset import FeatureDataset, FloatArray, ImageDataset, ImageSample, LabelArray
from fastfsl.data.readable import check_readable
from fastfsl.data.skipped import OTHER_SPLIT, SUPPORT, UNREADABLE, Skipped, ending, file_account, some
from fastfsl.errors import DataError, ShapeError, resource_error


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what.

    Attributes:
        accuracy: fraction of samples classified right.
        macro_accuracy: mean over classes of their accuracy.
        class_accuracy: by class name; classes without a sample are left out.
        calibration_error: expected calibration error (`calibration_error`), where probabilities were at hand.
        threshold: probability below which the classifier answers "none of these"; None: it always answers.
        coverage: fraction of samples answered, where there is a threshold.
        precision: fraction of the answers that are right, where there is a threshold and an answer.
        num_samples: samples scored.
        num_unreadable: images that could not be decoded; they are not in `num_samples`.
        num_excluded: images of a flat folder left out because they were the support.
        files: what became of every file of the data (`file_account`); None of a feature file.
    """

    accuracy: float
    macro_accuracy: float
    class_accuracy: dict[str, float]
    calibration_error: float | None
    threshold: float | None
    coverage: float | None
    precision: float | None
    num_samples: int
    num_unreadable: int = 0
    num_excluded: int = 0
    files: dict[str, Any] | None = None


@dataclass(frozen=True)
class ImagesToScore:
    """Images to score: readable, of the right classes and not seen in training."""

    samples: tuple[ImageSample, ...]
    num_unreadable: int
    num_excluded: int
    files: dict[str, Any]


def features_to_score(
    dataset: FeatureDataset, split: str, class_names: Sequence[str], embed_dim: int
) -> tuple[FloatArray, LabelArray]:
    """Features (n, d) of a split and their labels among the classifier's classes.

    Raises:
        DataError: if the data have a class that the classifier does not know.
        ShapeError: if the width differs.
    """
    positions = label_map(dataset.class_names, class_names)
    features, labels = dataset.split(split)
    if features.shape[-1] != embed_dim:
        raise ShapeError(f"expected features of width {embed_dim}, got {features.shape[-1]}: use the same encoder")
    if features.ndim == 3:  # as in training: the mean of the views' directions
        features = unit(features, "features").mean(axis=1)
    return features, positions[labels]


def images_to_score(
    dataset: ImageDataset,
    split: str,
    class_names: Sequence[str],
    support_digests: set[str],
    warn: Callable[[str], None],
    *,
    strict: bool = False,
) -> ImagesToScore:
    """Readable images of a split, labelled by the classifier's classes; of a flat folder, those not trained on.

    Args:
        dataset: the images.
        split: which split.
        class_names: of the classifier.
        support_digests: SHA-256 of the images trained on.
        warn: is told what was skipped, and what else a user should know.
        strict: refuse data of which files would be skipped that may have been meant.

    Raises:
        DataError: if the data have an unknown class, the split is missing or nothing is left to score; with `strict`
            if a file would be skipped.
    """
    positions = label_map(dataset.class_names, class_names)
    flat = split == "test" and set(dataset.splits) == {"train"}
    own = "train" if flat else split
    dataset.skipped.check(strict=strict)
    chosen, damaged = check_readable(dataset.split(own), dataset.class_names)
    skipped = skipped_in_all(dataset, own, damaged, warn, strict=strict)
    for note in dataset.notes:
        warn(note)
    seen = [sample for sample in chosen if digest_of(sample.path) in support_digests]
    excluded = 0
    if seen and flat:
        known = set(seen)
        chosen = tuple(sample for sample in chosen if sample not in known)
        excluded = len(seen)
        skipped.add(SUPPORT, seen[0].path, excluded)
    elif seen and split != "train":
        warn(
            f"{len(seen)} of the {len(chosen)} images were in the support set (such as {seen[0].path}): "
            "the accuracy is too high"
        )
    if not chosen:
        raise DataError(
            f"every image of {dataset.root} was trained on, none is left to score: "
            "train with fewer --shots, or evaluate on a folder with test/"
        )
    samples = tuple(ImageSample(sample.path, int(positions[sample.label])) for sample in chosen)
    account = file_account(len(samples), skipped)
    return ImagesToScore(samples, num_unreadable=len(damaged), num_excluded=excluded, files=account)


def skipped_in_all(
    dataset: ImageDataset,
    split: str,
    damaged: Sequence[tuple[Path, str]],
    warn: Callable[[str], None],
    *,
    strict: bool,
) -> Skipped:
    """Files of a data set that are not among the readable images of a split, of which the user is told.

    Args:
        dataset: the images.
        split: the one that is used.
        damaged: images that cannot be read, with the reason.
        warn: is told of them, and of what was passed over.
        strict: refuse them.

    Raises:
        DataError: there are some that may have been meant, and `strict` is set.
    """
    skipped = dataset.skipped.copy()
    seen = len(skipped) + sum(map(len, dataset.splits.values()))
    line = skipped.warning(seen)
    if line is not None:
        warn(line)
    for path, reason in damaged:
        warn(f"skipped {path}: {reason}")
        skipped.add(UNREADABLE, path, detail=ending(path.name))
    skipped.check(strict=strict)
    for other, samples in dataset.splits.items():
        if other != split and samples:
            skipped.add(OTHER_SPLIT, samples[0].path, len(samples), detail=other)
    return skipped


def score(
    predicted: LabelArray,
    labels: LabelArray,
    class_names: Sequence[str],
    *,
    probabilities: NDArray[np.floating] | None = None,
    threshold: float | None = None,
    num_unreadable: int = 0,
    num_excluded: int = 0,
    files: dict[str, Any] | None = None,
) -> Evaluation:
    """Accuracy over all, by class, and the mean over classes.

    Args:
        predicted: class indices, (n,).
        labels: class indices, (n,).
        class_names: by index.
        probabilities: (n, C), if their calibration is to be told.
        threshold: if the classifier answers only what is at least this probable; takes probabilities.
        num_unreadable: images left out because they could not be decoded.
        num_excluded: images left out because they were the support.
        files: what became of every file.
    """
    right = predicted == labels
    known = None if probabilities is None or threshold is None else probabilities.max(axis=1) >= threshold
    by_class = {class_names[label]: float(right[labels == label].mean()) for label in np.unique(labels)}
    return Evaluation(
        accuracy=float(right.mean()),
        macro_accuracy=float(np.mean(list(by_class.values()))),
        class_accuracy=by_class,
        calibration_error=None if probabilities is None else calibration_error(probabilities, labels),
        threshold=threshold,
        coverage=None if known is None else float(known.mean()),
        precision=None if known is None or not known.any() else float(right[known].mean()),
        num_samples=len(labels),
        num_unreadable=num_unreadable,
        num_excluded=num_excluded,
        files=files,
    )


def calibration_error(probabilities: NDArray[np.floating], labels: LabelArray, num_bins: int = 15) -> float:
    """Expected calibration error: how far the probability of the chosen class is from how often it is right.

        ECE = Σ_b (n_b / n) |accuracy of bin b - mean top probability of bin b|,   bins of equal width over (0, 1].

    Args:
        probabilities: (n, C), rows sum to 1.
        labels: class indices, (n,).
        num_bins: number of bins.

    Source: Guo et al. (arXiv 1706.04599), section 2.
    """
    top = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(top * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - top, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def negative_log_likelihood(probabilities: NDArray[np.floating], labels: LabelArray) -> float:
    """Mean of -log of the right class's probability, nats; what underflowed to 0 counts as the smallest float32."""
    of_right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_right, np.finfo(np.float32).tiny)).mean())


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hex.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise resource_error(error, f"read {path}") or DataError(
            f"cannot read {path}: {error.strerror or error}"
        ) from error


def label_map(found: tuple[str, ...], expected: Sequence[str]) -> LabelArray:
    """Where each class of the data stands among the classifier's classes, (C of the data,)."""
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise DataError(
            f"the data have classes that the classifier does not know: {some(unexpected)}; "
            f"expected classes among its {len(expected)}: {some(expected)}"
        )
    return np.array([list(expected).index(name) for name in found], dtype=np.int64)
