"""The same picture more than once: one file under two labels, one content in two files, one picture nearly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastfsl.arrays import unit
from fastfsl.data.dataset import FloatArray, ImageDataset, ImageSample, LabelArray

# Cosine of two features that are taken for the same image, resized or compressed again.
NEAR_COSINE = 0.999

# Beyond so many samples all pairs are no longer compared.
MAX_COMPARED = 20_000

_MAX_ENTRIES = 2**24
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Twins:
    """Groups of samples that are the same, or nearly, and of several classes.

    Attributes:
        groups: positions of the samples of each group.
        num_copies: samples that equal an earlier one of their own class.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    num_copies: int = 0


def one_path_two_labels(dataset: ImageDataset) -> list[str]:
    """A line for the files of a split that stand under several labels; folders have none but by links."""
    lines = []
    for split, samples in dataset.splits.items():
        labels: dict[Path, set[int]] = {}
        for sample in samples:
            labels.setdefault(sample.path, set()).add(sample.label)
        several = {path: found for path, found in labels.items() if len(found) > 1}
        if several:
            shown = [
                f"{path} ({', '.join(dataset.class_names[label] for label in sorted(found))})"
                for path, found in list(several.items())[:_NUM_SHOWN]
            ]
            more = f" and {len(several) - len(shown)} more" if len(several) > len(shown) else ""
            lines.append(f"{len(several)} {split} images stand under several labels: {'; '.join(shown)}{more}")
    paths = {split: {sample.path for sample in samples} for split, samples in dataset.splits.items()}
    for split in paths.keys() - {"train"}:
        both = sorted(paths[split] & paths.get("train", set()))
        if both:
            lines.append(
                f"{len(both)} images are both in train and in {split}, so accuracies are too high, such as {both[0]}"
            )
    return lines


def same_content(digests: Sequence[str], labels: LabelArray) -> Twins:
    """Samples whose files hold the same bytes."""
    places: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        places.setdefault(digest, []).append(position)
    groups, copies = [], 0
    for positions in places.values():
        classes = {int(labels[position]) for position in positions}
        copies += len(positions) - len(classes)
        if len(classes) > 1:
            groups.append(tuple(positions))
    return Twins(tuple(groups), copies)


def near_between_classes(features: FloatArray, labels: LabelArray) -> Twins:
    """Pairs of samples of different classes at a cosine above `NEAR_COSINE`.

    Args:
        features: (n, d), of any length.
        labels: (n,).
    """
    rows = unit(features, "features").astype(np.float32)
    step = max(1, _MAX_ENTRIES // max(1, len(rows)))
    pairs: list[tuple[int, ...]] = []
    for top in range(0, len(rows), step):
        near = rows[top : top + step] @ rows.T > NEAR_COSINE
        near &= labels[top : top + step, None] != labels[None, :]
        first, second = np.nonzero(near)
        pairs += [(int(one + top), int(other)) for one, other in zip(first, second, strict=True) if one + top < other]
    return Twins(tuple(pairs))


def support_warnings(
    samples: Sequence[ImageSample], digests: Sequence[str], features: FloatArray, class_names: Sequence[str]
) -> list[str]:
    """What to say of the images that a training learns from.

    Args:
        samples: the images.
        digests: of their files.
        features: (n, d), of the images as they are.
        class_names: by label.
    """
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    same = same_content(digests, labels)
    lines = []
    if same.groups:
        lines.append(
            f"{len(same.groups)} images are in several classes, byte for byte, and one of the labels is wrong: "
            f"{_shown(same.groups, samples, class_names)}"
        )
    if same.num_copies:
        lines.append(f"{same.num_copies} images are exact copies of others of their class: they count twice")
    if len(samples) <= MAX_COMPARED:
        known = [set(group) for group in same.groups]
        near = near_between_classes(features, labels).groups
        others = [pair for pair in near if not any(group.issuperset(pair) for group in known)]
        if others:
            lines.append(
                f"{len(others)} pairs of images of different classes are nearly the same picture (cosine above "
                f"{NEAR_COSINE}): {_shown(others, samples, class_names)}"
            )
    return lines


def _shown(groups: Sequence[tuple[int, ...]], samples: Sequence[ImageSample], class_names: Sequence[str]) -> str:
    shown = [
        " = ".join(
            f"{samples[position].path} ({class_names[samples[position].label]})" for position in group[:_NUM_SHOWN]
        )
        for group in groups[:_NUM_SHOWN]
    ]
    return "; ".join(shown) + (f" and {len(groups) - len(shown)} more" if len(groups) > len(shown) else "")
