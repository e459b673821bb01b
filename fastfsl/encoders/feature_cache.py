"""A cache of image features on disk, keyed by content.

One folder per configuration (encoder, preparation of images, augmentation, seed); in it, shards: safetensors files
with the features of some (image, view) pairs, an image being the sha256 of its file's bytes. A shard is written whole
under a temporary name and renamed, so an interrupted run leaves what it had finished, and the next one goes on from
there. Nothing is ever changed in place: two processes may fill the same folder, and at worst both compute the same
feature. A shard that does not match its own checksum is dropped with a warning, and its features are computed again.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastfsl.errors import ConfigError, ResourceError, resource_error
from fastfsl.files import staged_file
from fastfsl.leftovers import sweep_leftovers

# Rows per shard: at d = 512 two megabytes; an interruption costs at most that many forward passes.
SHARD_ROWS = 1024

_FORMAT = "fastfsl-features-1"
_FloatArray = NDArray[np.float32]


def default_cache_dir() -> Path:
    """$FASTFSL_CACHE, or `fastfsl` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("FASTFSL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastfsl"


class FeatureCache:
    """Features of one configuration, by image and view. Use it as a context manager: leaving it writes the rest.

    Args:
        directory: Cache folder; see `default_cache_dir`.
        configuration: Everything that the features depend on beside the image and the view; JSON values.
        dim: Width d of the features.
    """

    def __init__(self, directory: Path, configuration: Mapping[str, Any], dim: int) -> None:
        text = json.dumps({"format": _FORMAT, **configuration}, sort_keys=True)
        self.folder = directory / "features" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._configuration = text
        self._dim = dim
        self._features: dict[tuple[str, int], _FloatArray] = {}
        self._unwritten: list[tuple[str, int]] = []
        self._writable = True

    def __enter__(self) -> Self:
        sweep_leftovers(self.folder)
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._read(shard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write()

    def get(self, image_sha256: str, view: int) -> _FloatArray | None:
        """The features (d,) of a view, or None."""
        return self._features.get((image_sha256, view))

    def add(self, image_sha256: str, view: int, features: _FloatArray) -> None:
        """Keep the features (d,) of a view; written with the next full shard."""
        self._features[image_sha256, view] = features
        self._unwritten.append((image_sha256, view))
        if len(self._unwritten) >= SHARD_ROWS:
            self._write()

    def _read(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("images", "views", "features")}
                checksum = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:  # another process has dropped it
            return
        except OSError as error:
            fault = resource_error(error, f"read {shard}")  # which the shard may have outlived
            if fault is not None:
                raise fault from error
            self._drop(shard, str(error))
            return
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._drop(shard, str(error))
            return
        images, views, features = arrays["images"], arrays["views"], arrays["features"]
        if checksum != _checksum(arrays) or features.shape != (len(images), self._dim) or len(views) != len(images):
            self._drop(shard, "its checksum or shapes are wrong")
            return
        for image, view, row in zip(images, views, features, strict=True):
            self._features[image.tobytes().hex(), int(view)] = row

    def _drop(self, shard: Path, reason: str) -> None:
        warnings.warn(f"cached features in {shard} are damaged ({reason}): computing them again", stacklevel=4)
        try:
            shard.unlink(missing_ok=True)
        except OSError:  # a read-only cache keeps its damaged shard; it is passed over every time
            return

    def _write(self) -> None:
        if not self._unwritten or not self._writable:
            return
        arrays: dict[str, NDArray[Any]] = {
            "images": np.stack([np.frombuffer(bytes.fromhex(image), dtype=np.uint8) for image, _ in self._unwritten]),
            "views": np.array([view for _, view in self._unwritten], dtype=np.int32),
            "features": np.stack([self._features[key] for key in self._unwritten]).astype(np.float32),
        }
        content = save(arrays, metadata={"format": _FORMAT, "sha256": _checksum(arrays)})
        try:
            description = self.folder / "configuration.json"
            if not description.exists():
                with staged_file(description) as staging:
                    staging.write_text(self._configuration + "\n", encoding="utf-8")
            with staged_file(self.folder / f"{uuid4().hex}.safetensors") as staging:
                staging.write_bytes(content)
        except (ConfigError, ResourceError, OSError) as error:
            # The features are in memory, so the run goes on; only the next one will have to compute them again.
            self._writable = False
            warnings.warn(f"features cannot be cached ({error}): set FASTFSL_CACHE to a writable folder", stacklevel=3)
        self._unwritten.clear()


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in ("images", "views", "features"):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
