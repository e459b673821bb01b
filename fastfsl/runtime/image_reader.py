"""From anything a caller may hand over to batches of prepared pixels, decoded on a few threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any

import numpy as np

from fastfsl.errors import ClosedError, ConfigError, DataError, ShapeError, memory_error, resource_error
from fastfsl.images import PREPROCESS, Preprocessing, source_name
from fastfsl.runtime.forking import forks, undisturbed
from fastfsl.runtime.metrics import UNHEARD
from fastfsl.runtime.session import MAX_THREADS, check_count
from fastfsl.runtime.threads import available_cpus
from fastfsl.runtime.worker_pool import WorkerPool

# Decoding keeps about this many processors busy beside the encoder before memory bandwidth becomes the limit.
MAX_WORKERS = 8

# Batches whose images are read while the one before them is computed. One hides the reading; more would only hold more.
LOOK_AHEAD = 1

Errors = list[DataError | ShapeError | None]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class ImageReader:
    """Decodes and prepares images for one encoder; several threads may share it.

    Args:
        preprocessing: what the encoder wants.
        preprocess: "exact", open_clip's pixels bit for bit, or "fast", which decodes large JPEGs at a fraction of
            their size.
        threads: that decode; None: one a processor, up to 8.
    """

    def __init__(self, preprocessing: Preprocessing, *, preprocess: str = "exact", threads: int | None = None) -> None:
        self.preprocess = preprocess
        self.threads = min(MAX_WORKERS, available_cpus()) if threads is None else threads
        self._preprocessing = preprocessing
        self._prepare = PREPROCESS[preprocess]
        self.metrics = UNHEARD  # hears how long each image takes
        # Pillow releases the interpreter lock while it decodes and resizes. Threads start with the first batch.
        self._pool = WorkerPool(self.threads, "fastfsl-images")

    def close(self, *, wait: bool = True) -> None:
        """Let the threads end once the images they are on are read. No image may be handed over afterwards.

        Args:
            wait: until they have ended; not from a callback on one of them.
        """
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def read_one(self, source: Any) -> Pixels:  # noqa: ANN401 - checked by open_image
        """One image's uint8 pixels (height, width, 3), decoded on the caller's thread.

        Raises:
            DataError: the image cannot be read; it is named.
            ShapeError: an array of another shape or dtype.
            ResourceError: the machine has no memory or file handles left, or its storage fails.
        """
        try:
            with undisturbed, self.metrics.timed("decode"):
                return self._prepare(source, self._preprocessing)
        except MemoryError as error:
            raise memory_error(f"read the image {source_name(source)}") from error

    def submit(self, source: Any) -> Future[Pixels]:  # noqa: ANN401 - checked by open_image
        """The same on a thread of the pool."""
        return self._hand_over(self.read_one, source)

    def _hand_over(self, work: Callable[[Any], Any], item: object) -> Future[Any]:
        try:
            return self._pool.submit(work, item)
        except RuntimeError as error:
            fault = resource_error(error, "decode images")  # no thread can be had
            if fault is None:
                raise
            raise fault from error

    def batches(self, sources: Iterable[Any], size: int) -> Generator[tuple[Pixels, Errors]]:
        """Prepare images batch by batch; while the caller works on one, the next is being read.

        At most ``size`` * (1 + LOOK_AHEAD) images are held, however many there are. An error that ``sources`` itself
        raises comes after the batches that were complete by then.

        Args:
            sources: paths, bytes, PIL images or uint8 arrays.
            size: images in a batch; the last may have fewer.

        Yields:
            uint8 pixels of shape (number of readable images, height, width, 3), and for each source its error or None.
        """
        lists = chunks(sources, size)
        reading: deque[_Batch] = deque()
        failure: Exception | None = None
        exhausted = False
        process = forks()
        try:
            while True:
                while not exhausted and len(reading) <= LOOK_AHEAD:
                    try:
                        images = next(lists, None)
                    except Exception as error:  # noqa: BLE001 - whatever the caller's iterator raises is raised below
                        failure, images = error, None
                    exhausted = images is None
                    if images is not None:
                        reading.append(self._start(images, here=len(images) == 1 and not reading))
                if forks() != process:
                    raise ClosedError(
                        "the process forked while these images were read, and the threads that read them are the "
                        "other one's; ask again in this one"
                    )
                if not reading:
                    break
                batch = reading[0].result()
                reading.popleft()
                yield batch
        finally:
            for waiting in reading if forks() == process else ():
                waiting.cancel()
        if failure is not None:
            raise failure

    def _start(self, sources: list[Any], *, here: bool) -> _Batch:
        """Begin to read a batch. A single image is not worth a hand-over: it is read ``here``, when it is asked for."""
        pixels = np.empty((len(sources), *self._preprocessing.image_size, 3), np.uint8)

        def read(index: int) -> DataError | ShapeError | None:
            try:
                pixels[index] = self.read_one(sources[index])
            except (DataError, ShapeError) as error:
                return _without_frames(error)
            return None

        return _Batch(pixels, read, None if here else [self._hand_over(read, index) for index in range(len(sources))])


class _Batch:
    """Images being read into the rows of one array.

    Args:
        pixels: the array.
        read: fills a row, or returns the error.
        futures: of the rows' errors; None: they are read on the thread that asks for the result.
    """

    def __init__(
        self,
        pixels: Pixels,
        read: Callable[[int], DataError | ShapeError | None],
        futures: list[Future[DataError | ShapeError | None]] | None,
    ) -> None:
        self._pixels = pixels
        self._read = read
        self._futures = futures

    def result(self) -> tuple[Pixels, Errors]:
        """The readable images, and an error or None for each."""
        if self._futures is None:
            errors = [self._read(index) for index in range(len(self._pixels))]
        else:
            errors = [future.result() for future in self._futures]
        good = [index for index, error in enumerate(errors) if error is None]
        return (self._pixels if len(good) == len(errors) else self._pixels[good]), errors

    def cancel(self) -> None:
        """Read no image that is not being read already."""
        for future in self._futures or ():
            future.cancel()


def _without_frames(error: DataError | ShapeError) -> DataError | ShapeError:
    """The error without the frames it passed, which would keep the pixels of its batch until the garbage collector."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def check_reading(preprocess: str, image_threads: int | None) -> int | None:
    """The number of threads, as a plain int; refuses options of `Classifier.load` that no reader takes.

    Raises:
        ConfigError: names the option.
    """
    if preprocess not in PREPROCESS:
        raise ConfigError(f"preprocess must be one of {', '.join(PREPROCESS)}, got {preprocess!r}")
    if image_threads is None:
        return None
    threads = check_count("image_threads", image_threads)
    if threads > MAX_THREADS:
        raise ConfigError(f"image_threads must be at most {MAX_THREADS}, got {threads}")
    return threads


def image_items(images: Any) -> Iterable[Any]:  # noqa: ANN401 - anything: what is no image is refused one by one
    """The images of one call: a single image becomes a list of one, a sequence or iterator is taken as it is.

    A uint8 array of four dimensions is a batch (n, H, W, channels).
    """
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview):
        return [images]
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not hasattr(images, "tobytes") and not hasattr(images, "read"):
        return images
    return [images]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to ``size`` consecutive items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
