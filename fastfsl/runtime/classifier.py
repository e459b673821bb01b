"""The classifier: a bundle, loaded once, called from any thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastfsl import bundle
from fastfsl.errors import BundleError, ConfigError, DataError, ShapeError
from fastfsl.images import Preprocessing
from fastfsl.runtime.head import Head
from fastfsl.runtime.image_reader import ImageReader, chunks, image_items
from fastfsl.runtime.prediction import Prediction, rank, softmax
from fastfsl.runtime.session import (
    Session,
    check_count,
    check_graph,
    create_row_session,
    installed_onnxruntimes,
    run_finite,
)

if TYPE_CHECKING:
    from fastfsl.images import ImageSource

    Images = ImageSource | Iterable[ImageSource]

# Embeddings computed at once: at 256 the weights are read once for many rows and the activations still fit in a cache.
_ROWS_AT_ONCE = 256


class Classifier:
    """Classifies images, or embeddings, with a bundle. Make one with ``Classifier.load``.

    All methods may be called from several threads at once. ONNX Runtime sessions do not survive ``fork``: in worker
    processes load the classifier after the start, or use the spawn method.
    """

    def __init__(
        self,
        manifest: bundle.Manifest,
        head: Head,
        visual: Session | None,
        reader: ImageReader | None,
        *,
        max_batch: int,
        origin: dict[str, Any],
    ) -> None:
        self._manifest = manifest
        self._head = head
        self._visual = visual
        self._reader = reader
        self._max_batch = max_batch
        self._origin = origin

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        num_threads: int | None = None,
        max_batch: int = 32,
    ) -> Classifier:
        """Check a bundle completely and load it.

        Args:
            path: the bundle's folder.
            device: "cpu"; "cuda", which fails unless every part really runs there; "auto", CUDA where it comes up.
            num_threads: threads of one operator of a graph on the CPU; None uses all this process may use. The
                read-out of a bundle that has one is computed by numpy, whose threads the process sets for itself
                (OMP_NUM_THREADS or OPENBLAS_NUM_THREADS, before numpy is imported).
            max_batch: largest number of images computed at once; it bounds the memory. Embeddings, which are small,
                are computed 256 at once, or `max_batch` if that is more.

        Raises:
            BundleError: the bundle is incomplete, altered, or of an unknown version.
            DeviceError: CUDA was asked for and did not come up, or both onnxruntime packages are installed.
            ConfigError: an option is out of range, or onnxruntime is not installed.
        """
        check_count("max_batch", max_batch)
        manifest = bundle.read_manifest(path)
        for name in manifest.files:
            if name not in (bundle.VISUAL_GRAPH, bundle.FLOW_GRAPH, bundle.READOUT):  # these are checked when read
                bundle.check_file(path, manifest, name)

        def create(model: bytes, name: str) -> Session:
            return create_row_session(model, name, device=device, num_threads=num_threads)

        head = Head.load(path, manifest, create)
        visual, reader = None, None
        if manifest.preprocessing is not None:
            try:
                preprocessing = Preprocessing.from_dict(manifest.preprocessing)
            except DataError as error:
                raise BundleError(f"{Path(path) / bundle.MANIFEST_NAME}: {error}; export the bundle again") from error
            reader = ImageReader(preprocessing)
            file = Path(path) / bundle.VISUAL_GRAPH
            visual = create(bundle.read_file(path, manifest, bundle.VISUAL_GRAPH), str(file))
            shape = [*preprocessing.image_size, 3]
            check_graph(file, visual, {"images": shape}, {"image_embeds": [manifest.embed_dim]})
        origin = {
            "bundle": os.fspath(path),
            "digest": bundle.bundle_digest(path),
            "device": device,
            "num_threads": num_threads,
        }
        return cls(manifest, head, visual, reader, max_batch=max_batch, origin=origin)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One label per class, in the order of the columns of ``probabilities``."""
        return self._manifest.class_names

    def predict(
        self, images: Images, *, top_k: int = 5, on_error: Literal["raise", "mark"] = "raise"
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: one image or any number: paths, bytes of image files, PIL images, uint8 arrays (H, W, 3).
            top_k: classes per image; more than there are means all.
            on_error: "raise" on the first unreadable image, or "mark" its prediction with the error and go on.

        Returns:
            One prediction per image, in order.

        Raises:
            DataError: an image cannot be read (it is named), or the bundle holds no image encoder.
            ShapeError: an array of another shape or dtype.
            ConfigError: an option is out of range.
        """
        check_count("top_k", top_k)
        if on_error not in ("raise", "mark"):
            raise ConfigError(f"on_error must be 'raise' or 'mark', got {on_error!r}")
        _, reader = self._encoder()
        predictions: list[Prediction] = []
        for chunk in chunks(image_items(images), self._max_batch):
            pixels, errors = reader.read(chunk)
            if on_error == "raise":
                _raise_first(errors)
            ranked = iter(self._rank(self._logits(self._embed_pixels(pixels)), top_k))
            predictions.extend(
                next(ranked) if error is None else Prediction((), (), error=str(error)) for error in errors
            )
        return predictions

    def probabilities(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Softmax probabilities of every class, (n, C) float32. Images and errors as for ``predict``."""
        parts = [softmax(self._logits(part)) for part in self._embedded(images)]
        return _stack(parts, len(self.class_names))

    def embed(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The encoder's L2-normalised embeddings, (n, d) float32. Images and errors as for ``predict``."""
        return _stack(list(self._embedded(images)), self._manifest.embed_dim)

    def transport(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:  # noqa: ANN401 - any array-like
        """Where the flow carries embeddings: L2-normalised, (n, d) float32. Without a flow they stay where they are.

        Args:
            features: (n, d) or (d,), of any length but zero; they are normalised first.

        Raises:
            ShapeError: another shape, or no numbers.
            DataError: NaN, infinite or all-zero rows; they are named.
        """
        rows = self._rows(features)
        parts = [self._head.transport(rows[part]) for part in self._slices(len(rows))]
        return _stack(parts, self._manifest.embed_dim)

    def classify_features(self, features: Any, *, top_k: int = 5) -> list[Prediction]:  # noqa: ANN401 - any array-like
        """Classify embeddings; features and errors as for ``transport``, ``top_k`` as for ``predict``."""
        check_count("top_k", top_k)
        return [prediction for logits in self._feature_logits(features) for prediction in self._rank(logits, top_k)]

    def feature_probabilities(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:  # noqa: ANN401 - any array-like
        """Softmax probabilities of every class, (n, C) float32. Features and errors as for ``transport``."""
        return _stack([softmax(logits) for logits in self._feature_logits(features)], len(self.class_names))

    def describe(self) -> dict[str, Any]:
        """What is loaded and what runs where, as JSON values.

        ``providers`` holds, for each graph, the execution providers its session really has, best first; ``readout``
        what numpy computes: the weight of the flow's logits, whether there is a linear part, the kernels, temperature
        and threshold, or None if the logits are simply the flow's.
        """
        manifest, readout = self._manifest, self._head.readout
        sessions = {"visual": self._visual, "flow": self._head.flow}
        return {
            **self._origin,
            "max_batch": self._max_batch,
            "method": manifest.method,
            "num_classes": len(manifest.class_names),
            "embed_dim": manifest.embed_dim,
            "num_steps": manifest.num_steps,
            "step_size": manifest.step_size,
            "read_steps": list(manifest.read_steps),
            "readout": None if readout is None else readout.describe(),
            "precision": manifest.precision,
            "encoder": manifest.encoder,
            "preprocessing": manifest.preprocessing,
            "providers": {name: session.get_providers() for name, session in sessions.items() if session is not None},
            "files": {name: entry["size"] for name, entry in manifest.files.items()},
            "onnxruntime": installed_onnxruntimes(),
        }

    def _encoder(self) -> tuple[Session, ImageReader]:
        if self._visual is None or self._reader is None:
            raise DataError(
                "this bundle was trained on features and holds no image encoder; pass embeddings of the same encoder "
                "to classify_features, feature_probabilities or transport"
            )
        return self._visual, self._reader

    def _embedded(self, images: Images) -> Iterable[np.ndarray[Any, Any]]:
        _, reader = self._encoder()
        for chunk in chunks(image_items(images), self._max_batch):
            pixels, errors = reader.read(chunk)
            _raise_first(errors)
            yield self._embed_pixels(pixels)

    def _embed_pixels(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        visual, _ = self._encoder()
        if len(pixels) == 0:
            return np.empty((0, self._manifest.embed_dim), np.float32)
        return run_finite(visual, "image_embeds", {"images": pixels})

    def _logits(self, embeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(embeds) == 0:
            return np.empty((0, len(self.class_names)), np.float32)
        return self._head.logits(embeds)

    def _rank(self, logits: np.ndarray[Any, Any], top_k: int) -> list[Prediction]:
        return rank(logits, self.class_names, top_k, threshold=self._head.threshold)

    def _feature_logits(self, features: object) -> Iterable[np.ndarray[Any, Any]]:
        rows = self._rows(features)
        return [self._logits(rows[part]) for part in self._slices(len(rows))]

    def _slices(self, count: int) -> list[slice]:
        step = max(self._max_batch, _ROWS_AT_ONCE)
        return [slice(start, start + step) for start in range(0, count, step)]

    def _rows(self, features: object) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Checked features as L2-normalised float32 rows.

        The norm is taken in float64, so that very long and very short features neither over- nor underflow.
        """
        width = self._manifest.embed_dim
        try:
            array = np.asarray(features)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that cannot become arrays
            raise ShapeError(f"features must be an array of numbers of shape (n, {width}): {error}") from error
        if array.ndim > 0 and len(array) == 0:
            return np.empty((0, width), np.float32)
        if array.dtype.kind not in "fiu":
            raise ShapeError(f"features must be numbers, got dtype {array.dtype}")
        rows = array.astype(np.float64)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ShapeError(f"features must have shape (n, {width}) or ({width},), got {array.shape}")
        _refuse_rows(np.logical_not(np.isfinite(rows).all(axis=1)), "NaN or infinite values")
        longest = np.abs(rows).max(axis=1, keepdims=True)
        _refuse_rows(longest[:, 0] == 0, "nothing but zeros, which have no direction")
        rows /= longest
        unit: np.ndarray[Any, np.dtype[np.float32]] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit.astype(np.float32)


def _refuse_rows(bad: np.ndarray[Any, Any], what: str) -> None:
    if bad.any():
        named = ", ".join(map(str, np.flatnonzero(bad)[:5]))
        raise DataError(f"{int(bad.sum())} feature rows hold {what} (rows {named}, counted from 0); leave them out")


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _stack(parts: list[np.ndarray[Any, Any]], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)
