"""What may stand in a bundle's ONNX graphs, checked before ONNX Runtime parses them. Standard library only.

A graph is a program. Those of a bundle are plain ones: one graph of known operators, no branches, loops or functions,
every weight inside, no division that could end the process, and few bytes that are no weights. How much memory the
results of constants take is bounded here, that of others when it runs (`fastfsl.runtime.arena`). How long it computes
is not: a bundle from a stranger belongs in a process that may be stopped, and one that is to be trusted is pinned by
its digest.
"""

from __future__ import annotations

import graphlib
import math
from dataclasses import dataclass, field

from fastfsl.bundle.onnx_division import (
    INTEGER_PRODUCTS,
    Types,
    check_division,
    check_divisors,
    note_types,
)
from fastfsl.bundle.onnx_empties import Empties
from fastfsl.bundle.onnx_message import (
    DATA_TYPES,
    HALF,
    INT8,
    MAX_CONSTANTS,
    MAX_NAMES,
    MAX_NODES,
    Node,
    OtherBytes,
    Tensor,
    Value,
    as_bytes,
    parts,
    read_node,
    read_tensor,
    read_value,
)
from fastfsl.bundle.onnx_sizes import Folding, bytes_of_type
from fastfsl.bundle.protobuf import BYTES
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.errors import BundleError

# Operators on tensors that exporters, fusions and quantisers write for image and text towers and for flows. Whatever
# runs other graphs, reads files, draws random numbers or handles strings and sequences is left out. So are some that no
# exporter of ours writes and that end the process over an empty tensor, or over a number where a tensor is expected
# (ONNX Runtime 1.32): Attention of the standard, QLinearConcat, QLinearConv, QLinearSoftmax, QLinearWhere, and
# Microsoft's MultiHeadAttention, RotaryEmbedding and two SkipLayerNormalizations.
_STANDARD = """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Clip Compress Concat
    Constant ConstantOfShape Conv ConvInteger Cos CumSum DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum
    Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool
    Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max MaxPool
    Mean Min Mish Mod Mul Neg NonZero Not Or PRelu Pad Pow QLinearMatMul QuantizeLinear RMSNormalization
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign
    SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK
    Transpose Trilu Unsqueeze Where Xor
"""
_MICROSOFT = """
    Attention BiasAdd BiasGelu BiasSplitGelu DequantizeLinear DynamicQuantizeMatMul FastGelu FusedConv FusedGemm
    FusedMatMul FusedMatMulActivation Gelu GroupNorm MatMulInteger16 MatMulIntegerToFloat MatMulNBits NhwcConv
    NhwcFusedConv NhwcMaxPool QAttention QGemm QLinearAdd QLinearAveragePool QLinearGlobalAveragePool
    QLinearLeakyRelu QLinearMul QLinearSigmoid QuantizeLinear QuickGelu SkipGroupNorm TransposeMatMul
"""
OPERATORS = {
    "": frozenset(_STANDARD.split()),
    "ai.onnx": frozenset(_STANDARD.split()),
    "com.microsoft": frozenset(_MICROSOFT.split()),
}


# Dimensions of an input of vectors: rows, and the numbers of each.
_VECTORS_RANK = 2


@dataclass(frozen=True)
class GraphFacts:
    """What a checked graph says of itself.

    Args:
        model_bytes: of the model.
        row_values: numbers of one row of its largest input.
        images: that input's rows are images, not vectors.
        integer_products: some products are of whole numbers.
        signed_products: some of these take their rows as int8, not as uint8.
        half: something in it is float16.
        constant_names: the names of its constants.
        scalars: constants of one number.
        num_nodes: operators in it.
        folding_bytes: that ONNX Runtime may make of constants for each operator, when it loads the graph.
        folding_known: it makes nothing whose size is not bounded by the graph itself.
    """

    model_bytes: int
    row_values: int = 1
    images: bool = False
    integer_products: bool = False
    signed_products: bool = False
    half: bool = False
    constant_names: frozenset[str] = frozenset()
    scalars: dict[str, float] = field(default_factory=dict)
    num_nodes: int = 0
    folding_bytes: int = 0
    folding_known: bool = True


def check_graph_file(model: bytes, name: str, *, half: bool = False) -> GraphFacts:
    """Refuse a serialised ONNX model that is more than one plain graph with its weights inside.

    Args:
        model: the file's bytes.
        name: what messages call it.
        half: it may compute in float16.

    Returns:
        What it says of itself.

    Raises:
        BundleError: the bytes are no ONNX model; or it has weights or other data outside, an operator that no exporter
            of ours writes, a type that it may not have, a graph inside a graph, a function, a division of whole
            numbers that may end the process, a constant size beyond all reason, or too much that is no weights.
    """
    try:
        return _check_model(memoryview(model), DATA_TYPES | {HALF} if half else DATA_TYPES)
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{name}: not a graph that fastfsl runs ({error}); {AGAIN}") from error


@dataclass
class _Graph:
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


def _check_model(model: memoryview, types: frozenset[int]) -> GraphFacts:
    graphs, other = [], OtherBytes()
    for number, value in parts(model, {7: BYTES, 20: BYTES, 25: BYTES}):
        if number == 7:
            graphs.append(value)
        elif number in (20, 25):
            raise ValueError("it holds functions or training steps, which no bundle needs")
        else:
            other.take(_length(value))
        if len(graphs) > 1:
            break
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs instead of one")
    return _check_graph(_read_graph(as_bytes(graphs[0]), types, other), len(model))


def _read_graph(message: memoryview, types: frozenset[int], other: OtherBytes) -> _Graph:
    graph = _Graph()
    for number, value in parts(message, dict.fromkeys((1, 5, 11, 12, 15), BYTES)):
        if number != 5:
            other.take(_length(value))
        if number == 1:
            graph.nodes.append(read_node(as_bytes(value), types))
        elif number == 5:
            tensor = read_tensor(as_bytes(value), types)
            other.take(tensor.head_bytes)
            if tensor.name in graph.constants:
                raise ValueError(f"the name {tensor.name[:40]} stands for two things")
            graph.constants[tensor.name] = tensor
        elif number in (11, 12):
            values = graph.inputs if number == 11 else graph.outputs
            values.append(read_value(as_bytes(value), types))
        elif number == 15:
            raise ValueError("it holds sparse weights, which no bundle needs")
        for what, most, found in (
            ("nodes", MAX_NODES, graph.nodes),
            ("constants", MAX_CONSTANTS, graph.constants),
            ("inputs", MAX_NAMES, graph.inputs),
            ("outputs", MAX_NAMES, graph.outputs),
        ):
            if len(found) > most:
                raise ValueError(f"it has more than {most} {what}")
    return graph


def _check_graph(graph: _Graph, model_bytes: int) -> GraphFacts:
    for node in graph.nodes:
        if node.op_type not in OPERATORS.get(node.domain, ()):
            raise ValueError(f"the operator {node.domain[:40]}:{node.op_type[:40]} is none that it may hold")
        check_divisors(node)
    types: Types = {value.name: value.data_type for value in graph.inputs}
    types |= {name: tensor.data_type for name, tensor in graph.constants.items()}
    folding = Folding(model_bytes)
    for name, tensor in graph.constants.items():
        folding.constant(name, tensor)
    empties = Empties(graph.inputs, graph.constants)
    signed = False
    replaced = {value.name for value in graph.inputs}  # a caller may give other numbers for these
    for node in _in_order(graph):
        constants = {name: folding.numbers(name) for name in node.inputs if name not in replaced}
        check_division(node, types, constants)
        empties.check(node, constants)
        signed |= node.op_type in INTEGER_PRODUCTS and INT8 in map(types.get, node.inputs[:1])
        note_types(node, types)
        folding.add(node, bytes_of_type(types.get(node.outputs[0]) if node.outputs else None))
    rows = max((one for one in graph.inputs if one.name not in graph.constants), key=_row_values, default=Value())
    return GraphFacts(
        model_bytes=model_bytes,
        row_values=_row_values(rows),
        images=len(rows.dims) > _VECTORS_RANK,
        integer_products=any(node.op_type in INTEGER_PRODUCTS for node in graph.nodes),
        signed_products=signed,
        half=HALF in types.values(),
        constant_names=frozenset(graph.constants),
        scalars={
            name: tensor.values[0]
            for name, tensor in graph.constants.items()
            if tensor.values is not None and len(tensor.values) == 1
        },
        num_nodes=len(graph.nodes),
        folding_bytes=folding.bytes_each,
        folding_known=folding.unknown == 0,
    )


def _in_order(graph: _Graph) -> list[Node]:
    """The nodes, each after those whose results it reads.

    Raises:
        ValueError: a name stands for two things, or a node waits for itself.
    """
    makers: dict[str, int] = {}
    known = {*graph.constants, *(value.name for value in graph.inputs)}
    ordered = True
    for index, node in enumerate(graph.nodes):
        ordered = ordered and all(name in known or not name for name in node.inputs)
        for name in filter(None, node.outputs):
            if name in known:
                raise ValueError(f"the name {name[:40]} stands for two things")
            makers[name] = index
            known.add(name)
    if ordered:
        return graph.nodes
    # ONNX wants nodes in the order in which they are computed; ONNX Runtime takes them in any.
    waits = {index: [makers[name] for name in node.inputs if name in makers] for index, node in enumerate(graph.nodes)}
    return [graph.nodes[index] for index in graphlib.TopologicalSorter(waits).static_order()]


def _length(value: int | memoryview) -> int:
    return 0 if isinstance(value, int) else len(value)


def _row_values(value: Value) -> int:
    """Numbers of one row of an input; what its first dimension says is how many rows there are."""
    return math.prod(size for size in value.dims[1:] if size is not None and size > 0)
