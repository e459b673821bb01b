"""What may stand in a bundle's ONNX graphs, checked before ONNX Runtime parses them. Standard library only.

A graph is a program. Those of a bundle are plain ones: one graph of known operators, no branches, loops or functions,
every weight inside. What a graph computes cannot be told beforehand, nor how much memory its intermediate results
take: sizes that stand in it as constants are bounded here, computed ones are not. So a bundle from a stranger belongs
in a process whose memory is limited, and one that is to be trusted is pinned by its digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastfsl.bundle.protobuf import BYTES, VARINT, fields, signed, varints
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.errors import BundleError

# Operators on tensors that exporters, fusions and quantisers write for image and text towers and for flows. Whatever
# runs other graphs, reads files, draws random numbers or handles strings and sequences is left out.
_STANDARD = """
    Abs Add And ArgMax ArgMin Attention AveragePool BatchNormalization Cast CastLike Ceil Clip Compress Concat
    Constant ConstantOfShape Conv ConvInteger Cos CumSum DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum
    Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool
    Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max MaxPool
    Mean Min Mish Mod Mul Neg NonZero Not Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign
    SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK
    Transpose Trilu Unsqueeze Where Xor
"""
_MICROSOFT = """
    Attention BiasAdd BiasGelu BiasSplitGelu DequantizeLinear DynamicQuantizeMatMul FastGelu FusedConv FusedGemm
    FusedMatMul FusedMatMulActivation Gelu GroupNorm MatMulInteger16 MatMulIntegerToFloat MatMulNBits
    MultiHeadAttention NhwcConv NhwcFusedConv NhwcMaxPool QAttention QGemm QLinearAdd QLinearAveragePool QLinearConcat
    QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid QLinearSoftmax QLinearWhere
    QuantizeLinear QuickGelu RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
    TransposeMatMul
"""
OPERATORS = {
    "": frozenset(_STANDARD.split()),
    "ai.onnx": frozenset(_STANDARD.split()),
    "com.microsoft": frozenset(_MICROSOFT.split()),
}

# A ViT-L has some thousand nodes and fewer constants.
MAX_NODES = 100_000
# Of one dimension, step, window or margin that stands in a graph as an attribute.
MAX_ATTRIBUTE = 2**20
# Elements of all results whose sizes stand in a graph as constants: 256 MiB of float32. ONNX Runtime computes them when
# it loads the graph.
MAX_ELEMENTS = 2**26

# Operators that make something large of something small, and the inputs that say how large.
_SIZES = {"ConstantOfShape": (0,), "Expand": (1,), "Pad": (1,), "Range": (0, 1), "Tile": (1,)}
# Operators that hand on whole numbers, and of how many inputs.
_PASSING = {"Cast": 1, "Concat": None, "Identity": 1, "Reshape": 1, "Squeeze": 1, "Unsqueeze": 1}
# float32, the integers, bool, float64, and integers of 4 bits: as TensorProto.DataType counts them.
_DATA_TYPES = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 21, 22})
# float16, with which onnxruntime's CPU provider may end the process (1.30 and 1.31, on processors with AVX512-FP16).
_HALF = 10
# Attributes that say which type an operator gives or computes with; 0 is for "as the input".
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "softmax_precision", "stash_type", "precision"}
_INT32, _INT64 = 6, 7
_SMALL = 64  # bytes of a constant that may be a shape: eight numbers


def check_graph_file(model: bytes, name: str, *, half: bool = False) -> None:
    """Refuse a serialised ONNX model that is more than one plain graph with its weights inside.

    Args:
        model: the file's bytes.
        name: what messages call it.
        half: it may compute in float16.

    Raises:
        BundleError: the bytes are no ONNX model; or it has weights or other data outside, an operator that no exporter
            of ours writes, a type that it may not have, a graph inside a graph, a function, or a constant size beyond
            all reason.
    """
    try:
        _check_model(memoryview(model), _DATA_TYPES | {_HALF} if half else _DATA_TYPES)
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{name}: not a graph that fastfsl runs ({error}); {AGAIN}") from error


@dataclass
class _Tensor:
    name: str = ""
    data_type: int = 0
    dims: list[int] = field(default_factory=list)
    num_bytes: int = 0
    small: list[int] | None = None


@dataclass
class _Node:
    domain: str = ""
    op_type: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constant: list[int] | None = None


def _check_model(model: memoryview, types: frozenset[int]) -> None:
    graphs = []
    for number, value in _parts(model, {7: BYTES, 20: BYTES, 25: BYTES}):
        if number == 7:
            graphs.append(value)
        elif number in (20, 25):
            raise ValueError("it holds functions or training steps, which no bundle needs")
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs instead of one")
    _check_graph(_bytes(graphs[0]), types)


def _check_graph(graph: memoryview, types: frozenset[int]) -> None:
    constants: dict[str, list[int]] = {}
    nodes = []
    for number, value in _parts(graph, dict.fromkeys((1, 5, 11, 12, 15), BYTES)):
        if number == 1:
            nodes.append(_node(_bytes(value), types))
            if len(nodes) > MAX_NODES:
                raise ValueError(f"it has more than {MAX_NODES} nodes")
        elif number == 5:
            tensor = _tensor(_bytes(value), types)
            constants[tensor.name] = tensor.small or []
        elif number in (11, 12):
            _check_value(_bytes(value), types)
        elif number == 15:
            raise ValueError("it holds sparse weights, which no bundle needs")
    made, used = 0, set[str]()
    for node in nodes:
        made += _check_operator(node, constants)
        used.update(node.inputs)
        # ONNX wants nodes in the order in which they are computed; ONNX Runtime takes them in any.
        if not used.isdisjoint(name for name in node.outputs if name in constants):
            raise ValueError(f"a constant that {node.op_type} gives is used before it")
        if made > MAX_ELEMENTS:
            raise ValueError(f"{node.op_type} makes more than {MAX_ELEMENTS} elements")


def _check_operator(node: _Node, constants: dict[str, list[int]]) -> int:
    """Elements that an operator makes of constant sizes; what it makes of constants is noted if it is one itself."""
    if node.op_type not in OPERATORS.get(node.domain, ()):
        raise ValueError(f"the operator {node.domain[:40]}:{node.op_type[:40]} is none that it may hold")
    if node.op_type == "Constant":
        constants |= dict.fromkeys(node.outputs, node.constant or [])
    elif node.op_type in _PASSING and all(constants.get(name) for name in node.inputs[: _PASSING[node.op_type]]):
        passed = [number for name in node.inputs[: _PASSING[node.op_type]] for number in constants[name]]
        constants |= dict.fromkeys(node.outputs, passed if len(passed) <= _SMALL else [])  # no shape is as long
    made = 0
    for index in _SIZES.get(node.op_type, ()):
        sizes = constants.get(node.inputs[index], []) if index < len(node.inputs) else []
        made = max(made, math.prod(max(1, abs(size)) for size in sizes) if sizes else 0)
    return made


def _check_value(value_info: memoryview, types: frozenset[int]) -> None:
    """An input or output is of an allowed type; its name and its dimensions', which ONNX Runtime gives, are words."""
    tensors = _inner(_inner([value_info], 2), 1)  # its type, if that is a tensor's
    for tensor in tensors:
        for number, value in _parts(tensor, {1: VARINT}):
            if number == 1 and isinstance(value, int):
                _check_type(value, types)
    for message, number in ((value_info, 1), *((dim, 2) for dim in _inner(_inner(tensors, 2), 1))):
        for found, value in _parts(message, {number: BYTES}):
            if found == number:
                _text(value)


def _inner(messages: list[memoryview], number: int) -> list[memoryview]:
    """What the messages hold in their fields of this number."""
    return [_bytes(value) for one in messages for found, value in _parts(one, {number: BYTES}) if found == number]


def _check_type(data_type: int, types: frozenset[int]) -> None:
    if data_type not in types:
        raise ValueError(
            "it computes in float16, which only a bundle of precision fp16 may, on CUDA"
            if data_type == _HALF
            else f"a tensor of type {data_type}"
        )


def _node(message: memoryview, types: frozenset[int]) -> _Node:
    node = _Node()
    attributes = []
    for number, value in _parts(message, {1: BYTES, 2: BYTES, 4: BYTES, 5: BYTES, 7: BYTES}):
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 4:
            node.op_type = _text(value)
        elif number == 5:
            attributes.append(_bytes(value))
        elif number == 7:
            node.domain = _text(value)
    is_constant = node.op_type == "Constant"
    for attribute in attributes:
        name, numbers = _attribute(attribute, types, is_constant=is_constant)
        if name in _TYPE_ATTRIBUTES:
            for number in numbers:
                _check_type(number, types | {0})
        if name == "num_outputs" and numbers != [len(node.outputs)]:
            # ONNX Runtime 1.31 reads beyond its lists here, and takes the process with it.
            raise ValueError(f"{node.op_type[:40]} names {len(node.outputs)} outputs, and says {numbers[:1]}")
        node.constant = numbers or node.constant
    return node


def _attribute(message: memoryview, types: frozenset[int], *, is_constant: bool) -> tuple[str, list[int]]:
    """The name of an attribute and its whole numbers, if it has any; a tensor's only if it is small."""
    name, numbers = "", list[int]()
    for number, value in _parts(
        message, {1: BYTES, 3: VARINT, 5: BYTES, 6: BYTES, 10: BYTES, 11: BYTES, 22: BYTES, 23: BYTES}
    ):
        if number == 1:
            name = _text(value)
        elif number in (6, 11):
            raise ValueError("it holds a graph inside a graph")
        elif number in (22, 23):
            raise ValueError("it holds sparse weights, which no bundle needs")
        elif number in (5, 10):
            numbers += _tensor(_bytes(value), types).small or []
        elif number == 3 and isinstance(value, int):
            numbers.append(_limited(signed(value), is_constant=is_constant))
        elif number == 8:
            every = [value] if isinstance(value, int) else varints(value)
            numbers += [_limited(signed(one), is_constant=is_constant) for one in every]
    return name, numbers


def _limited(value: int, *, is_constant: bool) -> int:
    if not is_constant and abs(value) > MAX_ATTRIBUTE:
        raise ValueError(f"an attribute is {value}, beyond {MAX_ATTRIBUTE}")
    return value


def _tensor(message: memoryview, types: frozenset[int]) -> _Tensor:
    """A TensorProto's head; its data is counted, and read only where it may be a shape.

    Data fields: 4 float, 5 int32, 6 string, 7 int64, 9 raw, 10 double, 11 uint64; 13 external, 14 where the data lie.
    """
    tensor = _Tensor()
    data: list[tuple[int, int | memoryview]] = []
    for number, value in _parts(message, {2: VARINT, 8: BYTES, 9: BYTES, 13: BYTES, 14: VARINT}):
        if number == 1:
            tensor.dims += [signed(value)] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            tensor.data_type = value
        elif number == 8:
            tensor.name = _text(value)
        elif number in (13, 14) and value != 0:
            raise ValueError("it keeps weights in another file, and all of a bundle's weights lie in its graphs")
        elif number in (4, 5, 6, 7, 9, 10, 11):
            data.append((number, value))
            tensor.num_bytes += 1 if isinstance(value, int) else len(value)
    _check_type(tensor.data_type, types)
    # Two integers of 4 bits share a byte; nothing takes less.
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > 2 * tensor.num_bytes:
        raise ValueError("a tensor is said to be larger than its data")
    if tensor.data_type in (_INT32, _INT64) and tensor.num_bytes <= _SMALL:
        tensor.small = [number for kind, value in data for number in _integers(kind, value, tensor.data_type)]
    return tensor


def _integers(number: int, value: int | memoryview, data_type: int) -> Iterator[int]:
    if isinstance(value, int):
        yield signed(value)
    elif number == 9:
        size = 8 if data_type == _INT64 else 4
        for start in range(0, len(value) - size + 1, size):
            yield int.from_bytes(value[start : start + size], "little", signed=True)
    elif number in (5, 7):
        yield from varints(value)


def _parts(message: memoryview, kinds: dict[int, int]) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message, each of the kind it must have: readers skip a field of another kind without a word."""
    for number, kind, value in fields(message):
        if kinds.get(number, kind) != kind:
            raise ValueError(f"field {number} is of kind {kind}")
        yield number, value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("expected bytes, got a number")  # noqa: TRY004 - a message's content, not an argument
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()
