"""Whole numbers are divided by constants above 0 alone.

A processor answers a whole number over 0, and the smallest one over -1, with a signal that ends the process. ONNX
Runtime does not look for the second. So a division is one of floating-point numbers, or its divisor is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastfsl.bundle.onnx_message import BOOL, FLOAT, FLOATS, INT32, INT64, Node

# Operators that divide whole numbers by whole numbers of their inputs.
_DIVIDING = {"Div", "Mod"}

# What an operator's first output is. ONNX Runtime holds operators to their types itself: what counts here is that
# nothing is called floating-point that is not. Operators that are not listed give what is not known.
_FLOATING = frozenset({
    "Attention", "AveragePool", "BatchNormalization", "BiasAdd", "BiasGelu", "BiasSplitGelu", "Conv", "Cos", "Elu",
    "Erf", "Exp", "FastGelu", "FusedConv", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "GroupNorm",
    "GroupNormalization", "HardSigmoid", "HardSwish", "InstanceNormalization", "LayerNormalization", "LeakyRelu",
    "Log", "LogSoftmax", "LpNormalization", "Mean", "Mish", "MultiHeadAttention", "QuickGelu", "RMSNormalization",
    "Reciprocal", "RotaryEmbedding", "Sigmoid", "SimplifiedLayerNormalization", "Sin", "SkipGroupNorm",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh",
})  # fmt: skip
_AS_FIRST = frozenset({
    "Abs", "Add", "Ceil", "Clip", "Compress", "Concat", "CumSum", "Div", "Dropout", "Einsum", "Expand", "Flatten",
    "Floor", "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "Gather", "GatherElements", "GatherND", "Gemm",
    "Identity", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "PRelu", "Pad", "Pow", "Range", "ReduceL1",
    "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Sign", "Slice", "Split",
    "Squeeze", "Sub", "Sum", "Tile", "TopK", "TransposeMatMul", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
_FIXED = {
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "Shape", "Size"), INT64),
    **dict.fromkeys(("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"), BOOL),
    **dict.fromkeys(("Not", "Or", "Xor"), BOOL),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulInteger16"), INT32),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"), FLOAT),
}
# Which input says what the output is.
_AS_INPUT = {"Where": 1, "CastLike": 1, "DequantizeLinear": 1, "MatMulNBits": 0, "QuantizeLinear": 2}

Types = dict[str, int]


def note_types(node: Node, types: Types) -> None:
    """Add the types of what a node gives, as far as they are known; every output of ours is as the first."""
    kind = _output_type(node, types)
    if kind is not None and node.outputs:
        outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
        types.update(dict.fromkeys(outputs, kind))


def _output_type(node: Node, types: Types) -> int | None:
    op_type = node.op_type
    if op_type == "Constant":
        return None if node.constant is None else node.constant.data_type
    if op_type in ("Cast", "ConstantOfShape"):
        said = node.numbers.get("to") if op_type == "Cast" else None
        constant = None if node.constant is None else node.constant.data_type
        return said[0] if said else constant or (FLOAT if op_type == "ConstantOfShape" else None)
    if op_type in _FIXED:
        return _FIXED[op_type]
    if op_type in _FLOATING:
        return FLOAT
    if op_type == "DequantizeLinear" and node.numbers.get("output_dtype"):
        return node.numbers["output_dtype"][0] or None
    index = 0 if op_type in _AS_FIRST else _AS_INPUT.get(op_type)
    return types.get(node.inputs[index]) if index is not None and index < len(node.inputs) else None


def check_division(node: Node, types: Mapping[str, int], constants: Mapping[str, list[float] | None]) -> None:
    """Raise if a node may divide whole numbers by anything but constants above 0.

    Args:
        node: an operator.
        types: of the tensors before it, as far as they are known.
        constants: numbers of those that are constants and few, which no caller can replace.

    Raises:
        ValueError: it may.
    """
    if node.op_type not in _DIVIDING or any(types.get(name) in FLOATS for name in node.inputs):
        return  # both sides are of one type: ONNX Runtime loads no other graph
    divisor = constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if not divisor or not all(one > 0 for one in divisor):
        raise ValueError(
            f"{node.op_type} may divide whole numbers by 0 or -1, which ends the process: a divisor of theirs is a "
            "constant above 0"
        )


# Attributes by which ONNX Runtime divides; none of our graphs has one below 1.
_DIVISORS = {
    "bits", "block_size", "dilations", "group", "groups", "kernel_shape", "kv_num_heads", "num_groups", "num_heads",
    "q_num_heads", "strides",
}  # fmt: skip
# In these 0 is the word for "not in blocks" and "as the input is".
_ZERO_ALLOWED = {("DequantizeLinear", "block_size"), ("QuantizeLinear", "block_size"), ("RotaryEmbedding", "num_heads")}


def check_divisors(node: Node) -> None:
    """Raise if an attribute by which an operator divides is below 1."""
    for name, numbers in node.numbers.items():
        least = 0 if (node.op_type, name) in _ZERO_ALLOWED else 1
        if name in _DIVISORS and any(one < least for one in numbers):
            raise ValueError(f"{node.op_type[:40]} has {name} {min(numbers)}, below {least}")


# Operators that multiply whole numbers, and those whose products ONNX Runtime may turn into such.
INTEGER_PRODUCTS = frozenset({
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulInteger16",
    "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul",
})  # fmt: skip
