"""From embeddings to logits: the flow, the read-out, or the one and then the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl import bundle
from fastfsl.errors import BundleError, DeviceError
from fastfsl.runtime.flow_executor import FlowExecutor
from fastfsl.runtime.forking import undisturbed
from fastfsl.runtime.metrics import UNHEARD, Metrics
from fastfsl.runtime.session import check_graph, run_rows

if TYPE_CHECKING:
    from fastfsl.runtime.image_encoder import ImageEncoder
    from fastfsl.runtime.session import Session

    Rows = np.ndarray[Any, np.dtype[np.float32]]


class Head:
    """What a bundle does with an embedding. Several threads may call it.

    Args:
        flow: what computes the flow.
        readout: the read-out; None: the logits are the flow's.
        class_names: one label per logit, so that who holds a head knows what its logits are of.

    One of the first two may be None. A head never changes: more classes make another one.
    """

    def __init__(
        self, flow: FlowExecutor | None, readout: bundle.Readout | None, class_names: tuple[str, ...] = ()
    ) -> None:
        self.flow = flow
        self.readout = readout
        self.class_names = class_names

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        manifest: bundle.Manifest,
        create: Callable[[bytes, str], Session],
        *,
        device: str = "auto",
        flow: str = "auto",
    ) -> Head:
        """Read a bundle's flow and read-out, checked against its manifest.

        Args:
            path: the bundle's folder.
            manifest: its manifest.
            create: makes a session of a graph's bytes and the name that messages call it.
            device: "auto", "cpu" or "cuda".
            flow: what is to compute the flow; see `FlowExecutor.open`.

        Raises:
            BundleError: a file is altered, or is not what the manifest or the other one promises.
            DeviceError: compiled kernels were asked for and cannot be used.
        """
        width, classes = manifest.embed_dim, len(manifest.class_names)
        executor = None
        if bundle.FLOW_GRAPH in manifest.files:
            file = Path(path) / bundle.FLOW_GRAPH
            session = create(bundle.read_file(path, manifest, bundle.FLOW_GRAPH), str(file))
            check_graph(file, session, {"image_embeds": [width]}, {"features": [width], "logits": [classes]})
            # The graph leaves the number of classes open, so one row has to be computed to see it.
            logits = run_rows(session, "logits", {"image_embeds": np.eye(1, width, dtype=np.float32)})
            if logits.shape != (1, classes):
                raise BundleError(
                    f"{file}: gives {logits.shape[-1]} logits for {classes} class names; export the bundle again"
                )
            executor = FlowExecutor.open(path, manifest, session, device=device, flow=flow)
        elif flow == "compiled":
            raise DeviceError("flow='compiled': the bundle has no flow; choose 'auto'")
        return cls(executor, bundle.load_readout(path, manifest), manifest.class_names)

    @property
    def threshold(self) -> float | None:
        """Probability of the best class below which the answer is "none of these"; None: there is no such answer."""
        return None if self.readout is None else self.readout.threshold

    def logits(self, embeds: Rows) -> Rows:
        """Logits (n, C) of unit embeddings (n, d), n above 0."""
        return self._read_out(embeds, None if self.flow is None else self.flow.logits(embeds))

    def image_logits(
        self, encoder: ImageEncoder, pixels: np.ndarray[Any, np.dtype[np.uint8]], metrics: Metrics = UNHEARD
    ) -> Rows:
        """Logits (n, C) of prepared pixels (n, height, width, 3), n above 0; `metrics` hears how long it took."""
        if self.flow is not None:
            return self._read_out(*self.flow.image_logits(encoder, pixels, metrics))
        with metrics.timed("encode"):
            embeds = encoder.embed(pixels)
        return self.logits(embeds)

    def transport(self, embeds: Rows) -> Rows:
        """Where the flow carries unit embeddings (n, d), n above 0; without a flow they stay where they are."""
        return embeds if self.flow is None else self.flow.features(embeds)

    def _read_out(self, embeds: Rows, flow_logits: Rows | None) -> Rows:
        if self.readout is None:
            if flow_logits is None:
                raise BundleError("a head needs a flow, a read-out or both; export the bundle again")
            return flow_logits
        with undisturbed:
            logits = self.readout.apply(embeds, flow_logits)
        if not np.isfinite(logits).all():
            raise BundleError("the bundle's read-out gave NaN or infinite logits; export it again")
        return logits
