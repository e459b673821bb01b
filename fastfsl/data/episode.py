"""Few-shot episodes: which images of the train split a run learns from, drawn by seed and kept as JSON.

Every class is drawn by itself, from the stream PCG64(SeedSequence([seed, label])): each image gets a 64-bit key,
and the `num_shots` smallest keys win. numpy guarantees the raw streams of bit generators and SeedSequence (NEP
19), which it does not for `Generator.permutation`: so the same seed means the same images under every numpy.
The episodes of one seed are nested: the images of 1 shot are among those of 4.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from fastfsl.data.dataset import FeatureDataset, ImageDataset
from fastfsl.errors import ConfigError, DataError, ShapeError, resource_error
from fastfsl.files import staged_file

_FORMAT = "fastfsl-episode"
_VERSION = 1


@dataclass(frozen=True)
class Episode:
    """One draw from a train split.

    Attributes:
        num_shots: Images per class; None: all there are.
        seed: Seed of the draw.
        class_names: Names, position = label.
        indices: Positions in the train split, by label and then ascending.
        items: What stands there: paths relative to the data set's root, or the positions as text for feature files.
    """

    num_shots: int | None
    seed: int
    class_names: tuple[str, ...]
    indices: tuple[int, ...]
    items: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write the episode as JSON, whole or not at all.

        Raises:
            ConfigError: The file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "num_shots": self.num_shots,
            "seed": self.seed,
            "class_names": list(self.class_names),
            "indices": list(self.indices),
            "items": list(self.items),
        }
        with staged_file(Path(path)) as staging:
            staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an episode written by `save`.

        Raises:
            DataError: Missing file, or not an episode file of this version.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise resource_error(error, f"read {path}") or DataError(
                f"episode file {path} cannot be read: {error.strerror or error}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not an episode file ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise DataError(f'{path} is not an episode file: expected "format": "{_FORMAT}", "version": {_VERSION}')
        episode = cls(
            _field(path, content, "num_shots", optional=True),
            _field(path, content, "seed"),
            tuple(_list_field(path, content, "class_names", str)),
            tuple(_list_field(path, content, "indices", int)),
            tuple(_list_field(path, content, "items", str)),
        )
        if len(episode.indices) != len(episode.items) or len(set(episode.indices)) != len(episode.indices):
            raise DataError(
                f"{path}: {len(episode.indices)} indices and {len(episode.items)} items: expected as many, each once"
            )
        return episode

    def check(self, dataset: ImageDataset | FeatureDataset) -> None:
        """Check that the data set still has these items where the episode says.

        Raises:
            DataError: The classes or the train split have changed since the episode was drawn.
        """
        if self.class_names != dataset.class_names:
            raise DataError("the episode was drawn from a data set with other classes: draw it again")
        items = _items(dataset)
        for index, item in zip(self.indices, self.items, strict=True):
            if index >= len(items) or items[index] != item:
                raise DataError(
                    f"the train split has changed: {item!r} is no longer number {index}; draw the episode again"
                )


def sample_episode(
    labels: ArrayLike,
    num_shots: int | None,
    seed: int,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    items: Sequence[str] | None = None,
    exact: bool = False,
) -> Episode:
    """Draw up to `num_shots` samples of every class.

    Args:
        labels: Labels of the train split, (n,) integers in [0, num_classes).
        num_shots: Most samples per class, at least 1; None: all of them. A class that has fewer gives what it has.
        seed: Non-negative integer.
        num_classes: Number of classes C.
        class_names: C names for the record and for error messages; default "class 0", ...
        items: n names for the record; default the positions.
        exact: Refuse classes with fewer samples.

    Returns:
        The episode; its indices are ordered by label, ascending within a label.

    Raises:
        DataError: Classes without a sample, or if `exact` is set with fewer than `num_shots`; named with their counts.
        ShapeError: `labels` is not a vector of integers.
        ConfigError: `num_shots` below 1 or a negative seed.
    """
    label_array = np.asarray(labels)
    if label_array.ndim != 1 or (label_array.size and label_array.dtype.kind not in "iu"):
        raise ShapeError(f"labels have shape {label_array.shape} and type {label_array.dtype}, expected (n,) integers")
    if num_shots is not None and num_shots < 1:
        raise ConfigError(f"shots per class: expected at least 1, got {num_shots}")
    if seed < 0:
        raise ConfigError(f"seed: expected a number from 0 up, got {seed}")
    if label_array.size and not 0 <= label_array.min() <= label_array.max() < num_classes:
        raise DataError(f"labels span {label_array.min()}..{label_array.max()}, expected 0..{num_classes - 1}")
    names = tuple(class_names) if class_names is not None else tuple(f"class {label}" for label in range(num_classes))
    by_label = [np.flatnonzero(label_array == label) for label in range(num_classes)]
    _check_counts(names, [len(members) for members in by_label], num_shots if exact else None)

    indices: list[int] = []
    for label, members in enumerate(by_label):
        keys = np.random.PCG64(np.random.SeedSequence([seed, label])).random_raw(len(members))
        drawn = members[np.argsort(keys, kind="stable")[:num_shots]]
        indices += sorted(int(index) for index in drawn)
    chosen = tuple(items[index] if items is not None else str(index) for index in indices)
    return Episode(num_shots, seed, names, tuple(indices), chosen)


def draw_episode(
    dataset: ImageDataset | FeatureDataset, num_shots: int | None, seed: int, *, exact: bool = False
) -> Episode:
    """`sample_episode` on a data set's train split, with its names and items.

    Raises:
        DataError: No train split, or classes with too few samples: with none, or if `exact` is set with fewer than
            `num_shots`.
        ConfigError: `num_shots` below 1 or a negative seed.
    """
    return sample_episode(
        dataset.labels("train"),
        num_shots,
        seed,
        len(dataset.class_names),
        class_names=dataset.class_names,
        items=_items(dataset),
        exact=exact,
    )


def _items(dataset: ImageDataset | FeatureDataset) -> tuple[str, ...]:
    if isinstance(dataset, ImageDataset):
        return tuple(dataset.item(sample) for sample in dataset.split("train"))
    return tuple(str(index) for index in range(len(dataset.labels("train"))))


def _check_counts(names: Sequence[str], counts: Sequence[int], num_shots: int | None) -> None:
    needed = num_shots or 1
    short = [f"{name!r} ({count})" for name, count in zip(names, counts, strict=True) if count < needed]
    if short:
        shown = ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")
        least = min(counts)
        advice = (
            f"ask for at most {least} shots, for up to {needed} (without --exact-shots), or add images"
            if least
            else "add images or remove the class"
        )
        raise DataError(f"fewer than {needed} train images in {len(short)} of {len(counts)} classes: {shown}; {advice}")


def _field(path: Path, content: dict[str, Any], name: str, *, optional: bool = False) -> Any:  # noqa: ANN401  # int, or None where optional
    value = content.get(name)
    if (optional and value is None) or (type(value) is int and value >= 0):
        return value
    raise DataError(f'{path}: "{name}" is missing or not a number from 0 up')


def _list_field(path: Path, content: dict[str, Any], name: str, kind: type) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise DataError(f'{path}: "{name}" is missing or not a list of {kind.__name__}')
    if kind is int and any(entry < 0 for entry in value):
        raise DataError(f'{path}: "{name}" has negative entries')
    return value
