"""What a classifier's calls compute, batch by batch, with the head that each of them began with."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.errors import DataError
from fastfsl.runtime.feature_rows import feature_rows
from fastfsl.runtime.head import Head
from fastfsl.runtime.image_encoder import ImageEncoder
from fastfsl.runtime.image_reader import image_items
from fastfsl.runtime.metrics import Metrics
from fastfsl.runtime.prediction import Prediction, rank

if TYPE_CHECKING:
    from fastfsl.images import ImageSource
    from fastfsl.runtime.loading import Loaded

    Images = ImageSource | Iterable[ImageSource]
    Pixels = np.ndarray[Any, np.dtype[np.uint8]]
    Rows = np.ndarray[Any, np.dtype[np.float32]]

# Embeddings computed at once: at 256 the weights are read once for many rows and the activations still fit in a cache.
_ROWS_AT_ONCE = 256


class Engine:
    """A loaded bundle at work. Several threads may call it.

    Args:
        loaded: the bundle.
        max_batch: most images computed at once.
        metrics: is told what happens.
    """

    def __init__(self, loaded: Loaded, max_batch: int, metrics: Metrics) -> None:
        self.embed_dim = loaded.manifest.embed_dim
        self._encoder = loaded.encoder
        self._max_batch = max_batch
        self._metrics = metrics
        blend = loaded.manifest.blend
        self._normalized = blend is None or bool(blend["normalized"])

    @property
    def encoder(self) -> ImageEncoder:
        """The image encoder.

        Raises:
            DataError: the bundle has none.
        """
        if self._encoder is None:
            raise DataError(
                "this bundle was trained on features and holds no image encoder; pass embeddings of the same encoder "
                "to classify_features, feature_probabilities or transport"
            )
        return self._encoder

    def predictions(
        self, head: Head, images: Images, top_k: int, *, mark: bool
    ) -> Generator[list[Prediction], None, None]:
        """Predictions of each batch of images; those that cannot be read are marked, or raise."""
        with closing(self.encoder.reader.batches(image_items(images), self._max_batch)) as batches:
            for pixels, errors in batches:
                self._count(errors, mark=mark)
                ranked = iter(self.answer(head, pixels, top_k))
                yield [next(ranked) if error is None else Prediction((), (), error=str(error)) for error in errors]

    def answer(self, head: Head, pixels: Pixels, top_k: int) -> list[Prediction]:
        """Predictions of prepared pixels (n, height, width, 3), n from 0."""
        return self.ranked(head, self._logits_of_pixels(head, pixels), top_k)

    def image_logits(self, head: Head, images: Images) -> Iterator[Rows]:
        """Logits (n, C) of each batch of images."""
        return (self._logits_of_pixels(head, pixels) for pixels in self._pixels(images))

    def embeddings(self, images: Images) -> Iterator[Rows]:
        """Embeddings (n, d) of each batch of images."""
        encoder = self.encoder
        for pixels in self._pixels(images):
            with self._metrics.timed("encode"):
                embeds = encoder.embed(pixels)
            self._metrics.batch(len(pixels))
            yield embeds

    def feature_logits(self, head: Head, features: object) -> Iterator[Rows]:
        """Logits (n, C) of each part of the features."""
        for rows in self.feature_parts(features):
            with self._metrics.timed("flow"):
                logits = head.logits(rows)
            yield logits

    def feature_parts(self, features: object) -> list[Rows]:
        """The features, checked, in parts that are computed at once."""
        rows = feature_rows(features, self.embed_dim, normalized=self._normalized)
        step = max(self._max_batch, _ROWS_AT_ONCE)
        return [rows[start : start + step] for start in range(0, len(rows), step)]

    @staticmethod
    def ranked(head: Head, logits: Rows, top_k: int) -> list[Prediction]:
        """The `top_k` best classes of each row of logits (n, C)."""
        return rank(logits, head.class_names, top_k, threshold=head.threshold)

    def _pixels(self, images: Images) -> Iterator[Pixels]:
        with closing(self.encoder.reader.batches(image_items(images), self._max_batch)) as batches:
            for pixels, errors in batches:
                self._count(errors, mark=False)
                yield pixels

    def _logits_of_pixels(self, head: Head, pixels: Pixels) -> Rows:
        if len(pixels) == 0:
            return np.empty((0, len(head.class_names)), np.float32)
        logits = head.image_logits(self.encoder, pixels, self._metrics)
        self._metrics.batch(len(pixels))
        return logits

    def _count(self, errors: Sequence[Exception | None], *, mark: bool) -> None:
        """Count the errors of a batch, or raise the first one."""
        for error in errors:
            if error is not None:
                self._metrics.count("errors", kind=type(error).__name__)
                if not mark:
                    # Another one: an error knows the frames it passes, and `errors`, which they know, would know it.
                    raise type(error)(*error.args) from error.__cause__
