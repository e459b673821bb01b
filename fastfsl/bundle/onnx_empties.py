"""Operators that must not read an empty tensor.

ONNX Runtime 1.32 divides by the sizes of their inputs, or reads a first element, without checking that there is one: an
empty tensor then ends the process by a signal, or the operator never returns. Their inputs are followed back to every
operator that could have made an empty tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastfsl.bundle.onnx_message import Node, Tensor, Value

# By operator, the first of the inputs that must not be empty; those after it must not be, either.
_NOT_EMPTY = {
    "Einsum": 0,
    "InstanceNormalization": 0,
    "QAttention": 0,
    # Their kernels, and the bias.
    "Conv": 1,
    "FusedConv": 1,
    # Scales and zero points. ONNX Runtime fuses the first two with Softmax and Where, which fail in the same way.
    "DequantizeLinear": 1,
    "QuantizeLinear": 1,
    "DynamicQuantizeMatMul": 2,
    "MatMulIntegerToFloat": 2,
}

# Operators that can make an empty tensor from a full one: they select, repeat 0 times, or take windows that do not fit.
_LEAVING_OUT = frozenset({
    "AveragePool", "Compress", "ConstantOfShape", "Expand", "MaxPool", "NhwcMaxPool", "NonZero", "Pad",
    "QLinearAveragePool", "Range", "Shape", "Slice", "Split", "Tile", "TopK",
})  # fmt: skip
# The input that holds the size of the result; a constant one can be checked.
_SIZES = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
# Operators that pass on their first input; the other inputs are sizes and axes.
_FIRST_ALONE = frozenset({"Expand", "Reshape", "Squeeze", "Tile", "Unsqueeze"})


class Empties:
    """Tracks the tensors that may be empty.

    Args:
        inputs: of the graph; a batch has at least one row, since the runtime does not run a graph on none.
        constants: of the graph, by name.
    """

    def __init__(self, inputs: list[Value], constants: Mapping[str, Tensor]) -> None:
        self._possible = {value.name for value in inputs if 0 in value.dims}
        self._possible |= {name for name, tensor in constants.items() if tensor.num_elements == 0}

    def check(self, node: Node, constants: Mapping[str, list[float] | None]) -> None:
        """Check what a node reads, and note which of its outputs may be empty.

        Args:
            node: an operator, after those whose results it reads.
            constants: numbers of its inputs that are constants and few, which no caller can replace.

        Raises:
            ValueError: it may read an empty tensor, and the process would end.
        """
        inputs = [name for name in node.inputs if name]
        read = inputs[:1] if node.op_type in _FIRST_ALONE else inputs
        empty = [name in self._possible for name in read]
        first = _NOT_EMPTY.get(node.op_type)
        if first is not None and any(name in self._possible for name in node.inputs[first:]):
            raise ValueError(
                f"{node.op_type} may read a tensor without elements, which ends the process: what it reads is made of "
                "the graph's inputs and of constants without leaving any out"
            )
        # A concatenation is empty only if all of its parts are.
        possible = all(empty) and bool(empty) if node.op_type == "Concat" else any(empty)
        if node.op_type == "Constant":
            possible = node.constant is not None and node.constant.num_elements == 0
        if possible or (node.op_type in _LEAVING_OUT and not _sizes_above_0(node, constants)):
            self._possible.update(name for name in node.outputs if name)


def _sizes_above_0(node: Node, constants: Mapping[str, list[float] | None]) -> bool:
    index = _SIZES.get(node.op_type)
    if index is None or index >= len(node.inputs):
        return False
    sizes = constants.get(node.inputs[index])
    return bool(sizes) and all(size > 0 for size in sizes or ())
