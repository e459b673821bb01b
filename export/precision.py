"""A bundle's graphs in int8 or fp16, made on the support set and held to it."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from fastfsl.errors import BundleError, ConfigError, DataError
from fastfsl.export.accuracy_gate import MIN_AGREEMENT, Answers, Graphs, answers, check_agreement, compare
from fastfsl.export.quantization import Range, calibrate, linear_layers, quantize, rounding_noise
from fastfsl.fit.run import Run
from fastfsl.fit.support import support_set
from fastfsl.images import Preprocessing, exact_pixels
from fastfsl.runtime.session import Session, create_session

Precision = Literal["fp32", "fp16", "int8"]

# The gate asks this many support samples, evenly spread. Ranges are found on fewer, at most half of them, so that much
# of what the gate asks was not calibrated on.
MAX_SAMPLES = 512
_MAX_CALIBRATION = 64
# Where int8 as a whole does not pass, these parts of the layers stay float32, those that rounding hurts most.
_KEPT_PARTS = (0.0, 1 / 16, 1 / 8, 1 / 4)
_BATCH = 8
_LARGEST_FP16 = 65504.0


def reduce_precision(
    precision: Precision,
    graphs: Graphs,
    run: Run,
    preprocessing: Preprocessing | None,
    *,
    with_flow: bool = True,
    allow_drop: bool = False,
) -> tuple[Graphs, dict[str, Any]]:
    """Graphs in another precision, and how they compare with float32 on the support.

    Args:
        precision: of the result.
        graphs: in float32.
        run: whose support is calibrated on and asked.
        preprocessing: of its images; None for a run on features.
        with_flow: False: the flow stays float32.
        allow_drop: accept any disagreement.

    Returns:
        The graphs, and the report for the manifest: see `compare`, and what was quantised.

    Raises:
        BundleError: too many answers change.
        ConfigError: there is nothing that could be quantised.
        DataError: the support is not where it was.
    """
    # 16 bits are for CUDA, where the compiled kernels are the flow in 16 bits.
    flow = graphs.flow if with_flow and precision == "int8" else None
    parts = {name: model for name, model in (("visual", graphs.visual), ("flow", flow)) if model is not None}
    if not any(linear_layers(model) for model in parts.values()):
        raise ConfigError(
            f"this run has nothing for {precision}, which is for an encoder and, with int8 and without --arch, for a "
            "flow of one step or more: export it as fp32"
        )
    samples, labels, origin = _samples(run, preprocessing)
    reference = answers(graphs, samples)
    about = {"samples": origin, "min_agreement": MIN_AGREEMENT, "allow_drop": allow_drop}
    reduce = _int8 if precision == "int8" else _fp16
    best, report = reduce(parts, graphs, samples, reference, labels)
    report = {**about, **report}
    check_agreement(precision, report, allow_drop=allow_drop)
    return best, report


def _int8(
    parts: dict[str, onnx.ModelProto],
    graphs: Graphs,
    samples: NDArray[Any],
    reference: Answers,
    labels: NDArray[np.int64],
) -> tuple[Graphs, dict[str, Any]]:
    """The first graphs that agree, with as many int8 layers as possible, or those that agree most."""
    count = min(_MAX_CALIBRATION, (len(samples) + 1) // 2)
    chosen = np.linspace(0, len(samples) - 1, count).round().astype(np.int64)
    inputs = {"visual": ("images", samples), "flow": ("image_embeds", reference.embeddings)}
    ranges: dict[str, dict[str, Range]] = {}
    noise: dict[tuple[str, str], float] = {}
    for part, model in parts.items():
        name, values = inputs[part]
        feeds = ({name: values[chosen[at : at + _BATCH]]} for at in range(0, len(chosen), _BATCH))
        ranges[part] = calibrate(model, feeds, _session)
        noise |= {(part, layer): value for layer, value in rounding_noise(linear_layers(model), ranges[part]).items()}
    loudest = sorted(noise, key=lambda layer: -noise[layer])
    best: tuple[Graphs, dict[str, Any]] | None = None
    for kept in dict.fromkeys(int(np.ceil(share * len(loudest))) for share in _KEPT_PARTS):
        keep = loudest[:kept]
        int8 = {
            part: quantize(model, ranges[part], keep={layer for where, layer in keep if where == part})
            for part, model in parts.items()
        }
        made = {part: model for part, (model, _) in int8.items()}
        candidate = Graphs(made.get("visual"), made.get("flow", graphs.flow), graphs.readout)
        report = {
            **compare(reference, answers(candidate, samples), labels),
            "num_calibrated_on": len(chosen),
            "int8_layers": {part: len(layers) for part, (_, layers) in int8.items()},
            "fp32_layers": [f"{part}/{layer}" for part, layer in keep],
        }
        if best is None or report["agreement"] > best[1]["agreement"]:
            best = candidate, report
        if report["agreement"] >= MIN_AGREEMENT:
            break
    if best is None:  # there is always a first attempt
        raise AssertionError
    return best


def _fp16(
    parts: dict[str, onnx.ModelProto],
    graphs: Graphs,
    samples: NDArray[Any],
    reference: Answers,
    labels: NDArray[np.int64],
) -> tuple[Graphs, dict[str, Any]]:
    """The image tower in fp16, its inputs and outputs as before; what a CPU can tell of it is told."""
    visual = parts["visual"]
    if any(value.name == "alpha" for value in visual.graph.input):
        raise ConfigError("a blend of two towers, whose weight a caller may choose, has no fp16: export it as fp32")
    feeds = [{"images": samples[:_MAX_CALIBRATION][at : at + _BATCH]} for at in range(0, len(samples), _BATCH)]
    ranges = calibrate(visual, [feed for feed in feeds if len(feed["images"])], _session)
    largest = max(max(-found.low, found.high) for found in ranges.values())
    if not largest <= _LARGEST_FP16 / 2:
        raise BundleError(f"the encoder multiplies values up to {largest:.0f}, too near fp16's {_LARGEST_FP16:.0f}")
    rounded = onnx.ModelProto()
    rounded.CopyFrom(visual)
    for tensor in rounded.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    half = onnx.ModelProto()
    half.CopyFrom(visual)
    half = convert_float_to_float16(half, keep_io_types=True, disable_shape_infer=True)
    report = {
        **compare(reference, answers(replace(graphs, visual=rounded), samples), labels),
        "checked": "weights rounded to fp16, computed in fp32 on the CPU; the fp16 graph itself was not run",
        "largest_input": largest,
    }
    return replace(graphs, visual=half), report


def _samples(run: Run, preprocessing: Preprocessing | None) -> tuple[NDArray[Any], NDArray[np.int64], str]:
    """What the gate asks, its labels and its name."""
    support = support_set(run).spread(MAX_SAMPLES)
    if support.features is not None:
        return support.features, support.labels, "support features"
    if support.paths is None or preprocessing is None:
        raise DataError("expected a run on images or on features, got neither: report this")
    return np.stack([exact_pixels(path, preprocessing) for path in support.paths]), support.labels, "support images"


def _session(model: bytes) -> Session:
    return create_session(model, "the calibrated graph", device="cpu")
