"""What computes a bundle's flow: its compiled kernels where a card runs them, else its ONNX graph."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.errors import DeviceError
from fastfsl.runtime.arena import ROWS_AT_ONCE
from fastfsl.runtime.cuda_session import CudaSession
from fastfsl.runtime.metrics import UNHEARD, Metrics
from fastfsl.runtime.session import on_cpu, run_finite

if TYPE_CHECKING:
    from fastfsl import bundle
    from fastfsl.runtime.cuda_driver import Device
    from fastfsl.runtime.cuda_flow import CompiledFlow
    from fastfsl.runtime.image_encoder import ImageEncoder
    from fastfsl.runtime.session import Session

    Rows = np.ndarray[Any, np.dtype[np.float32]]

FLOWS = ("auto", "compiled", "onnx")

_log = logging.getLogger("fastfsl.runtime")


class FlowExecutor:
    """A bundle's flow. Several threads may call it.

    Args:
        session: of the flow's ONNX graph.
        reason: why that graph computes the flow, or what is known of the compiled one.
        compiled: the compiled flow; None: the graph it is.
        required: a compiled flow that fails raises; otherwise the graph takes over.
        class_embeddings: what the graph is read out with in place of its own classes, L2-normalised, (C K, d); None:
            its own. The compiled flow has them already.
    """

    def __init__(
        self,
        session: Session,
        reason: str,
        compiled: CompiledFlow | None = None,
        *,
        required: bool = False,
        class_embeddings: Rows | None = None,
    ) -> None:
        self.session = session
        self.class_embeddings = class_embeddings
        self._reason = reason
        self._compiled = compiled
        self._required = required

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], manifest: bundle.Manifest, session: Session, *, device: str, flow: str
    ) -> FlowExecutor:
        """Choose what computes a bundle's flow, and prove compiled kernels against the ONNX graph.

        Args:
            path: the bundle's folder.
            manifest: its manifest.
            session: of the flow's graph.
            device: "auto", "cpu" or "cuda".
            flow: "auto", compiled kernels where a card runs them; "compiled", which fails without; "onnx".

        Raises:
            BundleError: a file of the kernels is altered.
            DeviceError: compiled kernels were asked for and cannot be used.
        """
        if flow == "onnx":
            return cls(session, "flow='onnx' was asked for")
        card = None
        try:
            if device == "cpu":
                raise DeviceError("device='cpu' was asked for; choose 'auto' or 'cuda'")
            if manifest.kernels is None:
                raise DeviceError("the bundle has no compiled kernels; export it with --arch")
            card = open_card()
            compiled = _proven(path, manifest, session, card)
        except DeviceError as error:
            if flow == "compiled":
                raise DeviceError(f"flow='compiled': {error}") from error
            # Without a card, or for the CPU, the graph is what one expects; a card that goes unused is worth a word.
            _log.log(logging.INFO if card is None else logging.WARNING, "ONNX Runtime computes the flow: %s", error)
            return cls(session, str(error))
        about = f"{compiled.dtype} kernels for {compiled.target} on {card.name} (sm_{card.architecture})"
        return cls(session, about, compiled, required=flow == "compiled")

    def with_classes(self, class_embeddings: Rows) -> FlowExecutor:
        """The same flow, read out with other classes; compiled kernels get them on the card.

        Args:
            class_embeddings: L2-normalised, (C K, d), a class's K prototypes one after the other.

        Raises:
            DeviceError: compiled kernels were asked for, and the card has no room for the classes.
        """
        compiled, reason = self._compiled, self._reason
        if compiled is not None:
            try:
                compiled = compiled.with_classes(class_embeddings)
            except DeviceError as error:
                if self._required:
                    raise DeviceError(f"flow='compiled': {error}") from error
                _log.warning("ONNX Runtime computes the flow from now on: %s", error)
                compiled, reason = None, str(error)
        return FlowExecutor(self.session, reason, compiled, required=self._required, class_embeddings=class_embeddings)

    @property
    def card(self) -> Device | None:
        """The card whose stream the compiled flow works on; None: there is no compiled flow."""
        return None if self._compiled is None else self._compiled.device

    def describe(self) -> dict[str, str]:
        """What computes the flow, and why, as JSON values."""
        compiled = self._compiled
        return {
            "executor": "onnxruntime" if compiled is None else f"compiled {compiled.target}",
            "reason": self._reason,
        }

    def logits(self, embeds: Rows) -> Rows:
        """Logits (n, C) of embeddings (n, d), n above 0."""
        return self._compute(lambda flow: flow.logits(embeds), "logits", embeds)

    def features(self, embeds: Rows) -> Rows:
        """Where the flow carries embeddings (n, d), n above 0; L2-normalised."""
        return self._compute(lambda flow: flow.features(embeds), "features", embeds)

    def image_logits(
        self, encoder: ImageEncoder, pixels: np.ndarray[Any, Any], metrics: Metrics = UNHEARD
    ) -> tuple[Rows, Rows]:
        """Embeddings (n, d) and logits (n, C) of prepared pixels, n above 0; they meet on the card if they can.

        `metrics` hears how long it took.
        """
        compiled, session = self._compiled, encoder.session
        if compiled is not None and encoder.normalized and isinstance(session, CudaSession):
            try:
                with metrics.timed("encode_and_flow"):
                    found = compiled.encoded_logits(len(pixels), lambda pointer: encoder.embed_into(pixels, pointer))
            except DeviceError as error:
                self._give_up(error)
            else:
                if found is not None:
                    return found
        with metrics.timed("encode"):
            embeds = encoder.embed(pixels)
        with metrics.timed("flow"):
            return embeds, self.logits(embeds)

    def _compute(self, by_kernels: Callable[[CompiledFlow], Rows], output: str, embeds: Rows) -> Rows:
        compiled = self._compiled
        if compiled is not None:
            try:
                return by_kernels(compiled)
            except DeviceError as error:
                self._give_up(error)
        classes = {} if self.class_embeddings is None else {"class_embeddings": self.class_embeddings}
        # On the processor few at once: the memory that a graph may take is for so many.
        step = ROWS_AT_ONCE if on_cpu(self.session) else len(embeds)
        parts = [
            run_finite(self.session, output, {"image_embeds": embeds[start : start + step], **classes})
            for start in range(0, len(embeds), step)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _give_up(self, error: DeviceError) -> None:
        """Leave the flow to its graph from now on.

        Raises:
            DeviceError: compiled kernels were asked for.
        """
        if self._required:
            raise DeviceError(f"flow='compiled': {error}") from error
        _log.warning("ONNX Runtime computes the flow from now on: %s", error)
        self._compiled, self._reason = None, str(error)


def open_card() -> Device:
    """The card that ONNX Runtime takes: the first one.

    Raises:
        DeviceError: there is none, or no driver or cuda-bindings.
    """
    from fastfsl.runtime.cuda_driver import Device, load_driver

    return Device(load_driver())


def _proven(path: str | os.PathLike[str], manifest: bundle.Manifest, session: Session, card: Device) -> CompiledFlow:
    from fastfsl.runtime.cuda_flow import CompiledFlow

    compiled = CompiledFlow.load(path, manifest, card)
    rows = compiled.proof_rows()
    compiled.prove(rows, run_finite(session, "features", {"image_embeds": rows}))
    return compiled
