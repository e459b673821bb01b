"""From anything a caller may hand over to batches of prepared pixels, decoded on a few threads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from fastfsl.errors import DataError, ShapeError
from fastfsl.images import Preprocessing, open_image, preprocess, source_name
from fastfsl.runtime.threads import available_cpus

# Decoding keeps about this many processors busy beside the encoder before memory bandwidth becomes the limit.
MAX_WORKERS = 8


class ImageReader:
    """Decodes and prepares images for one encoder; several threads may share it.

    Args:
        preprocessing: what the encoder wants.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        # Pillow releases the interpreter lock while it decodes and resizes. Threads start with the first batch.
        self._pool = ThreadPoolExecutor(min(MAX_WORKERS, available_cpus()), thread_name_prefix="fastfsl-images")

    def read(
        self, sources: list[Any]
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[DataError | ShapeError | None]]:
        """Prepare a batch.

        Args:
            sources: paths, bytes, PIL images or uint8 arrays.

        Returns:
            uint8 pixels of shape (number of readable images, height, width, 3), and for each source its error or None.
        """
        # One image is not worth a hand-over to another thread.
        outcomes = [self._read_one(sources[0])] if len(sources) == 1 else list(self._pool.map(self._read_one, sources))
        height, width = self._preprocessing.image_size
        pixels = [outcome for outcome in outcomes if isinstance(outcome, np.ndarray)]
        errors = [None if isinstance(outcome, np.ndarray) else outcome for outcome in outcomes]
        return (np.stack(pixels) if pixels else np.empty((0, height, width, 3), np.uint8)), errors

    def _read_one(self, source: Any) -> np.ndarray[Any, np.dtype[np.uint8]] | DataError | ShapeError:  # noqa: ANN401 - checked by open_image
        try:
            image = open_image(source)
        except (DataError, ShapeError) as error:
            return error
        try:
            return preprocess(image, self._preprocessing)
        except DataError as error:
            return DataError(f"{source_name(source)}: {error}")


def image_items(images: Any) -> Iterable[Any]:  # noqa: ANN401 - anything: what is no image is refused one by one
    """The images of one call: a single image becomes a list of one, a sequence or iterator is taken as it is.

    A uint8 array of four dimensions is a batch (n, H, W, channels).
    """
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview):
        return [images]
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not hasattr(images, "tobytes"):
        return images
    return [images]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to ``size`` consecutive items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
