"""Does a bundle in lower precision still say what it says in float32? Asked on the support, never on test data."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fastfsl.bundle import FLOW_GRAPH, VISUAL_GRAPH, Readout
from fastfsl.errors import BundleError
from fastfsl.runtime.flow_executor import FlowExecutor
from fastfsl.runtime.head import Head
from fastfsl.runtime.prediction import softmax
from fastfsl.runtime.session import create_row_session

# Of the answers in float32, the part that must stay.
MIN_AGREEMENT = 0.99
_ROWS = 32


@dataclass(frozen=True)
class Graphs:
    """What a bundle computes with.

    Attributes:
        visual: the image tower, or None for a bundle on features.
        flow: the flow, or None.
        readout: the read-out, or None.
    """

    visual: onnx.ModelProto | None
    flow: onnx.ModelProto | None
    readout: Readout | None


@dataclass(frozen=True)
class Answers:
    """What graphs make of samples: embeddings (n, d) and class probabilities (n, C)."""

    embeddings: NDArray[np.float32]
    probabilities: NDArray[np.float32]


def answers(graphs: Graphs, samples: NDArray[Any]) -> Answers:
    """Embed and classify on the CPU, as the runtime would.

    Args:
        graphs: a bundle's.
        samples: pixels (n, height, width, 3) uint8, or without an image tower features (n, d).
    """
    chunks = [samples[start : start + _ROWS] for start in range(0, len(samples), _ROWS)]
    if graphs.visual is not None:
        tower = create_row_session(graphs.visual.SerializeToString(), VISUAL_GRAPH, device="cpu")
        chunks = [tower.run(["image_embeds"], {"images": chunk})[0] for chunk in chunks]
        del tower
    executor = None
    if graphs.flow is not None:
        session = create_row_session(graphs.flow.SerializeToString(), FLOW_GRAPH, device="cpu")
        executor = FlowExecutor(session, "an export checks its graph")
    head = Head(executor, graphs.readout)
    probabilities = [softmax(head.logits(chunk)) for chunk in chunks]
    return Answers(np.concatenate(chunks), np.concatenate(probabilities))


def compare(reference: Answers, variant: Answers, labels: NDArray[np.int64]) -> dict[str, Any]:
    """What a variant changes, on the same samples.

    Returns:
        `agreement`: part of the samples with the same best class; `accuracy` of the variant and `accuracy_fp32`, both
        on samples trained on; `max_probability_error`; `min_cosine` of the embeddings; `num_samples`.
    """
    best, expected = variant.probabilities.argmax(axis=1), reference.probabilities.argmax(axis=1)
    products = (variant.embeddings * reference.embeddings).sum(axis=1, dtype=np.float64)
    lengths = np.linalg.norm(variant.embeddings, axis=1) * np.linalg.norm(reference.embeddings, axis=1)
    return {
        "agreement": float((best == expected).mean()),
        "accuracy": float((best == labels).mean()),
        "accuracy_fp32": float((expected == labels).mean()),
        "max_probability_error": float(np.abs(variant.probabilities - reference.probabilities).max()),
        "min_cosine": float((products / np.where(lengths > 0, lengths, 1)).min()),
        "num_samples": len(labels),
    }


def check_agreement(precision: str, report: dict[str, Any], *, allow_drop: bool) -> None:
    """Refuse a variant that answers too often otherwise.

    Raises:
        BundleError: with the figure, unless `allow_drop`.
    """
    if report["agreement"] >= MIN_AGREEMENT or allow_drop:
        return
    raise BundleError(
        f"{precision} gives {100 * report['agreement']:.1f} % of {report['num_samples']} {report['samples']} the class "
        f"that fp32 gives them, and at least {100 * MIN_AGREEMENT:.0f} % are asked for (accuracy there "
        f"{100 * report['accuracy']:.1f} % against {100 * report['accuracy_fp32']:.1f} %): nothing was written; export "
        "with --precision fp32, or accept the loss with --allow-drop"
    )
