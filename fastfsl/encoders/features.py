"""Features of image files: of the images as they are, or of augmented views; computed once, then cached."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastfsl.encoders.augmentation import Augmentation, augmented_view, seed_of_view
from fastfsl.encoders.encoder import Encoder
from fastfsl.encoders.feature_cache import FeatureCache, default_cache_dir
from fastfsl.errors import ConfigError, DataError, resource_error
from fastfsl.images import open_image

_FloatArray = NDArray[np.float32]
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Task:
    """Views of one image that are still to be computed."""

    path: Path
    sha256: str
    views: tuple[int, ...]


def extract_features(
    encoder: Encoder,
    images: Sequence[str | Path],
    num_views: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
    progress: _Progress | None = None,
) -> _FloatArray:
    """Embed image files.

    Args:
        encoder: The model.
        images: n image files; the same content may come more than once.
        num_views: Augmented views per image V; 0: the image itself, by the model's evaluation transform, as one view.
        augmentation: How views vary; default `Augmentation()`. Unused with `num_views` 0.
        seed: Seed of the views; non-negative. Unused with `num_views` 0.
        cache_dir: Cache folder; default `default_cache_dir()`.
        batch_size: Views per forward pass.
        progress: Called with (views done, views in all), first with those found in the cache.

    Returns:
        Features (n, V, d), or (n, 1, d) with `num_views` 0; L2-normalised if the encoder is `normalized`. View v of an
        image is the same whatever `num_views` is.

    Raises:
        DataError: An image that is missing or cannot be decoded; it is named.
        ConfigError: A negative number of views or seed, or a batch size below 1.
    """
    if num_views < 0 or seed < 0 or batch_size < 1:
        raise ConfigError(
            f"expected num_views >= 0, seed >= 0 and batch_size >= 1, got {num_views}, {seed} and {batch_size}"
        )
    if num_views:
        augmentation = augmentation or Augmentation()
    else:
        augmentation = None
    paths = [Path(image) for image in images]
    views = range(max(1, num_views))
    configuration = {
        "encoder": encoder.digest,
        "preprocessing": encoder.preprocessing.to_dict(),
        "augmentation": augmentation.to_dict() if augmentation else None,
        "seed": seed if augmentation else None,
    }
    directory = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    with (
        ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool,
        FeatureCache(directory, configuration, encoder.embed_dim) as cache,
    ):
        digests = list(pool.map(_sha256, paths))
        repeats = Counter(digests)
        tasks = _missing(dict(zip(digests, paths, strict=True)), views, cache, batch_size)
        total = len(paths) * len(views)
        done = total - sum(repeats[task.sha256] * len(task.views) for task in tasks)
        if progress is not None:
            progress(done, total)
        for keys, pixels in _batches(pool, tasks, partial(_decode, encoder, augmentation, seed), batch_size):
            for (sha256, view), row in zip(keys, _forward(encoder, pixels), strict=True):
                cache.add(sha256, view, row)
                done += repeats[sha256]
            if progress is not None:
                progress(done, total)
        features = np.empty((len(paths), len(views), encoder.embed_dim), dtype=np.float32)
        for index, digest in enumerate(digests):
            for view in views:
                features[index, view] = cache.get(digest, view)
    return features


def _missing(path_of: Mapping[str, Path], views: range, cache: FeatureCache, batch_size: int) -> list[_Task]:
    """What the cache lacks, each content once, in pieces of at most one batch."""
    tasks = []
    for sha256, path in path_of.items():
        missing = [view for view in views if cache.get(sha256, view) is None]
        starts = range(0, len(missing), batch_size)
        tasks += [_Task(path, sha256, tuple(missing[start : start + batch_size])) for start in starts]
    return tasks


def _decode(encoder: Encoder, augmentation: Augmentation | None, seed: int, task: _Task) -> list[torch.Tensor]:
    """The task's views as normalised pixels, each (3, height, width)."""
    image = open_image(task.path)
    if augmentation is None:
        return [encoder.transform(image)]
    return [
        augmented_view(image, augmentation, encoder.preprocessing, seed_of_view(seed, task.sha256, view))
        for view in task.views
    ]


def _batches(
    pool: ThreadPoolExecutor,
    tasks: Sequence[_Task],
    decode: Callable[[_Task], list[torch.Tensor]],
    batch_size: int,
) -> Iterator[tuple[list[tuple[str, int]], torch.Tensor]]:
    """Decode ahead of the encoder, by about one batch, and hand out batches with their (image, view) keys."""
    waiting = iter(tasks)
    decoding: deque[tuple[_Task, Future[list[torch.Tensor]]]] = deque()
    views_decoding = 0
    keys: list[tuple[str, int]] = []
    pixels: list[torch.Tensor] = []
    try:
        while True:
            while views_decoding < 2 * batch_size and (task := next(waiting, None)) is not None:
                decoding.append((task, pool.submit(decode, task)))
                views_decoding += len(task.views)
            if not decoding:
                break
            task, future = decoding.popleft()
            pixels += future.result()
            keys += [(task.sha256, view) for view in task.views]
            views_decoding -= len(task.views)
            while len(keys) >= batch_size:
                yield keys[:batch_size], torch.stack(pixels[:batch_size])
                del keys[:batch_size], pixels[:batch_size]
        if keys:
            yield keys, torch.stack(pixels)
    finally:
        for _, future in decoding:
            future.cancel()


def _forward(encoder: Encoder, pixels: torch.Tensor) -> _FloatArray:
    features: _FloatArray = encoder.encode_images(pixels).cpu().numpy()
    if not np.isfinite(features).all():
        raise ConfigError(f"encoder {encoder.backbone} gave NaN or infinite features: check its weights")
    return features


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise resource_error(error, f"read the image {path}") or DataError(
            f"image {path} cannot be read: {error.strerror or error}"
        ) from error
