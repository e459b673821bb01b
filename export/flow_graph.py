"""The flow as an ONNX graph: the plan's Euler steps unrolled, then the read-out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastfsl.bundle import PlanArrays
from fastfsl.errors import ShapeError
from fastfsl.flow.readout import check_read_steps
from fastfsl.flow.velocity_field import NORM_EPS

# LayerNormalization needs 17; 18 is what the torch exporter emits for the encoder.
OPSET = 18
IR_VERSION = 10
# torch.nn.functional.normalize divides by max(norm, 1e-12).
UNIT_EPS = 1e-12


class _Graph:
    """Collects nodes and initialisers; every method returns the name of the tensor it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[np.float32] | NDArray[np.int64]) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:  # noqa: ANN401  # as helper.make_node takes them
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def linear(self, x: str, weight: str, bias: str, output: str) -> str:
        return self.node("Gemm", [x, weight, bias], output, transB=1)

    def layer_norm(self, x: str, scale: str, shift: str, output: str) -> str:
        return self.node("LayerNormalization", [x, scale, shift], output, axis=-1, epsilon=NORM_EPS)

    def silu(self, x: str, output: str) -> str:
        # ONNX Runtime fuses the pair into one QuickGelu(alpha=1).
        return self.node("Mul", [x, self.node("Sigmoid", [x], f"{output}_sigmoid")], output)

    def normalize(self, x: str, output: str) -> str:
        length = self.node("ReduceL2", [x, "feature_axis"], f"{output}_length", keepdims=1)
        return self.node("Div", [x, self.node("Max", [length, "unit_eps"], f"{output}_divisor")], output)


def flow_graph(
    plan: PlanArrays,
    class_embeddings: NDArray[np.float32],
    logit_scale: float,
    *,
    read_steps: Sequence[int] | None = None,
    name: str = "flow",
) -> onnx.ModelProto:
    """Unroll a plan into an ONNX model.

    Inputs: `image_embeds` (batch, d) float32, of any length; `class_embeddings` (C, d), an initialiser that a caller
    may override with other (L2-normalised) classes. Outputs: `features` (batch, d), the last state read,
    L2-normalised; `logits` (batch, C) = logit_scale * features @ class_embeddings^T, or of several read steps the log
    of the mean over them of softmax(logit_scale * features_k @ class_embeddings^T), (batch, C). With K prototypes a
    class the initialiser is (C K, d), and of every K products the largest is taken.

    Args:
        plan: the flow plan; with M = 0 the features pass through.
        class_embeddings: L2-normalised, (C, d), or (C, K, d) with K prototypes a class, float32.
        logit_scale: factor on the cosine similarities.
        read_steps: steps whose states are read, ascending, in 0..M, 0 being the source; None: M alone. Steps after
            the last of them are not in the graph.
        name: name of the graph.

    Returns:
        A checked model, opset 18, with no operator outside the ONNX standard.

    Raises:
        ShapeError: if the class embeddings do not have the plan's width.
        ConfigError: if the plan does not have these steps.
    """
    dim = plan.dim
    if class_embeddings.ndim not in (2, 3) or class_embeddings.shape[-1] != dim:
        raise ShapeError(f"expected class embeddings (C, {dim}) or (C, K, {dim}), got {class_embeddings.shape}")
    read_steps = (plan.num_steps,) if read_steps is None else tuple(read_steps)
    check_read_steps(read_steps, plan.num_steps)
    graph = _Graph()
    graph.constant("class_embeddings", class_embeddings.astype(np.float32).reshape(-1, dim))
    graph.constant("logit_scale", np.array(logit_scale, dtype=np.float32))
    graph.constant("unit_eps", np.array(UNIT_EPS, dtype=np.float32))
    graph.constant("feature_axis", np.array([-1], dtype=np.int64))

    states = _unroll(graph, plan, graph.normalize("image_embeds", "x_0"), read_steps)
    names = [*(f"features_{step}" for step in read_steps[:-1]), "features"]
    num_prototypes = class_embeddings.shape[1] if class_embeddings.ndim == 3 else 1
    features = [graph.normalize(state, label) for state, label in zip(states, names, strict=True)]
    _read_out(graph, features, num_prototypes)

    def value(label: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(label, TensorProto.FLOAT, list(shape))

    # The number of classes is symbolic, so that the overridable initialiser may grow.
    rows = "classes" if num_prototypes == 1 else "prototypes"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name,
            [value("image_embeds", "batch", dim), value("class_embeddings", rows, dim)],
            [value("features", "batch", dim), value("logits", "batch", "classes")],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fastfsl",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _unroll(graph: _Graph, plan: PlanArrays, x_0: str, read_steps: tuple[int, ...]) -> list[str]:
    """The states after the read steps."""
    last = read_steps[-1]
    states = [x_0] if read_steps[0] == 0 else []
    if last == 0:
        return states
    # The step size is folded into what is added after every step: u += h (W_in W_out m + W_in b_out).
    graph.constant("input_weight", plan.input_weight)
    graph.constant("input_bias", plan.input_bias)
    if last > 1:
        graph.constant("scaled_carry_weight", np.float32(plan.step_size) * plan.carry_weight)
        graph.constant("scaled_carry_bias", np.float32(plan.step_size) * plan.carry_bias)
    graph.constant("scaled_output_weight", np.float32(plan.step_size) * plan.output_weight)
    # What belongs to the last state has no suffix.
    suffix = {step: "" if step == last else f"_{step}" for step in read_steps}
    for step in filter(None, read_steps):
        graph.constant(f"scaled_output_bias{suffix[step]}", np.float32(plan.step_size * step) * plan.output_bias)
    for block in range(plan.num_blocks):
        for layer in ("first", "second"):
            graph.constant(f"block{block}_{layer}_weight", getattr(plan, f"{layer}_weight")[block])
            graph.constant(f"block{block}_{layer}_bias", getattr(plan, f"{layer}_bias")[block])

    u = graph.linear(x_0, "input_weight", "input_bias", "u_0")
    total = ""
    for step in range(last):
        h = u
        for block in range(plan.num_blocks):
            h = _block(graph, plan, h, step, block)
        scale = graph.constant(f"step{step}_final_a", plan.final_table[step, 0])
        shift = graph.constant(f"step{step}_final_c", plan.final_table[step, 1])
        m = graph.layer_norm(h, scale, shift, f"step{step}_m")
        total = m if step == 0 else graph.node("Add", [total, m], f"step{step}_total")
        done = step + 1
        if done < last:
            carried = graph.linear(m, "scaled_carry_weight", "scaled_carry_bias", f"step{step}_carry")
            u = graph.node("Add", [u, carried], f"u_{done}")
        if done in suffix:
            end = suffix[done]
            moved = graph.linear(total, "scaled_output_weight", f"scaled_output_bias{end}", f"displacement{end}")
            states.append(graph.node("Add", [x_0, moved], f"transported{end}"))
    return states


def _read_out(graph: _Graph, features: list[str], num_prototypes: int) -> None:
    graph.node("Transpose", ["class_embeddings"], "class_columns")
    if num_prototypes > 1:
        graph.constant("prototype_groups", np.array([0, -1, num_prototypes], dtype=np.int64))
    if len(features) == 1:
        graph.node("Mul", [_cosines(graph, features[0], num_prototypes, "cosines"), "logit_scale"], "logits")
        return
    graph.constant("state_axis", np.array([0], dtype=np.int64))
    stack = []
    for label in features:
        cosines = _cosines(graph, label, num_prototypes, f"{label}_cosines")
        log_probabilities = graph.node(
            "LogSoftmax", [graph.node("Mul", [cosines, "logit_scale"], f"{label}_logits")], f"{label}_log_probabilities"
        )
        stack.append(graph.node("Unsqueeze", [log_probabilities, "state_axis"], f"{label}_slice"))
    states = graph.node("Concat", stack, "log_probabilities", axis=0)
    total = graph.node("ReduceLogSumExp", [states, "state_axis"], "log_total", keepdims=0)
    graph.constant("log_count", np.array(math.log(len(features)), dtype=np.float32))
    graph.node("Sub", [total, "log_count"], "logits")


def _cosines(graph: _Graph, features: str, num_prototypes: int, output: str) -> str:
    """Of each class, the largest over its prototypes."""
    if num_prototypes == 1:
        return graph.node("MatMul", [features, "class_columns"], output)
    each = graph.node("MatMul", [features, "class_columns"], f"{output}_by_prototype")
    grouped = graph.node("Reshape", [each, "prototype_groups"], f"{output}_by_class")
    return graph.node("ReduceMax", [grouped, "feature_axis"], output, keepdims=0)


def _block(graph: _Graph, plan: PlanArrays, h: str, step: int, block: int) -> str:
    prefix = f"step{step}_block{block}"
    scale, shift, gate = (
        graph.constant(f"{prefix}_{letter}", plan.block_table[step, block, row])
        for row, letter in enumerate(("a", "c", "gate"))
    )
    modulated = graph.layer_norm(h, scale, shift, f"{prefix}_norm")
    first = graph.linear(modulated, f"block{block}_first_weight", f"block{block}_first_bias", f"{prefix}_first")
    hidden = graph.silu(first, f"{prefix}_silu")
    second = graph.linear(hidden, f"block{block}_second_weight", f"block{block}_second_bias", f"{prefix}_second")
    gated = graph.node("Mul", [second, gate], f"{prefix}_gated")
    return graph.node("Add", [h, gated], f"{prefix}_out")
