"""The classifier: a bundle, loaded once, called from any thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastfsl import bundle
from fastfsl.errors import ConfigError, DataError
from fastfsl.runtime.feature_rows import feature_rows
from fastfsl.runtime.flow_executor import FLOWS
from fastfsl.runtime.head import Head
from fastfsl.runtime.image_encoder import ImageEncoder, blend_weight
from fastfsl.runtime.image_reader import chunks, image_items
from fastfsl.runtime.prediction import Prediction, rank, softmax
from fastfsl.runtime.session import Session, check_count, create_row_session, installed_onnxruntimes

if TYPE_CHECKING:
    from fastfsl.images import ImageSource
    from fastfsl.runtime.cuda_driver import Device

    Images = ImageSource | Iterable[ImageSource]

# Embeddings computed at once: at 256 the weights are read once for many rows and the activations still fit in a cache.
_ROWS_AT_ONCE = 256


class Classifier:
    """Classifies images, or embeddings, with a bundle. Make one with ``Classifier.load``.

    All methods may be called from several threads at once. Neither ONNX Runtime sessions nor CUDA survive ``fork``: in
    worker processes load the classifier after the start, or use the spawn method.
    """

    def __init__(
        self,
        manifest: bundle.Manifest,
        head: Head,
        encoder: ImageEncoder | None,
        *,
        max_batch: int,
        origin: dict[str, Any],
    ) -> None:
        self._manifest = manifest
        self._head = head
        self._image_encoder = encoder
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
        alpha: float | None = None,
        flow: str = "auto",
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
            alpha: weight, from 0 to 1, of the tuned image tower in its blend with the frozen one, where the bundle's
                encoder is such a blend; None: the bundle's own.
            flow: what computes the flow. "auto": the bundle's compiled kernels where a card runs them and they give
                what the ONNX graph gives, else that graph, and `describe()["flow"]` and the log say why; "compiled":
                the kernels, or an error; "onnx": the graph.

        Raises:
            BundleError: the bundle is incomplete, altered, or of an unknown version.
            DeviceError: CUDA or compiled kernels were asked for and did not come up, or both onnxruntime packages are
                installed.
            ConfigError: an option is out of range, or onnxruntime is not installed.
        """
        check_count("max_batch", max_batch)
        if flow not in FLOWS:
            raise ConfigError(f"flow must be one of {', '.join(FLOWS)}, got {flow!r}")
        manifest = bundle.read_manifest(path)
        weight = blend_weight(manifest, alpha)
        for name in manifest.files:
            if name not in (bundle.VISUAL_GRAPH, bundle.FLOW_GRAPH, bundle.READOUT):  # these are checked when read
                bundle.check_file(path, manifest, name)

        def create(model: bytes, name: str, card: Device | None = None) -> Session:
            return create_row_session(model, name, device=device, num_threads=num_threads, card=card)

        head = Head.load(path, manifest, create, device=device, flow=flow)
        # On the stream of the compiled flow, if there is one: the embeddings then stay on the card.
        card = None if head.flow is None else head.flow.card
        encoder = ImageEncoder.load(path, manifest, lambda model, name: create(model, name, card), weight)
        origin = {
            "bundle": os.fspath(path),
            "digest": bundle.bundle_digest(path),
            "device": device,
            "num_threads": num_threads,
            "blend": None if manifest.blend is None else {**manifest.blend, "alpha": weight},
        }
        return cls(manifest, head, encoder, max_batch=max_batch, origin=origin)

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
        encoder = self._encoder()
        predictions: list[Prediction] = []
        for chunk in chunks(image_items(images), self._max_batch):
            pixels, errors = encoder.reader.read(chunk)
            if on_error == "raise":
                _raise_first(errors)
            ranked = iter(self._rank(self._image_logits(encoder, pixels), top_k))
            predictions.extend(
                next(ranked) if error is None else Prediction((), (), error=str(error)) for error in errors
            )
        return predictions

    def probabilities(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Softmax probabilities of every class, (n, C) float32. Images and errors as for ``predict``."""
        encoder = self._encoder()
        parts = [softmax(self._image_logits(encoder, pixels)) for pixels in self._pixels(encoder, images)]
        return _stack(parts, len(self.class_names))

    def embed(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The encoder's embeddings, (n, d) float32. Images and errors as for ``predict``.

        They are L2-normalised, but for those of a bundle whose blend is not (``describe()["blend"]["normalized"]``):
        alpha * tuned + (1 - alpha) * frozen as it is, at most 1 long.
        """
        encoder = self._encoder()
        parts = [encoder.embed(pixels) for pixels in self._pixels(encoder, images)]
        return _stack(parts, self._manifest.embed_dim)

    def transport(self, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:  # noqa: ANN401 - any array-like
        """Where the flow carries embeddings: L2-normalised, (n, d) float32. Without a flow they stay where they are.

        Args:
            features: (n, d) or (d,), of any length but zero; they are normalised first. Of a bundle whose blend is not
                normalised they are taken as ``embed`` gives them, at most 1 long.

        Raises:
            ShapeError: another shape, or no numbers.
            DataError: NaN, infinite, all-zero or, of such a blend, longer rows; they are named.
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

        ``providers`` holds, for each graph, the execution providers its session really has, best first; ``flow`` what
        computes the flow, "onnxruntime" or e.g. "compiled sm_90", and the reason, or None without a flow; ``readout``
        what numpy computes: the weight of the flow's logits, whether there is a linear part, the kernels, temperature
        and threshold, or None if the logits are simply the flow's; ``blend`` the weight in use, and whether the blend
        is normalised, or None if the encoder is no blend.
        """
        manifest, readout = self._manifest, self._head.readout
        encoder, flow = self._image_encoder, self._head.flow
        sessions = {
            "visual": None if encoder is None else encoder.session,
            "flow": None if flow is None else flow.session,
        }
        return {
            **self._origin,
            "max_batch": self._max_batch,
            "method": manifest.method,
            "num_classes": len(manifest.class_names),
            "embed_dim": manifest.embed_dim,
            "num_steps": manifest.num_steps,
            "step_size": manifest.step_size,
            "read_steps": list(manifest.read_steps),
            "flow": None if flow is None else flow.describe(),
            "readout": None if readout is None else readout.describe(),
            "precision": manifest.precision,
            "encoder": manifest.encoder,
            "preprocessing": manifest.preprocessing,
            "providers": {name: session.get_providers() for name, session in sessions.items() if session is not None},
            "files": {name: entry["size"] for name, entry in manifest.files.items()},
            "onnxruntime": installed_onnxruntimes(),
        }

    def _encoder(self) -> ImageEncoder:
        if self._image_encoder is None:
            raise DataError(
                "this bundle was trained on features and holds no image encoder; pass embeddings of the same encoder "
                "to classify_features, feature_probabilities or transport"
            )
        return self._image_encoder

    def _pixels(self, encoder: ImageEncoder, images: Images) -> Iterable[np.ndarray[Any, Any]]:
        for chunk in chunks(image_items(images), self._max_batch):
            pixels, errors = encoder.reader.read(chunk)
            _raise_first(errors)
            yield pixels

    def _image_logits(self, encoder: ImageEncoder, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(pixels) == 0:
            return np.empty((0, len(self.class_names)), np.float32)
        return self._head.image_logits(encoder, pixels)

    def _rank(self, logits: np.ndarray[Any, Any], top_k: int) -> list[Prediction]:
        return rank(logits, self.class_names, top_k, threshold=self._head.threshold)

    def _feature_logits(self, features: object) -> Iterable[np.ndarray[Any, Any]]:
        rows = self._rows(features)
        return [self._head.logits(rows[part]) for part in self._slices(len(rows))]

    def _slices(self, count: int) -> list[slice]:
        step = max(self._max_batch, _ROWS_AT_ONCE)
        return [slice(start, start + step) for start in range(0, count, step)]

    def _rows(self, features: object) -> np.ndarray[Any, np.dtype[np.float32]]:
        blend = self._manifest.blend
        return feature_rows(features, self._manifest.embed_dim, normalized=blend is None or blend["normalized"])


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _stack(parts: list[np.ndarray[Any, Any]], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)
