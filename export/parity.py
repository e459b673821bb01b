"""Does the bundle compute what the estimator computes? Asked at every export, answered in the manifest."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from fastfsl.bundle import FLOW_GRAPH, VISUAL_GRAPH, Readout
from fastfsl.encoders import Encoder
from fastfsl.errors import BundleError
from fastfsl.export.visual_graph import blend_record, pixels_to_embedding
from fastfsl.fit.deployment import Deployment
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import FlowPlan, normalize, plan_states, read_out
from fastfsl.runtime.flow_executor import FlowExecutor
from fastfsl.runtime.head import Head
from fastfsl.runtime.prediction import softmax
from fastfsl.runtime.session import Session, create_session

# One baked-in batch size would pass any single one of these.
BATCHES = (1, 2, 5)
# float32 graphs differ from torch by rounding alone; what each export measured stands in its manifest.
MIN_COSINE = 0.99999
MAX_FEATURE_ERROR = 1e-4
MAX_PROBABILITY_ERROR = 1e-4
_SEED = 0


def visual_parity(encoder: Encoder, model: onnx.ModelProto) -> dict[str, Any]:
    """Compare the exported image tower with torch on noise and on smooth images, batches 1, 2 and 5.

    A blend of two towers is compared with the weights 0, the trained one (left out of the graph's inputs) and 1.

    Returns:
        `batches`, `alphas` of a blend, `max_abs_error` and `min_cosine` of the embeddings.

    Raises:
        BundleError: if they differ by more than rounding.
    """
    session = _session(model, VISUAL_GRAPH)
    reference = pixels_to_embedding(encoder).cpu()
    rng = np.random.default_rng(_SEED)
    height, width = encoder.preprocessing.height, encoder.preprocessing.width
    blend = blend_record(encoder)
    alphas: list[float | None] = [None] if blend is None else [0.0, None, 1.0]
    errors, cosines = [], []
    for batch, alpha in itertools.product(BATCHES, alphas):
        feed: dict[str, NDArray[Any]] = {"images": _images(rng, batch, height, width)}
        if alpha is not None:
            feed["alpha"] = np.array(alpha, np.float32)
        with torch.inference_mode():
            expected = reference(*map(torch.from_numpy, feed.values())).numpy()
        got = session.run(["image_embeds"], feed)[0]
        _check_shape("image_embeds", got, expected)
        errors.append(float(np.abs(got - expected).max()))
        cosines.append(float((_unit(got) * _unit(expected)).sum(axis=1).min()))
    # np.max and np.min keep a NaN.
    report: dict[str, Any] = {
        "batches": list(BATCHES),
        "max_abs_error": float(np.max(errors)),
        "min_cosine": float(np.min(cosines)),
    }
    if blend is not None:
        report["alphas"] = [blend["alpha"] if alpha is None else alpha for alpha in alphas]
    if not (report["min_cosine"] >= MIN_COSINE and report["max_abs_error"] <= MAX_FEATURE_ERROR):
        raise BundleError(f"the exported encoder does not match torch ({report}): nothing was written; report this")
    return report


def flow_parity(
    plan: FlowPlan,
    class_embeddings: NDArray[np.float32],
    logit_scale: float,
    model: onnx.ModelProto,
    *,
    read_steps: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Compare the exported flow with the plan's torch executor, batches 1, 2 and 5, random unit-length features.

    Args:
        plan: the flow plan.
        class_embeddings: as for `flow_graph`.
        logit_scale: factor on the cosine similarities.
        model: `flow_graph` of the same.
        read_steps: as for `flow_graph`.

    Returns:
        `batches`, `max_abs_error` of the features, `min_cosine`, `max_probability_error`.

    Raises:
        BundleError: if they differ by more than rounding.
    """
    session = _session(model, FLOW_GRAPH)
    generator = torch.Generator().manual_seed(_SEED)
    embeddings = torch.from_numpy(class_embeddings)
    places = embeddings.flatten(0, -2)
    errors, cosines, probability_errors = [], [], []
    for batch in BATCHES:
        # Half noise, half near the classes: where real features lie.
        noise = normalize(torch.randn(batch, plan.dim, generator=generator))
        near = places[torch.randint(len(places), (batch,), generator=generator)]
        features = normalize(noise + near * torch.rand(batch, 1, generator=generator) * 2)
        with torch.inference_mode():
            states = plan_states(plan, features, (plan.num_steps,) if read_steps is None else read_steps)
            expected_logits = read_out(states, embeddings, logit_scale)
        got, logits = session.run(["features", "logits"], {"image_embeds": features.numpy()})
        expected = normalize(states[-1]).numpy()
        _check_shape("features", got, expected)
        _check_shape("logits", logits, expected_logits.numpy())
        errors.append(float(np.abs(got - expected).max()))
        cosines.append(float((got * expected).sum(axis=1).min()))
        difference = torch.from_numpy(logits).softmax(dim=-1) - expected_logits.softmax(dim=-1)
        probability_errors.append(float(difference.abs().max()))
    report: dict[str, Any] = {
        "batches": list(BATCHES),
        "max_abs_error": float(np.max(errors)),
        "min_cosine": float(np.min(cosines)),
        "max_probability_error": float(np.max(probability_errors)),
    }
    if not (
        report["min_cosine"] >= MIN_COSINE
        and report["max_abs_error"] <= MAX_FEATURE_ERROR
        and report["max_probability_error"] <= MAX_PROBABILITY_ERROR
    ):
        raise BundleError(f"the exported flow does not match torch ({report}): nothing was written; report this")
    return report


def logit_parity(
    estimator: Estimator,
    deployed: Deployment,
    flow: onnx.ModelProto | None,
    readout: Readout | None,
    *,
    normalized: bool = True,
) -> dict[str, Any]:
    """Compare the runtime's whole path from features to probabilities with the estimator's.

    Batches of 1, 2, 5 and, since a kernel's rounding differs from row to row, 64 random features; each is noise and, in
    a random proportion, what the parts were made from: a class embedding, a key or a row of the weights.

    Args:
        estimator: the fitted estimator; a flow's early exits are left aside.
        deployed: its deployment.
        flow: `flow_graph` of its plan; None: there is none.
        readout: its read-out; None: there is none.
        normalized: whether the features are unit-length; otherwise they are 0.2 to 1 long, as a blend's may be.

    Returns:
        `batches` and `max_probability_error`.

    Raises:
        BundleError: if they differ by more than rounding.
    """
    if isinstance(estimator, FlowMatchingAlignment):
        # A bundle takes every step for every sample.
        estimator = copy.copy(estimator)
        estimator.exit_margin = estimator.exit_velocity = None
    executor = None if flow is None else FlowExecutor(_session(flow, FLOW_GRAPH), "an export checks its graph")
    head = Head(executor, readout)
    classes = deployed.class_embeddings
    anchors = [] if classes is None else [classes.reshape(-1, classes.shape[-1])]
    if readout is not None:
        anchors += [readout.linear_weight, *(kernel.keys for kernel in readout.kernels)]
    places = np.concatenate(anchors)
    rng = np.random.default_rng(_SEED)
    batches, errors = (*BATCHES, 64), []
    for batch in batches:
        noise = _unit(rng.normal(size=(batch, places.shape[1])))
        near = _unit(places[rng.integers(len(places), size=batch)])
        length = 1.0 if normalized else rng.uniform(0.2, 1, (batch, 1))
        features = (length * _unit(noise + near * 2 * rng.random((batch, 1)))).astype(np.float32)
        expected = softmax(_all_logits(np.asarray(estimator.decision_function(features))))
        got = softmax(head.logits(features))
        _check_shape("logits", got, expected)
        errors.append(float(np.abs(got - expected).max()))
    report: dict[str, Any] = {"batches": list(batches), "max_probability_error": float(np.max(errors))}
    if not report["max_probability_error"] <= MAX_PROBABILITY_ERROR:
        raise BundleError(f"the exported logits are not the estimator's ({report}): nothing was written; report this")
    return report


def _all_logits(decision: NDArray[Any]) -> NDArray[Any]:
    """Logits, (n, C): of two classes an estimator gives their difference, (n,)."""
    return decision if decision.ndim == 2 else np.stack([np.zeros_like(decision), decision], axis=1)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[Any] = rows / np.where(length > 0, length, 1)  # a part that adds nothing is all zeros
    return unit


def _images(rng: np.random.Generator, batch: int, height: int, width: int) -> NDArray[np.uint8]:
    images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width)[None, None, :, None] * np.linspace(0, 1, height)[None, :, None, None]
    images[::2] = ramp.astype(np.uint8)
    return images


def _check_shape(name: str, got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    if got.shape != expected.shape:
        raise BundleError(f"the exported graph's {name} has shape {got.shape}, expected {expected.shape}")


def _session(model: onnx.ModelProto, name: str) -> Session:
    """The session that the runtime would make on the CPU."""
    return create_session(model.SerializeToString(), name, device="cpu")
