"""int8 products for the CPU: weights by output channel, activations by ranges found once on calibration data.

A linear layer y = x W + b becomes y = s_x s_w (q_x - z) Q_w + b' with q_x = round(x / s_x) + z in 0..255, s_x and z of
the layer's input, Q_w and s_w of each output channel as `integer_weights` gives them, and b' = b + E[x] (W - s_w Q_w),
which leaves the mean output alone; everything else stays float32. The ranges are constants, so what an image gets does
not depend on the others in its batch, as it would with onnxruntime's `quantize_dynamic`. The projection inside
Attention is such a layer too; its softmax stays float32.

`quantize_static` of onnxruntime writes pairs of QuantizeLinear and DequantizeLinear around MatMul, which a CPU does not
compute as one product (`pytest benchmarks/bench_int8.py`). So the lines that place the operators are here.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastfsl.export.integer_weights import BLOCK, integer_weights
from fastfsl.runtime.session import Session

Rows = NDArray[np.float64]

MICROSOFT = "com.microsoft"
_PRODUCTS = {("", "MatMul"), ("", "Gemm"), (MICROSOFT, "Attention")}
_LEVELS = 255
_STATISTICS = {"low": "ReduceMin", "high": "ReduceMax", "sum": "ReduceSum"}


@dataclass(frozen=True)
class Linear:
    """A product with constant weights.

    Attributes:
        name: of the weights' initialiser, and of the layer wherever one is named.
        node: the MatMul, the Gemm, or the Attention that begins with the product.
        weight: (K, N).
        bias: (N,) of a Gemm or an Attention, or None.
    """

    name: str
    node: onnx.NodeProto
    weight: NDArray[np.float32]
    bias: str | None

    @property
    def source(self) -> str:
        """The tensor that is multiplied."""
        source: str = self.node.input[0]
        return source


@dataclass(frozen=True)
class Range:
    """What a layer's inputs are on the calibration data.

    Attributes:
        low: the smallest value, at most 0.
        high: the largest, at least 0.
        mean: of each channel, (K,).
        covariance: of the channels within blocks of `BLOCK`, (ceil(K / BLOCK), BLOCK, BLOCK); 0 beyond the last one.
    """

    low: float
    high: float
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """Of each channel, (K,)."""
        return np.maximum(np.diagonal(self.covariance, axis1=1, axis2=2).reshape(-1)[: len(self.mean)], 0)

    @property
    def step(self) -> float:
        """Distance of two neighbouring levels."""
        return (self.high - self.low) / _LEVELS or 1.0


def linear_layers(model: onnx.ModelProto) -> list[Linear]:
    """What can be quantised: MatMul, plain Gemm and Attention with float32 weights that no caller can override."""
    inputs = {value.name for value in model.graph.input}
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in inputs}
    layers = []
    for node in model.graph.node:
        if (node.domain, node.op_type) not in _PRODUCTS:
            continue
        weight = constants.get(node.input[1])
        if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
            continue
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        plain = (options.get("alpha", 1.0), options.get("beta", 1.0), options.get("transA", 0)) == (1.0, 1.0, 0)
        if not plain or (bias is not None and (bias not in constants or len(constants[bias].dims) != 1)):
            continue
        matrix = numpy_helper.to_array(weight)
        layers.append(Linear(node.input[1], node, matrix.T if options.get("transB") else matrix, bias))
    return layers


def calibrate(
    model: onnx.ModelProto, feeds: Iterable[Mapping[str, NDArray[Any]]], open_session: Callable[[bytes], Session]
) -> dict[str, Range]:
    """Ranges of what the linear layers multiply.

    Args:
        model: a float32 graph.
        feeds: inputs of one batch after another.
        open_session: makes a session of a serialised model.

    Returns:
        Ranges by the name of the tensor.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    channels = {layer.source: len(layer.weight) for layer in linear_layers(model)}
    if not channels:  # of a flow of no step, for one; a graph needs an output
        return {}
    graph = probe.graph
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "calibration_axis"))
    graph.initializer.append(numpy_helper.from_array(np.array([0, -1, BLOCK]), "calibration_blocks"))
    for index, (source, count) in enumerate(channels.items()):
        rows = f"calibration_{index}"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, count]), f"{rows}_shape"))
        graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, -count % BLOCK]), f"{rows}_margin"))
        graph.initializer.append(numpy_helper.from_array(np.zeros((1, count + -count % BLOCK)), f"{rows}_zeros"))
        # In double precision: a covariance is a small difference where a mean is large.
        graph.node.append(helper.make_node("Cast", [source], [f"{rows}_double"], to=TensorProto.DOUBLE))
        graph.node.append(helper.make_node("Reshape", [f"{rows}_double", f"{rows}_shape"], [rows]))
        for kind, operator in _STATISTICS.items():
            graph.node.append(helper.make_node(operator, [rows, "calibration_axis"], [f"{rows}_{kind}"], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(f"{rows}_{kind}", TensorProto.DOUBLE, [count]))
        graph.node.extend(_block_products(rows))
        graph.output.append(helper.make_tensor_value_info(f"{rows}_products", TensorProto.DOUBLE, [None, BLOCK, BLOCK]))
        graph.node.append(helper.make_node("Shape", [rows], [f"{rows}_count"], end=1))
        graph.output.append(helper.make_tensor_value_info(f"{rows}_count", TensorProto.INT64, [1]))
    session = open_session(probe.SerializeToString())
    totals: list[_Total] = [_Total() for _ in channels]
    for feed in feeds:
        found = iter(session.run(None, feed))
        for total in totals:
            total.add(*(next(found) for _ in (*_STATISTICS, "products", "count")))
    return {source: total.range() for source, total in zip(channels, totals, strict=True)}


def _block_products(rows: str) -> list[onnx.NodeProto]:
    """Nodes for X'X of rows X (n, K) within blocks of `BLOCK` columns."""
    return [
        helper.make_node("Pad", [rows, f"{rows}_margin"], [f"{rows}_whole"]),
        # One row of zeros, which adds nothing: Einsum may read no tensor that could be without elements.
        helper.make_node("Concat", [f"{rows}_whole", f"{rows}_zeros"], [f"{rows}_more"], axis=0),
        helper.make_node("Reshape", [f"{rows}_more", "calibration_blocks"], [f"{rows}_in_blocks"]),
        # Not Transpose and MatMul: ONNX Runtime 1.25 fuses these into an operator that it has in float32 alone.
        helper.make_node("Einsum", [f"{rows}_in_blocks"] * 2, [f"{rows}_products"], equation="nbi,nbj->bij"),
    ]


class _Total:
    """Sums over batches of what one layer multiplies."""

    def __init__(self) -> None:
        self.low, self.high, self.count = 0.0, 0.0, 0.0
        self.sum: Rows = np.zeros(1)
        self.products: Rows = np.zeros(1)

    def add(self, low: Rows, high: Rows, total: Rows, products: Rows, count: NDArray[np.int64]) -> None:
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        self.sum, self.products = self.sum + total, self.products + products
        self.count += float(count[0])

    def range(self) -> Range:
        mean, products = self.sum / self.count, self.products / self.count
        blocks = np.zeros(products.shape[:2])
        blocks.reshape(-1)[: len(mean)] = mean
        return Range(self.low, self.high, mean, products - blocks[:, :, None] * blocks[:, None, :])


def rounding_noise(layers: Iterable[Linear], ranges: Mapping[str, Range]) -> dict[str, float]:
    """Power of the error that rounding a layer's inputs leaves in its outputs, as a fraction of their variance.

    step^2 / 12 sum_j |W_j|^2 over sum_j Var[x_j] |W_j|^2, correlations of the inputs aside: large where few channels
    are far larger than the others, which then share the few levels near 0. Of a layer used several times the largest.
    """
    noise: dict[str, float] = {}
    for layer in layers:
        found = ranges[layer.source]
        gain = np.square(layer.weight.astype(np.float64)).sum(axis=1)
        signal = float(found.variance @ gain)
        ratio = found.step**2 / 12 * float(gain.sum()) / signal if signal > 0 else 0.0
        noise[layer.name] = max(noise.get(layer.name, 0.0), ratio)
    return noise


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, Range], *, keep: Collection[str] = ()
) -> tuple[onnx.ModelProto, list[str]]:
    """The model with int8 products in place of float32 ones.

    Args:
        model: a float32 graph.
        ranges: as `calibrate` gives them.
        keep: names of layers that stay float32.

    Returns:
        The model, and the names of its int8 layers.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    layers = {layer.node.output[0]: layer for layer in linear_layers(quantized) if layer.name not in keep}
    writer = _Writer(quantized, _covariances(layers.values(), ranges))
    nodes: list[onnx.NodeProto] = []
    for node in quantized.graph.node:
        layer = layers.get(node.output[0])
        if layer is not None:
            nodes += writer.product(layer, ranges[layer.source])
        elif (node.domain, node.op_type) == (MICROSOFT, "Gelu") and node.input[0] in writer.products:
            # Its approximation by tanh is off by less than 0.0005, far less than the product's rounding.
            nodes.append(helper.make_node("FastGelu", node.input, node.output, domain=MICROSOFT))
        elif node.output[0] not in writer.absorbed:
            nodes.append(node)
    del quantized.graph.node[:]
    quantized.graph.node.extend(nodes)
    quantized.graph.initializer.extend(writer.constants.values())
    _drop_unused(quantized)
    if layers and all(opset.domain != MICROSOFT for opset in quantized.opset_import):
        quantized.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return quantized, list(dict.fromkeys(layer.name for layer in layers.values()))


def _covariances(layers: Iterable[Linear], ranges: Mapping[str, Range]) -> dict[str, NDArray[np.float64]]:
    """Covariances of what each layer's weights are multiplied with, in all the places where they are, added up."""
    found: dict[str, NDArray[np.float64]] = {}
    for layer in layers:
        found[layer.name] = found.get(layer.name, 0) + ranges[layer.source].covariance
    return found


class _Writer:
    """Makes the nodes of int8 products; inputs are quantised once, weights likewise."""

    def __init__(self, model: onnx.ModelProto, covariances: Mapping[str, NDArray[np.float64]]) -> None:
        graph = model.graph
        self._covariances = covariances
        self.constants: dict[str, onnx.TensorProto] = {}
        self.absorbed: set[str] = set()
        self.products: set[str] = set()
        self._quantized: dict[str, tuple[str, str, str]] = {}
        inputs = {value.name for value in graph.input}
        constants = [tensor for tensor in graph.initializer if tensor.name not in inputs]
        self._vectors = {tensor.name: tensor for tensor in constants if len(tensor.dims) == 1}
        self._producers = {output: node for node in graph.node for output in node.output}
        self._bytes = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
        self._outputs = {value.name for value in graph.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {name: [] for name in self._outputs}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def product(self, layer: Linear, found: Range) -> list[onnx.NodeProto]:
        """The nodes in place of one layer, and of the bias added to it."""
        nodes: list[onnx.NodeProto] = []
        if layer.source not in self._quantized:
            nodes += self._quantize(layer.source, found)
        values, scale, zero = self._quantized[layer.source]
        weight, weight_scale = self._weight(layer)
        bias, output = layer.bias or "", layer.node.output[0]
        if layer.node.op_type == "Attention":
            inputs = [values, weight, self._bias(layer, bias, found), scale, weight_scale, "", zero]
            attention = helper.make_node("QAttention", inputs, [output], domain=MICROSOFT)
            attention.attribute.extend(layer.node.attribute)
            return [*nodes, attention]
        consumers = self._consumers[output]
        if not bias and len(consumers) == 1 and consumers[0].op_type == "Add" and output not in self._outputs:
            (add,) = consumers
            others = [name for name in add.input if name != output]
            if len(others) == 1 and self._length(others[0]) == layer.weight.shape[1]:
                bias, output = others[0], add.output[0]
                self.absorbed.add(output)
        inputs = [values, weight, scale, weight_scale, zero, "", self._bias(layer, bias, found)]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], domain=MICROSOFT))
        self.products.add(output)
        return nodes

    def _quantize(self, source: str, found: Range) -> list[onnx.NodeProto]:
        exact = self._cast_of_bytes(source)
        step, low = (1.0, 0.0) if exact else (found.step, found.low)
        scale = self._constant(f"{source}_scale", np.array(step, np.float32))
        zero = self._constant(f"{source}_zero", np.array(np.clip(np.rint(-low / step), 0, _LEVELS), np.uint8))
        if exact:
            self._quantized[source] = (exact, scale, zero)
            return []
        self._quantized[source] = (f"{source}_int8", scale, zero)
        return [helper.make_node("QuantizeLinear", [source, scale, zero], [f"{source}_int8"])]

    def _cast_of_bytes(self, source: str) -> str | None:
        """The bytes that a tensor is a mere cast of, or None: pixels are levels already."""
        cast = self._producers.get(source)
        if cast is None or cast.op_type != "Cast":
            return None
        name = cast.input[0]
        while name in self._producers and self._producers[name].op_type in ("Reshape", "Transpose"):
            name = self._producers[name].input[0]
        return cast.input[0] if name in self._bytes else None

    def _weight(self, layer: Linear) -> tuple[str, str]:
        values, scale = f"{layer.name}_int8", f"{layer.name}_scale"
        if values not in self.constants:
            levels, steps = integer_weights(layer.weight, self._covariances[layer.name])
            self._constant(values, levels)
            self._constant(scale, steps)
        return values, scale

    def _bias(self, layer: Linear, bias: str, found: Range) -> str:
        """The bias, with what rounding the weights takes from the mean output."""
        levels, steps = (numpy_helper.to_array(self.constants[name]) for name in self._weight(layer))
        value = found.mean @ layer.weight - found.mean @ levels * steps
        if bias:
            value = value + numpy_helper.to_array(self._vectors[bias])
        return self._constant(f"{layer.node.output[0]}_int8_bias", value.astype(np.float32))

    def _length(self, name: str) -> int | None:
        return self._vectors[name].dims[0] if name in self._vectors else None

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove casts and weights that nothing reads any more."""
    graph = model.graph
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        used = [node for node in graph.node if any(name in read for name in node.output)]
        if len(used) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(used)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
