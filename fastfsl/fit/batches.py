"""What a training loop is fed: the samples in a new order every epoch, each in some views.

Order and views are functions of (seed, epoch, sample) alone, so that an epoch can be entered anywhere and every process
of several sees the same one.
"""

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from fastfsl.encoders import Augmentation
from fastfsl.encoders.augmentation import augmented_view, seed_of_view
from fastfsl.errors import ConfigError, ShapeError
from fastfsl.fit.processes import ALONE, Processes
from fastfsl.images import Preprocessing, open_image

# Decoded images kept in memory: at 500 x 375 pixels, three bytes each, 1900 of them.
MAX_DECODED_BYTES = 2**30

_BATCHES_AHEAD = 2

# More would take the processor from the training where that is on it, too.
_MAX_THREADS = 8


class Batches(Protocol):
    """A training set in batches. The last one of an epoch may be smaller, or left out (`num_batches`)."""

    @property
    def num_samples(self) -> int:
        """Samples n."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over them."""

    def epoch(
        self, number: int, *, first: int = 0, processes: Processes = ALONE
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches of epoch `number`, from batch `first` on: inputs and labels.

        Of several processes each gets the inputs of its share of the batch only, or of one sample where its share is
        empty; the labels are always those of the whole batch.
        """


def derived_seed(*parts: object) -> int:
    """A seed of torch's generators from anything with a name and numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def num_batches(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Batches of one pass over the samples.

    Args:
        num_samples: n.
        batch_size: samples a batch.
        drop_last: whether a last, smaller batch is left out; the only one never is.
    """
    return max(1, num_samples // batch_size) if drop_last else math.ceil(num_samples / batch_size)


class _Shuffled:
    """Labels, batch size and the order of an epoch."""

    def __init__(
        self, labels: ArrayLike | Tensor, num_samples: int, batch_size: int, seed: int, *, drop_last: bool
    ) -> None:
        self._labels = torch.as_tensor(labels, dtype=torch.int64)
        if self._labels.shape != (num_samples,) or num_samples == 0:
            raise ShapeError(
                f"expected one label a sample and at least one, got {num_samples} and {tuple(self._labels.shape)}"
            )
        if batch_size < 1:
            raise ConfigError(f"expected batch_size >= 1, got {batch_size}")
        self._batch_size = batch_size
        self._seed = seed
        self._drop_last = drop_last

    @property
    def num_samples(self) -> int:
        return len(self._labels)

    @property
    def batches_per_epoch(self) -> int:
        return num_batches(self.num_samples, self._batch_size, drop_last=self._drop_last)

    def _generator(self, purpose: str, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(purpose, self._seed, epoch))

    def _indices(self, epoch: int, first: int, processes: Processes) -> list[tuple[Tensor, Tensor]]:
        """By batch the samples of the share, one at least, and those of the whole batch."""
        order = torch.randperm(self.num_samples, generator=self._generator("order", epoch))
        shares = []
        for batch in order.split(self._batch_size)[first : self.batches_per_epoch]:
            share = processes.share(len(batch))
            shares.append((batch[share.start : max(share.stop, share.start + 1)], batch))
        return shares


class FeatureBatches(_Shuffled):
    """Features of some views, of which every epoch draws some for each sample.

    Args:
        features: (n, V', d).
        labels: class indices, (n,).
        num_views: views V of a sample in one batch, all different; at most V'.
        batch_size: samples a batch.
        seed: seed of the order and of the views drawn.
        drop_last: whether the last, smaller batch of an epoch is left out (`num_batches`).
    """

    def __init__(
        self,
        features: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        *,
        num_views: int = 1,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self._features = torch.as_tensor(features)
        if self._features.ndim != 3:
            raise ShapeError(f"expected features (n, V, d), got {tuple(self._features.shape)}")
        super().__init__(labels, len(self._features), batch_size, seed, drop_last=drop_last)
        if not 1 <= num_views <= self._features.shape[1]:
            raise ConfigError(f"expected num_views in 1..{self._features.shape[1]}, the views given, got {num_views}")
        self._num_views = num_views

    def epoch(
        self, number: int, *, first: int = 0, processes: Processes = ALONE
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Inputs (n, V, d) and labels (n,); see `Batches`."""
        chances = torch.rand(self._features.shape[:2], generator=self._generator("views", number))
        views = chances.argsort(dim=1)[:, : self._num_views]
        for mine, batch in self._indices(number, first, processes):
            yield self._features[mine[:, None], views[mine]], self._labels[batch]


class ImageBatches(_Shuffled):
    """Image files, of which every epoch takes new augmented views, prepared on threads ahead of the training.

    Args:
        paths: n image files.
        labels: class indices, (n,).
        preprocessing: what the encoder does with an image before its pixels go in.
        augmentation: how views vary.
        num_views: views V of a sample in one batch.
        batch_size: samples a batch.
        seed: seed of the order and of the views.
        drop_last: whether the last, smaller batch of an epoch is left out (`num_batches`).
        max_decoded_bytes: decoded images are kept in memory up to this; the others are decoded again every epoch.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: ArrayLike | Tensor,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        *,
        num_views: int = 1,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        super().__init__(labels, len(paths), batch_size, seed, drop_last=drop_last)
        if num_views < 1:
            raise ConfigError(f"expected num_views >= 1, got {num_views}")
        self._paths = [Path(path) for path in paths]
        self._preprocessing = preprocessing
        self._augmentation = augmentation
        self._num_views = num_views
        self._room = max_decoded_bytes
        self._lock = threading.Lock()
        self._digests: dict[int, str] = {}
        self._decoded: dict[int, Image.Image] = {}

    def epoch(
        self, number: int, *, first: int = 0, processes: Processes = ALONE
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Inputs (n, V, 3, height, width), normalised, fp32, and labels (n,); see `Batches`.

        Raises:
            DataError: an image that is missing or cannot be decoded; it is named.
        """
        ahead: deque[tuple[list[Future[Tensor]], Tensor]] = deque()
        with ThreadPoolExecutor(max_workers=min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            try:
                for mine, batch in self._indices(number, first, processes):
                    ahead.append(([pool.submit(self._views, index, number) for index in mine.tolist()], batch))
                    if len(ahead) > _BATCHES_AHEAD:
                        yield self._collect(*ahead.popleft())
                while ahead:
                    yield self._collect(*ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _collect(self, views: list[Future[Tensor]], batch: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([future.result() for future in views]), self._labels[batch]

    def _views(self, index: int, epoch: int) -> Tensor:
        """The views of one sample in one epoch, (V, 3, height, width)."""
        image, digest = self._image(index)
        first = epoch * self._num_views
        seeds = [seed_of_view(self._seed, digest, first + view) for view in range(self._num_views)]
        return torch.stack([augmented_view(image, self._augmentation, self._preprocessing, seed) for seed in seeds])

    def _image(self, index: int) -> tuple[Image.Image, str]:
        """A sample's image and the sha256 of its file."""
        if index in self._decoded:
            return self._decoded[index], self._digests[index]
        path = self._paths[index]
        image = open_image(path)
        if index not in self._digests:
            with path.open("rb") as file:
                self._digests[index] = hashlib.file_digest(file, "sha256").hexdigest()
        size = image.width * image.height * len(image.getbands())
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._decoded[index] = image
        return image, self._digests[index]
