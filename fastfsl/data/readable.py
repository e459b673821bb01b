"""Decode images before they are relied on, so that one damaged file costs a warning and not a run."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastfsl.data.dataset import ImageSample
from fastfsl.errors import DataError
from fastfsl.images import open_image


def check_readable(
    samples: Sequence[ImageSample],
    class_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[ImageSample, ...], tuple[tuple[Path, str], ...]]:
    """Decode every sample's image and tell the good from the bad.

    Args:
        samples: Images, such as an episode's support set.
        class_names: Names for the error message, position = label.
        progress: Called with (images done, images in all).

    Returns:
        The readable samples in their order, and the others as (path, reason).

    Raises:
        DataError: A class has samples but none that can be read; the class and the first reason are named.
    """
    good: list[ImageSample] = []
    bad: list[tuple[Path, str]] = []
    reasons: dict[int, str] = {}
    # Pillow decodes outside the interpreter lock, so threads help; a few suffice, and memory stays bounded.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for done, (sample, reason) in enumerate(zip(samples, pool.map(_damage, samples), strict=True), start=1):
            if reason is None:
                good.append(sample)
            else:
                bad.append((sample.path, reason))
                reasons.setdefault(sample.label, reason)
            if progress is not None:
                progress(done, len(samples))
    lost = sorted(reasons.keys() - {sample.label for sample in good})
    if lost:
        names = ", ".join(repr(class_names[label]) if class_names is not None else str(label) for label in lost)
        raise DataError(f"no readable image for class {names}: {reasons[lost[0]]}")
    return tuple(good), tuple(bad)


def _damage(sample: ImageSample) -> str | None:
    try:
        open_image(sample.path)
    except DataError as error:
        return str(error)
    return None
