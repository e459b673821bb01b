"""From images to embeddings: the reader, the image tower's graph and, of a blend of two towers, the weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl import bundle
from fastfsl.bundle.untrusted import is_fraction
from fastfsl.errors import BundleError, ConfigError, DataError, DeviceError
from fastfsl.images import Preprocessing
from fastfsl.runtime.cuda_session import CudaSession
from fastfsl.runtime.image_reader import ImageReader
from fastfsl.runtime.row_parallel import ROWS_PER_THREAD
from fastfsl.runtime.session import check_graph, on_cpu, run_finite
from fastfsl.runtime.threads import available_cpus

if TYPE_CHECKING:
    from fastfsl.runtime.session import Session


class ImageEncoder:
    """A bundle's image encoder. Several threads may call it.

    Args:
        session: of the image tower's graph.
        reader: prepares what the tower gets.
        width: d, of the embeddings.
        alpha: weight of the tuned tower in a blend; None: the encoder is no blend.
        normalized: its embeddings are L2-normalised, which those of a blend need not be.
        num_threads: of the session on a CPU; None: as many as this process may use.
    """

    def __init__(
        self,
        session: Session,
        reader: ImageReader,
        width: int,
        alpha: float | None,
        *,
        normalized: bool = True,
        num_threads: int | None = None,
    ) -> None:
        self.session = session
        # On a CPU some images for every thread: what is computed of more at once no longer fits in its caches.
        self._at_once = ROWS_PER_THREAD * (num_threads or available_cpus()) if on_cpu(session) else None
        self.reader = reader
        self.normalized = normalized
        self._width = width
        self._scalars = {} if alpha is None else {"alpha": np.array(alpha, np.float32)}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        manifest: bundle.Manifest,
        create: Callable[[bytes, str], Session],
        alpha: float | None,
        *,
        preprocess: str = "exact",
        image_threads: int | None = None,
        num_threads: int | None = None,
    ) -> ImageEncoder | None:
        """Read a bundle's image encoder, checked against its manifest; None if it has none.

        Args:
            path: the bundle's folder.
            manifest: its manifest.
            create: makes a session of a graph's bytes and the name that messages call it.
            alpha: as `blend_weight` gives it.
            preprocess: as `ImageReader` takes it.
            image_threads: that decode images, likewise.
            num_threads: of the session on a CPU; None: as many as this process may use.

        Raises:
            BundleError: the graph is altered, or it or the preprocessing is not what the manifest promises.
        """
        if manifest.preprocessing is None:
            return None
        try:
            preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        except DataError as error:
            raise BundleError(f"{Path(path) / bundle.MANIFEST_NAME}: {error}; export the bundle again") from error
        file = Path(path) / bundle.VISUAL_GRAPH
        session = create(bundle.read_file(path, manifest, bundle.VISUAL_GRAPH), str(file))
        check_graph(file, session, {"images": [*preprocessing.image_size, 3]}, {"image_embeds": [manifest.embed_dim]})
        nodes = (*session.get_inputs(), *session.get_overridable_initializers())
        found = {node.name: (node.type, list(node.shape)) for node in nodes if node.name != "images"}
        expected: dict[str, tuple[str, list[int]]] = {} if manifest.blend is None else {"alpha": ("tensor(float)", [])}
        if found != expected:
            raise BundleError(
                f"{file}: expected, of an encoder whose blend is {manifest.blend}, the inputs {expected} besides "
                f"images, got {found}; export the bundle again"
            )
        normalized = manifest.blend is None or manifest.blend["normalized"]
        reader = ImageReader(preprocessing, preprocess=preprocess, threads=image_threads)
        return cls(session, reader, manifest.embed_dim, alpha, normalized=normalized, num_threads=num_threads)

    def embed(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Embeddings (n, d) of prepared pixels (n, height, width, 3), n from 0."""
        if len(pixels) == 0:
            return np.empty((0, self._width), np.float32)
        step = self._at_once or len(pixels)
        parts = [
            run_finite(self.session, "image_embeds", {"images": pixels[start : start + step], **self._scalars})
            for start in range(0, len(pixels), step)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def embed_into(self, pixels: np.ndarray[Any, np.dtype[np.uint8]], pointer: int) -> None:
        """Embeddings (n, d), n above 0, left at an address on the card that the session computes on."""
        if not isinstance(self.session, CudaSession):
            raise DeviceError("the image encoder does not compute on the card; choose device='cuda'")
        feed = {"images": pixels, **self._scalars}
        self.session.run_into("image_embeds", (len(pixels), self._width), pointer, feed)


def blend_weight(manifest: bundle.Manifest, alpha: object) -> float | None:
    """The weight of the tuned tower: the one asked for, or the manifest's; None where the encoder is no blend.

    Raises:
        ConfigError: the encoder is no blend and a weight was asked for, or it is no number from 0 to 1.
    """
    if manifest.blend is None:
        if alpha is not None:
            raise ConfigError(
                "alpha is the weight of the tuned tower in a blend with the frozen one, and this bundle's encoder is "
                f"no blend: leave alpha={alpha!r} out"
            )
        return None
    if alpha is None:
        alpha = manifest.blend["alpha"]
    weight: object = alpha.item() if isinstance(alpha, np.generic) else alpha
    if not isinstance(weight, int | float) or not is_fraction(weight):
        raise ConfigError(f"alpha must be a number from 0 (the frozen tower alone) to 1 (the tuned one), got {alpha!r}")
    return float(weight)
