"""Base and new classes: a method learns the first half of the classes and is asked about the rest.

Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", section 4.1.
"""

from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np

from fastfsl.data.dataset import FeatureDataset, ImageDataset, ImageSample
from fastfsl.data.skipped import OTHER_CLASSES
from fastfsl.errors import ConfigError, DataError

ClassSelection = Literal["all", "base", "new"]

_Dataset = TypeVar("_Dataset", bound=ImageDataset | FeatureDataset)


def select_classes(dataset: _Dataset, classes: ClassSelection) -> _Dataset:
    """The part of a data set that has some of its classes: `base`, the first ceil(C/2) labels, or `new`, the others.

    Args:
        dataset: Images or features.
        classes: Which; `all` gives the data set as it is.

    Returns:
        A data set of the same kind, labels counted from 0 again. A split in which nothing is left is gone.

    Raises:
        ConfigError: No such selection.
        DataError: Fewer than two classes would be left.
    """
    if classes == "all":
        return dataset
    if classes not in ("base", "new"):
        raise ConfigError(f"expected classes 'all', 'base' or 'new', got {classes!r}")
    num_classes = len(dataset.class_names)
    num_base = (num_classes + 1) // 2
    first, end = (0, num_base) if classes == "base" else (num_base, num_classes)
    if end - first < 2:
        raise DataError(
            f"{num_classes} classes leave {end - first} {classes} class, which there is nothing to tell from: "
            "base and new classes need a data set of four classes or more"
        )
    names = dataset.class_names[first:end]
    if isinstance(dataset, FeatureDataset):
        arrays = {}
        for split, (features, labels) in dataset.splits.items():
            kept = (labels >= first) & (labels < end)
            if kept.any():
                arrays[split] = features[kept], (labels[kept] - first).astype(np.int64)
        return replace(dataset, class_names=names, splits=arrays, class_embeddings=dataset.class_embeddings[first:end])
    samples = {
        split: tuple(ImageSample(item.path, item.label - first) for item in items if first <= item.label < end)
        for split, items in dataset.splits.items()
    }
    skipped = dataset.skipped.copy()
    for items in dataset.splits.values():
        left_out = [item.path for item in items if not first <= item.label < end]
        skipped.add(OTHER_CLASSES, left_out[0] if left_out else "", len(left_out))
    kept_splits = {split: items for split, items in samples.items() if items}
    return replace(dataset, class_names=names, splits=kept_splits, skipped=skipped)
