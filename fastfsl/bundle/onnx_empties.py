"""Some operators read tensors that have elements, and no others.

ONNX Runtime 1.32 divides by sizes of what they read, or reads its first element, without a look at how many there are:
over an empty tensor the process ends by a signal, or the operator never ends. What they read is followed back to where
a tensor without elements could come from.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastfsl.bundle.onnx_message import Node, Tensor, Value

# Each of them, and the first of its inputs from which on all must have elements.
_NOT_EMPTY = {
    "Einsum": 0,
    "InstanceNormalization": 0,
    "QAttention": 0,
    # Their kernels, and the bias.
    "Conv": 1,
    "FusedConv": 1,
    # Scales and zero points; of the first two Softmax and Where are made that compute with bytes.
    "DequantizeLinear": 1,
    "QuantizeLinear": 1,
    "DynamicQuantizeMatMul": 2,
    "MatMulIntegerToFloat": 2,
}

# Operators that may give nothing of something: they leave out, repeat 0 times, or take windows that do not fit.
_LEAVING_OUT = frozenset({
    "AveragePool", "Compress", "ConstantOfShape", "Expand", "MaxPool", "NhwcMaxPool", "NonZero", "Pad",
    "QLinearAveragePool", "Range", "Shape", "Slice", "Split", "Tile", "TopK",
})  # fmt: skip
# Of these the result is as large as one input tells, if that one is a constant.
_SIZES = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
# Operators of whose inputs the first alone is handed on; the others tell how.
_FIRST_ALONE = frozenset({"Expand", "Reshape", "Squeeze", "Tile", "Unsqueeze"})


class Empties:
    """Which tensors may have no elements.

    Args:
        inputs: of the graph; a batch has a row or more, since the runtime computes none of none.
        constants: of the graph, by name.
    """

    def __init__(self, inputs: list[Value], constants: Mapping[str, Tensor]) -> None:
        self._possible = {value.name for value in inputs if 0 in value.dims}
        self._possible |= {name for name, tensor in constants.items() if tensor.num_elements == 0}

    def check(self, node: Node, constants: Mapping[str, list[float] | None]) -> None:
        """Note what a node may give.

        Args:
            node: an operator, after those whose results it reads.
            constants: numbers of its inputs that are constants and few, which no caller can replace.

        Raises:
            ValueError: it may read nothing where that would end the process.
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
        # What is joined has the elements of all of its parts.
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
