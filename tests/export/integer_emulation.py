"""int8 graphs computed in numpy: with exact sums, and with sums that saturate as they do on AVX2 without VNNI.

There ONNX Runtime multiplies unsigned bytes by signed weights, sums the products of the rows 2j and 2j + 1 of the
weights in 16 bits, cuts off what does not fit, and sums those sums in 32 bits. On a processor with VNNI or AMX, or on
ARM, nothing is cut off, so that the fault does not show. Here it shows anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fastfsl.runtime.session import create_session

MICROSOFT = "com.microsoft"
PRODUCTS = ("MatMulIntegerToFloat", "QAttention")

Bytes = NDArray[np.uint8]
Weights = NDArray[np.int8]
# From bytes (M, K) and weights (K, N) to sums (M, N).
Sums = Callable[[Bytes, Weights], NDArray[np.int64]]


def exact_sums(values: Bytes, weights: Weights) -> NDArray[np.int64]:
    """Sums of products as they are; float64 holds each exactly."""
    return (values.astype(np.float64) @ weights.astype(np.float64)).astype(np.int64)


def saturating_sums(values: Bytes, weights: Weights) -> NDArray[np.int64]:
    """Sums of products of which those of two adjacent rows are summed in 16 bits first."""
    sums = np.zeros((len(values), weights.shape[1]), np.int64)
    columns, rows = values.astype(np.int32).T, weights.astype(np.int32)
    for first in range(0, len(rows), 2):
        pair = sum(columns[row][:, None] * rows[row] for row in range(first, min(first + 2, len(rows))))
        sums += np.clip(pair, -(2**15), 2**15 - 1)
    return sums


def weights_of(model: onnx.ModelProto) -> dict[str, Weights]:
    """The weights (K, N) of every int8 product, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {node.input[1]: numpy_helper.to_array(tensors[node.input[1]]) for node in products_of(model)}


def products_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every int8 product."""
    return [node for node in model.graph.node if node.domain == MICROSOFT and node.op_type in PRODUCTS]


def captured(model: onnx.ModelProto, feed: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """What ONNX Runtime gives into every int8 product and gets out of it, and the constants, by name."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in probe.graph.initializer}
    given = {value.name for value in probe.graph.input}
    names = dict.fromkeys(name for node in products_of(probe) for name in (node.input[0], node.output[0]))
    types = {node.input[0]: onnx.TensorProto.UINT8 for node in products_of(probe)}
    for name in names:
        if name not in given:
            kind = types.get(name, onnx.TensorProto.FLOAT)
            probe.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    session = create_session(probe.SerializeToString(), "the captured graph", device="cpu", num_threads=1)
    outputs = [value.name for value in probe.graph.output]
    return {**constants, **feed, **dict(zip(outputs, session.run(outputs, feed), strict=True))}


def product(node: onnx.NodeProto, tensors: Mapping[str, NDArray[Any]], sums: Sums) -> NDArray[np.float32]:
    """What an int8 product gives.

    Args:
        node: a MatMulIntegerToFloat or a QAttention.
        tensors: its inputs by name.
        sums: how it sums.
    """
    inputs = [tensors[name] if name else None for name in node.input]
    if node.op_type == "QAttention":
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return _attention(options["num_heads"], sums, *inputs)
    return _matmul(sums, *inputs)


def _matmul(
    sums: Sums, values: Any, weights: Any, scale: Any, steps: Any, zero: Any, _: Any = None, bias: Any = None
) -> NDArray[np.float32]:
    found = sums(values.reshape(-1, values.shape[-1]), weights)
    found = found - int(zero.item()) * weights.sum(axis=0, dtype=np.int64)
    result = found * (scale.item() * steps.astype(np.float64)) + (0 if bias is None else bias)
    return result.astype(np.float32).reshape(*values.shape[:-1], -1)


def _attention(
    heads: int, sums: Sums, values: Any, weights: Any, bias: Any, scale: Any, steps: Any, _: Any, zero: Any
) -> NDArray[np.float32]:
    projected = _matmul(sums, values, weights, scale, steps, zero, None, bias)
    batch, length, width = projected.shape
    query, key, value = projected.reshape(batch, length, 3, heads, width // 3 // heads).transpose(2, 0, 3, 1, 4)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(np.float32(query.shape[-1]))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = powers / powers.sum(axis=-1, keepdims=True) @ value
    return attended.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def emulated(model: onnx.ModelProto, sums: Sums) -> ReferenceEvaluator:
    """The whole graph in numpy, by the onnx package, but for what it does not know."""

    class MatMulIntegerToFloat(OpRun):
        op_domain = MICROSOFT

        def _run(self, *inputs: Any) -> tuple[Any]:
            return (_matmul(sums, *inputs),)

    class QAttention(OpRun):
        op_domain = MICROSOFT

        def _run(self, *inputs: Any, num_heads: int = 1, **_: Any) -> tuple[Any]:
            return (_attention(num_heads, sums, *inputs),)

    class FastGelu(OpRun):
        op_domain = MICROSOFT

        def _run(self, x: Any) -> tuple[Any]:
            return (x * (0.5 + 0.5 * np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3))),)

    return ReferenceEvaluator(model, new_ops=[MatMulIntegerToFloat, QAttention, FastGelu])
