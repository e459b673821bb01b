"""How much ONNX Runtime may make of a graph's constants while it loads it.

It computes what depends on constants alone, and keeps the results. Sizes that can be told from the graph are bounded
here. For others there is a bound for each result (`Folding.bytes_each`), which ONNX Runtime is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastfsl.bundle.onnx_message import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT8,
    INT64,
    MAX_RANK,
    UINT8,
    UINT64,
    WHOLE_RANGES,
    Node,
    Tensor,
)

# Elements that operators make of constants, beyond those that they read: 64 MiB of float32.
MAX_ELEMENTS = 2**24
# Bytes that all results together may have: for each byte of the model so many, and so many more.
_BYTES_OF_ONE = 4
_BYTES_MORE = 64 * 2**20

# Operators that make something large of something small, and the inputs that say how large.
_SIZES = {"ConstantOfShape": (0,), "Expand": (1,), "Pad": (1,), "Range": (0, 1), "Tile": (1,)}
# Operators that hand on numbers, and of how many inputs.
_PASSING = {"Cast": 1, "Concat": None, "Identity": 1, "Reshape": 1, "Squeeze": 1, "Unsqueeze": 1}
# Operators whose result has as many elements as their first input, or fewer.
_AS_LARGE = frozenset({
    "Abs", "ArgMax", "ArgMin", "BiasAdd", "BiasGelu", "Cast", "Ceil", "Compress", "Cos", "CumSum", "DequantizeLinear",
    "Dropout", "Elu", "Erf", "Exp", "FastGelu", "Flatten", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization", "Mish", "Neg", "Not",
    "QuantizeLinear", "QuickGelu", "RMSNormalization", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Swish", "Tanh", "TopK", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
# Operators that repeat the sizes of each input where the others are larger.
_BROADCASTING = frozenset({
    "Add", "And", "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min",
    "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
})  # fmt: skip
# Operators whose attributes make their result larger than their inputs.
_PADDING = frozenset({
    "AveragePool", "Conv", "ConvInteger", "FusedConv", "MaxPool", "NhwcConv", "NhwcFusedConv", "NhwcMaxPool",
    "QLinearAveragePool", "QLinearConv",
})  # fmt: skip
# Stands for a number that cannot be told.
_BEYOND = -(2**63)
# Elements of a result that may be taken as known where it has at most so many.
_SMALL = 2**13
_LENGTHS = {INT8: 1, UINT8: 1, BOOL: 1, DOUBLE: 8, INT64: 8, UINT64: 8}


@dataclass
class _Known:
    """What is known of a tensor that depends on constants alone; None: not known."""

    count: int | None = None
    dims: list[int] | None = None
    values: list[float] | None = None


@dataclass
class Folding:
    """What ONNX Runtime may compute when it loads a graph.

    Args:
        model_bytes: of the model.
    """

    model_bytes: int
    unknown: int = 0
    _made: int = 0
    _bytes: int = 0
    _known: dict[str, _Known] = field(default_factory=dict)

    def constant(self, name: str, tensor: Tensor) -> None:
        """Note a constant."""
        self._known[name] = _Known(tensor.num_elements, tensor.dims, tensor.values)

    def numbers(self, name: str) -> list[float] | None:
        """The numbers of a tensor that depends on constants alone; None if they are many, or not known."""
        known = self._known.get(name)
        return None if known is None else known.values

    @property
    def bytes_each(self) -> int:
        """Bytes that one result may have, so that all of them together stay below the bound."""
        return (self._most_bytes - self._bytes) // max(1, self.unknown)

    @property
    def _most_bytes(self) -> int:
        return _BYTES_MORE + _BYTES_OF_ONE * self.model_bytes

    def add(self, node: Node, bytes_of_one: int = 8) -> None:
        """Note an operator.

        Args:
            node: the operator.
            bytes_of_one: of each number of its result.

        Raises:
            ValueError: what is made of constants is too large.
        """
        outputs = [name for name in node.outputs if name]
        if node.constant is not None and node.op_type == "Constant":
            for name in outputs:
                self.constant(name, node.constant)
            return
        inputs, sizes = [name for name in node.inputs if name], self._sizes(node)
        if node.op_type in ("Shape", "Size"):
            self._known |= {name: _Known(MAX_RANK) for name in outputs}
        elif all(name in self._known for name in inputs[: _PASSING.get(node.op_type)]):
            read = [self._known[name] for name in inputs if name in self._known]
            result = self._result(node, read, sizes)
            self._count(node, read, result, sizes, bytes_of_one)
            self._known |= dict.fromkeys(outputs, result)
        else:
            self._made += sizes or 0
            self._check_made(node)

    def _sizes(self, node: Node) -> int | None:
        """Elements that constant sizes ask of an operator; None: they are no constants, or not known."""
        found = None
        for index in _SIZES.get(node.op_type, ()):
            known = self._known.get(node.inputs[index]) if index < len(node.inputs) else None
            if known is None:
                continue
            if known.count is not None and known.count > 2 * MAX_RANK:
                raise ValueError(f"{node.op_type} has sizes for {known.count} dimensions")
            if known.values:
                product = math.prod(max(1, abs(one)) for one in known.values)
                found = max(found or 0, math.ceil(product) if product <= MAX_ELEMENTS else MAX_ELEMENTS + 1)
        return found

    def _result(self, node: Node, inputs: list[_Known], sizes: int | None) -> _Known:
        """What is known of an operator's result, its size at most this."""
        counts = [one.count for one in inputs if one.count is not None]
        if len(counts) < len(inputs) or (not inputs and node.op_type != "Constant"):
            return _Known()
        if node.op_type in _PASSING:
            return _passed(node, inputs[: _PASSING[node.op_type]])
        if node.op_type in _SIZES:
            return _Known(sizes if node.op_type == "ConstantOfShape" else None)
        if node.op_type in _AS_LARGE:
            return _Known(counts[0])
        if node.op_type in _BROADCASTING and all(one.dims is not None for one in inputs):
            dims = _broadcast([one.dims or [] for one in inputs])
            return _Known(math.prod(dims), dims)
        product = math.prod(max(1, one) for one in counts)
        return _Known(product if product <= _SMALL and node.op_type not in _PADDING else None)

    def _count(self, node: Node, inputs: list[_Known], result: _Known, sizes: int | None, bytes_of_one: int) -> None:
        """Add a result to what is made."""
        if result.count is None:
            self.unknown += 1
            self._made += sizes or 0
        else:
            self._made += max(sizes or 0, result.count - sum(one.count or 0 for one in inputs))
            self._bytes += result.count * bytes_of_one
        self._check_made(node)

    def _check_made(self, node: Node) -> None:
        if self._made > MAX_ELEMENTS:
            raise ValueError(f"{node.op_type} makes more than {MAX_ELEMENTS} elements")
        if self._bytes > self._most_bytes:
            raise ValueError(f"more than {self._most_bytes} bytes are made of its constants when it is loaded")


def _passed(node: Node, inputs: list[_Known]) -> _Known:
    """What is known of numbers that are handed on."""
    values: list[float] | None = None
    if all(one.values is not None for one in inputs):
        values = [number for one in inputs for number in one.values or []]
    if values is not None and len(values) > MAX_RANK:
        values = None
    if values is not None and node.op_type == "Cast" and node.numbers.get("to") != [FLOAT]:
        least, most = WHOLE_RANGES.get((node.numbers.get("to") or [0])[0], (-math.inf, math.inf))
        values = [math.trunc(one) if math.isfinite(one) else _BEYOND for one in values]
        # What does not fit becomes something else, 0 and -1 among it: too large for a size, and no divisor.
        values = [one if least <= one <= most else _BEYOND for one in values]
    dims = inputs[0].dims if node.op_type in ("Cast", "Identity") else None
    return _Known(sum(one.count or 0 for one in inputs), dims, values)


def _broadcast(every: list[list[int]]) -> list[int]:
    """The sizes of what operators make of tensors of these sizes."""
    rank = max(map(len, every))
    return [max(sizes) for sizes in zip(*([1] * (rank - len(dims)) + dims for dims in every), strict=True)]


def bytes_of_type(data_type: int | None) -> int:
    """Bytes of one number of a type; the most where it is not known."""
    return 8 if data_type is None else _LENGTHS.get(data_type, 4)
