"""What a bundle becomes when it is loaded: checked, in sessions, with a word on what runs where."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl import bundle
from fastfsl.bundle.flow_launches import MAX_BUCKET, row_bucket
from fastfsl.bundle.onnx_graph import GraphFacts, check_graph_file
from fastfsl.errors import ConfigError
from fastfsl.runtime.bucket_session import BucketSession
from fastfsl.runtime.flow_executor import FLOWS
from fastfsl.runtime.head import Head
from fastfsl.runtime.image_encoder import ImageEncoder, blend_weight
from fastfsl.runtime.image_reader import check_reading
from fastfsl.runtime.int8_sums import Int8Sums
from fastfsl.runtime.precision import graph_device
from fastfsl.runtime.session import (
    Session,
    check_memory_limit,
    check_threads,
    create_row_session,
    installed_onnxruntimes,
    on_cpu,
)

if TYPE_CHECKING:
    from fastfsl.runtime.cuda_driver import Device

_log = logging.getLogger("fastfsl.runtime")


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory.

    Args:
        manifest: its manifest.
        head: from embeddings to logits.
        encoder: from images to embeddings; None: the bundle was trained on features.
        origin: where it came from, which options it was loaded with and what became of them, as JSON values.
    """

    manifest: bundle.Manifest
    head: Head
    encoder: ImageEncoder | None
    origin: dict[str, Any]

    def describe(self, head: Head) -> dict[str, Any]:
        """What is loaded and what runs where, as JSON values; see `Classifier.describe`.

        Args:
            head: the one in use, which may know more classes than the bundle.
        """
        manifest, readout, flow = self.manifest, head.readout, head.flow
        sessions = self._sessions()
        return {
            **self.origin,
            "method": manifest.method,
            "num_classes": len(head.class_names),
            "added_classes": list(head.class_names[len(manifest.class_names) :]),
            "embed_dim": manifest.embed_dim,
            "num_steps": manifest.num_steps,
            "step_size": manifest.step_size,
            "read_steps": list(manifest.read_steps),
            "flow": None if flow is None else flow.describe(),
            "readout": None if readout is None else readout.describe(),
            "precision": manifest.precision,
            "encoder": manifest.encoder,
            "preprocessing": manifest.preprocessing,
            "preprocess": None if self.encoder is None else self.encoder.reader.preprocess,
            "image_threads": None if self.encoder is None else self.encoder.reader.threads,
            "providers": {name: session.get_providers() for name, session in sessions.items()},
            "cuda_graphs": {
                name: session.graphs for name, session in sessions.items() if isinstance(session, BucketSession)
            },
            "files": {name: entry["size"] for name, entry in manifest.files.items()},
            "onnxruntime": installed_onnxruntimes(),
        }

    def on_card(self) -> bool:
        """Whether any part of it computes on a card."""
        flow = self.head.flow
        return not all(map(on_cpu, self._sessions().values())) or (flow is not None and flow.card is not None)

    def where(self) -> str:
        """What computes each part, in a line of a log."""
        parts = [f"{name} on {session.get_providers()[0]}" for name, session in self._sessions().items()]
        if self.head.flow is not None:
            parts.append(f"the flow by {self.head.flow.describe()['executor']}")
        return ", ".join(parts) or "the read-out by numpy"

    def _sessions(self) -> dict[str, Session]:
        sessions = {} if self.encoder is None else {"visual": self.encoder.session}
        return sessions if self.head.flow is None else {**sessions, "flow": self.head.flow.session}

    def warm_up(self, max_batch: int) -> None:
        """Compute a batch of noise of every bucket up to `max_batch` rows."""
        rng = np.random.default_rng(0)
        sizes = sorted({min(row_bucket(rows), max_batch) for rows in range(1, min(max_batch, MAX_BUCKET) + 1)})
        if self.encoder is not None:
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            pixels = self.encoder.reader.submit(noise).result()
            for rows in sizes:
                self.head.image_logits(self.encoder, np.repeat(pixels[None], rows, axis=0))
            return
        embeds = rng.standard_normal((max_batch, self.manifest.embed_dim)).astype(np.float32)
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        for rows in sizes:
            self.head.logits(embeds[:rows])


def load_bundle(
    path: str | os.PathLike[str],
    *,
    device: str,
    num_threads: int | None,
    alpha: float | None,
    flow: str,
    gpu_mem_limit: int | None,
    preprocess: str,
    image_threads: int | None,
    expected_digest: str | None = None,
    wide_int8: bool = False,
) -> Loaded:
    """Check a bundle completely and load it; arguments and errors as for `Classifier.load`."""
    if flow not in FLOWS:
        raise ConfigError(f"flow must be one of {', '.join(FLOWS)}, got {flow!r}")
    image_threads = check_reading(preprocess, image_threads)
    num_threads, gpu_mem_limit = check_threads(num_threads), check_memory_limit(gpu_mem_limit, device)
    manifest, digest = bundle.read_pinned(path, expected_digest)
    weight = blend_weight(manifest, alpha)
    for name in manifest.files:
        if name == bundle.FLOW_PLAN:
            bundle.check_plan(path, manifest)
        elif name not in (bundle.VISUAL_GRAPH, bundle.FLOW_GRAPH, bundle.READOUT):  # these are checked when read
            bundle.check_file(path, manifest, name)

    fallbacks: list[tuple[int, str]] = []
    graphs: dict[str, GraphFacts] = {}

    graphs_on = graph_device(manifest.precision, device)
    sums = Int8Sums(path, manifest, widen=wide_int8)

    def create(model: bytes, name: str, card: Device | None = None, *, small_products: bool = False) -> Session:
        half = manifest.precision == "fp16"
        graphs[name] = check_graph_file(model, name, half=half)
        return create_row_session(
            sums.computable(model, name, signed=graphs[name].signed_products),
            name,
            device=graphs_on,
            num_threads=num_threads,
            card=card,
            gpu_mem_limit=gpu_mem_limit,
            half=half,
            small_products=small_products,
            fallbacks=fallbacks,
        )

    create_flow = partial(create, small_products=manifest.precision == "int8")
    head = Head.load(path, manifest, create_flow, device=device, flow=flow)
    # On the stream of the compiled flow, if there is one: the embeddings then stay on the card.
    card = None if head.flow is None else head.flow.card
    encoder = ImageEncoder.load(
        path,
        manifest,
        lambda model, name: create(model, name, card),
        weight,
        preprocess=preprocess,
        image_threads=image_threads,
        num_threads=num_threads,
    )
    sums.check_record()
    met = {name: graphs[str(Path(path) / name)] for name in manifest.files if str(Path(path) / name) in graphs}
    bundle.check_graphs(manifest, met, path)
    origin = {
        "bundle": os.fspath(path),
        "digest": digest,
        "device": device,
        "device_fallback": fallbacks[0][1] if fallbacks else None,
        "int8": sums.describe(),
        "wide_int8": wide_int8,
        "num_threads": num_threads,
        "gpu_mem_limit": gpu_mem_limit,
        "blend": None if manifest.blend is None else {**manifest.blend, "alpha": weight},
    }
    loaded = Loaded(manifest, head, encoder, origin)
    for level, reason in fallbacks[:1]:
        _log.log(level, "device='auto' came down to the CPU: %s", reason)
    _log.info("loaded %s: %s", origin["bundle"], loaded.where())
    return loaded
