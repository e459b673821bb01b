"""What a run was trained on, found again: for whatever has to be measured after the training, and not on test data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastfsl.arrays import unit
from fastfsl.data import FeatureDataset
from fastfsl.data.scoring import digest_of
from fastfsl.errors import DataError, FastFSLError
from fastfsl.fit.run import Run


@dataclass(frozen=True)
class SupportSet:
    """The support, in the episode's order.

    Attributes:
        labels: class indices, (n,).
        paths: image files, or None.
        features: unit features (n, d) of a run on features, or None.
    """

    labels: NDArray[np.int64]
    paths: tuple[Path, ...] | None = None
    features: NDArray[np.float32] | None = None

    def spread(self, count: int) -> "SupportSet":
        """At most `count` of them, evenly spread, so that every class has its share."""
        if len(self.labels) <= count:
            return self
        chosen = np.linspace(0, len(self.labels) - 1, count).round().astype(np.int64)
        paths = None if self.paths is None else tuple(self.paths[index] for index in chosen)
        return SupportSet(self.labels[chosen], paths, None if self.features is None else self.features[chosen])


def support_set(run: Run) -> SupportSet:
    """The images, or features, that a run was trained on, as they are.

    Raises:
        DataError: they are not where they were, or no longer what they were.
    """
    config, record = run.record.config, run.record
    try:
        dataset = config.dataset(Path(record.data_path))
        run.episode.check(dataset)
    except FastFSLError as error:
        raise DataError(
            f"the data this run was trained on are not at {record.data_path} as they were ({error}): put them back, "
            "run this from the folder that the training was started in, or train again"
        ) from error
    index = np.array(run.episode.indices)
    if isinstance(dataset, FeatureDataset):
        features, labels = dataset.split("train")
        directions = unit(features[index], "features")
        rows = directions if directions.ndim == 2 else unit(directions.mean(axis=1), "features")
        return SupportSet(labels[index], features=rows.astype(np.float32))
    known, split = set(record.support_digests), dataset.split("train")
    samples = [split[position] for position in run.episode.indices]
    samples = [sample for sample in samples if digest_of(sample.path) in known]
    if len(samples) != len(record.support_digests):
        raise DataError(
            f"of the {len(record.support_digests)} images this run was trained on, {len(samples)} are in "
            f"{record.data_path} as they were: put them back, or train again"
        )
    return SupportSet(
        np.array([sample.label for sample in samples], np.int64), tuple(sample.path for sample in samples)
    )
