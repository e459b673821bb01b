"""What a CPU does needlessly in an exported tower, taken out; what is not there is left alone.

LayerNormalization stays one operator through the export, attention is translated as it should be
(`fastfsl.export.attention`), and ONNX Runtime itself makes one operator of QuickGELU, of GELU and its bias, and of a
residual sum and its norm when it loads a graph. It does not know GELU as torch writes it; onnxscript does. For the
place where the pixels come in neither onnxscript nor `onnxruntime.transformers` has a rule.
"""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite
from onnxscript.rewriter.ort_fusions import erfgelu

_Op = Any  # onnxscript's builder: whatever operator is asked of it, it has
_Value = Any  # onnx_ir's value, which has its node, its shape and a name wherever a pattern fits


class _PatchesAsRows(RewriteRuleClassBase):
    """Convolution of patches that do not overlap -> one matrix product of the raw bytes with folded weights.

    With y = W ((p / 255 - mean) / std) + b the folded weights are W' = W / (255 std) and b' = b - W (mean / std).
    Pixels are then moved as bytes, not as floats, and an int8 product can take them as they are.
    """

    def pattern(self, op: _Op, images: _Value, scale: _Value, mean: _Value, std: _Value, shape: _Value) -> _Value:
        pixels = op.Cast(op.Transpose(images, perm=[0, 3, 1, 2]), to=ir.DataType.FLOAT)
        normal = op.Div(op.Sub(op.Div(pixels, scale), mean), std)
        patches = op.Conv(normal, _allow_other_inputs=True, _outputs=["patches"])
        tokens: _Value = op.Transpose(op.Reshape(patches, shape), perm=[0, 2, 1])
        return tokens

    def check(  # type: ignore[override]  # the values come by name, and a bool will do
        self,
        context: object,  # noqa: ARG002  # the rewriter's protocol
        images: _Value,
        patches: _Value,
        **values: _Value,
    ) -> bool:
        conv = patches.producer()
        constants = [*conv.inputs[1:], *(values[name] for name in ("scale", "mean", "std"))]
        if (
            images.dtype != ir.DataType.UINT8
            or images.shape is None
            or any(_array(value) is None for value in constants)
        ):
            return False
        weight, sides = _array(conv.inputs[1]), images.shape[1:3]
        kernel, attributes = list(weight.shape[2:]), conv.attributes
        return (
            weight.shape[1:2] == (3,)
            and list(attributes.get_ints("strides", [1, 1])) == kernel
            and not any(attributes.get_ints("pads", [0]))
            and set(attributes.get_ints("dilations", [1])) == {1}
            and all(isinstance(side, int) and side % size == 0 for side, size in zip(sides, kernel, strict=True))
        )

    def rewrite(
        self,
        op: _Op,
        images: _Value,
        patches: _Value,
        scale: _Value,
        mean: _Value,
        std: _Value,
        **_: _Value,
    ) -> _Value:
        conv = patches.producer()
        weight, *bias = (_array(value) for value in conv.inputs[1:])
        divisor, center, deviation = (_array(value).reshape(-1) for value in (scale, mean, std))
        width, _channels, rows, columns = weight.shape
        folded = weight / (divisor * deviation).reshape(1, -1, 1, 1)
        offset = sum(bias) - (weight * (center / deviation).reshape(1, -1, 1, 1)).sum(axis=(1, 2, 3))
        down, across = images.shape[1] // rows, images.shape[2] // columns

        def constant(name: str, array: NDArray[Any]) -> _Value:
            value: _Value = op.initializer(ir.tensor(array, name=f"{conv.inputs[1].name}_{name}"))
            return value

        tiles = op.Reshape(images, constant("tiles", np.array([-1, down, rows, across, columns, 3])))
        tiles = op.Transpose(tiles, perm=[0, 1, 3, 2, 4, 5])
        flat = op.Reshape(tiles, constant("rows", np.array([-1, down * across, rows * columns * 3])))
        matrix = folded.transpose(2, 3, 1, 0).reshape(-1, width).astype(np.float32)
        product = op.MatMul(op.Cast(flat, to=ir.DataType.FLOAT), constant("matrix", matrix))
        tokens: _Value = op.Add(product, constant("offset", offset.astype(np.float32)))
        return tokens


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in fewer steps.

    Args:
        model: a tower as torch exported it; pixels, if any, enter as `images` (n, height, width, 3) uint8.

    Returns:
        The fused model; where nothing fits, an equal one.
    """
    patches = _PatchesAsRows.rule()  # type: ignore[no-untyped-call]  # onnxscript's
    fused: onnx.ModelProto = rewrite(model, RewriteRuleSet([patches, *erfgelu.rules]))
    return fused


def _array(value: _Value) -> Any:  # noqa: ANN401  # a float64 array, or None of what is no constant
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy().astype(np.float64)
