"""Whether a graph's int8 products are the same on every processor, told from its weights.

ONNX Runtime multiplies bytes 0..255 by weights -128..127. Processors with VNNI or AMX, and ARM's, sum the products in
32 bits. With AVX2 or AVX-512 alone the products of two adjacent rows of the weights, 2j and 2j + 1, are summed first,
in 16 bits, and what does not fit is cut off. It always fits where the weights of one sign in such a pair add up to 128
at most: 255 * 128 = 32640. Numpy and the standard library alone: the runtime has no onnx package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl.bundle.manifest import FLOW_GRAPH, VISUAL_GRAPH
from fastfsl.bundle.protobuf import fields, signed, varints
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError

if TYPE_CHECKING:
    from fastfsl.bundle.manifest import Manifest

    Weights = np.ndarray[Any, np.dtype[np.int8]]

# The largest sum of two weights whose products with bytes, 0..255, fit in 16 bits together.
MAX_PAIR_SUM = 32767 // 255

# Operators that multiply bytes, and which input holds the weights, (K, N).
_WEIGHTS = {
    ("", "MatMulInteger"): 1,
    ("", "QLinearMatMul"): 3,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1,
    ("com.microsoft", "MatMulIntegerToFloat"): 1,
    ("com.microsoft", "QAttention"): 1,
    ("com.microsoft", "QGemm"): 3,
}
# These may multiply bytes too. Which of their weights are summed first is not known, and no exporter of ours writes
# them; ONNX Runtime makes products of bytes of the last one, too, and what it is fused with.
_UNKNOWN = {"ConvInteger", "QLinearConv", "MatMulNBits", "DequantizeLinear"}
_UINT8, _INT8 = 2, 3
# Elements looked at in one go: they stay in a processor's cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Int8Products:
    """What the int8 products of a graph, or of several, have in common.

    Args:
        max_pair_sum: the largest sum of two weights of one sign in adjacent rows; None: it cannot be told.
    """

    max_pair_sum: int | None

    @property
    def any_processor(self) -> bool:
        """Whether no sum can be cut off, whatever the processor."""
        return self.max_pair_sum is not None and self.max_pair_sum <= MAX_PAIR_SUM

    @staticmethod
    def together(found: Iterable[Int8Products | None]) -> Int8Products | None:
        """What several products, or graphs, have in common; None: there is no product among them."""
        sums = [products.max_pair_sum for products in found if products is not None]
        known = [largest for largest in sums if largest is not None]
        if not sums:
            return None
        return Int8Products(max(known) if len(known) == len(sums) else None)

    def describe(self) -> dict[str, Any]:
        """Both, as JSON values."""
        return {"max_pair_sum": self.max_pair_sum, "any_processor": self.any_processor}


def largest_pair_sum(weights: Weights) -> int:
    """The largest sum of the magnitudes of two weights of one sign in rows 2j and 2j + 1 of a column, (K, N).

    Of an odd number of rows the last one stands alone.
    """
    height, width = weights.shape
    largest = 0
    rows = max(2, _BLOCK // max(1, width) // 2 * 2)
    for start in range(0, height, rows):
        block = weights[start : start + rows].astype(np.int16)
        even, odd = block[::2], block[1::2]
        for sign in (1, -1):
            sums = np.maximum(sign * even, 0)
            sums[: len(odd)] += np.maximum(sign * odd, 0)
            largest = max(largest, int(sums.max(initial=0)))
    return largest


def int8_products(model: bytes, name: str) -> Int8Products | None:
    """What a graph's int8 products have in common; None: it has none.

    Args:
        model: a serialised ONNX model.
        name: what messages call it.

    Raises:
        BundleError: the bytes are no message.
    """
    try:
        graph = _Graph.read(memoryview(model))
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{name}: not a graph that fastfsl runs ({error}); {AGAIN}") from error
    return Int8Products.together(graph.products())


def check_int8_record(path: str | os.PathLike[str], manifest: Manifest, found: Int8Products | None) -> None:
    """Refuse a manifest that says of the weights what is not so.

    Args:
        path: the bundle's folder.
        manifest: its manifest.
        found: what its graphs have in common.

    Raises:
        BundleError: the graphs contradict it.
    """
    if manifest.int8 is None:
        return
    promised = manifest.int8["max_pair_sum"]
    if found is None or found.max_pair_sum is None or found.max_pair_sum > promised:
        got = "no int8 products" if found is None else found.max_pair_sum
        raise BundleError(
            f"{path}: the manifest says that two adjacent int8 weights add up to {promised} at most, and its graphs "
            f"have {got}; {AGAIN}"
        )


def read_int8_products(path: str | os.PathLike[str], manifest: Manifest) -> Int8Products | None:
    """What the int8 products of a bundle's graphs have in common, held against its manifest.

    Raises:
        BundleError: a graph is damaged, or the manifest contradicts it.
    """
    graphs = [name for name in (VISUAL_GRAPH, FLOW_GRAPH) if name in manifest.files]
    found = Int8Products.together(
        int8_products(read_file(path, manifest, name), f"{os.fspath(path)}/{name}") for name in graphs
    )
    check_int8_record(path, manifest, found)
    return found


@dataclass
class _Tensor:
    data_type: int = 0
    dims: list[int] = field(default_factory=list)
    raw: memoryview | None = None


@dataclass
class _Node:
    domain: str = ""
    op_type: str = ""
    inputs: list[str] = field(default_factory=list)
    transposed: bool = False


@dataclass
class _Graph:
    nodes: list[_Node]
    tensors: dict[str, _Tensor]

    @classmethod
    def read(cls, model: memoryview) -> _Graph:
        """The nodes that multiply bytes, and the constants of bytes."""
        nodes, tensors = [], {}
        for graph in _inner(model, 7):
            nodes += [node for node in map(_node, _inner(graph, 1)) if _multiplies_bytes(node)]
            for message in _inner(graph, 5):
                name, tensor = _tensor(message)
                if tensor.data_type in (_UINT8, _INT8):
                    tensors[name] = tensor
        return cls(nodes, tensors)

    def products(self) -> Iterator[Int8Products]:
        sums: dict[tuple[str, bool], int | None] = {}  # many nodes may share weights
        for node in self.nodes:
            index = _WEIGHTS.get((_domain(node), node.op_type))
            name = node.inputs[index] if index is not None and index < len(node.inputs) else ""
            key = (name, node.transposed)
            if key not in sums:
                sums[key] = _pair_sum(self.tensors.get(name), transposed=node.transposed)
            yield Int8Products(sums[key])


def _multiplies_bytes(node: _Node) -> bool:
    return (_domain(node), node.op_type) in _WEIGHTS or node.op_type in _UNKNOWN


def _domain(node: _Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _pair_sum(weights: _Tensor | None, *, transposed: bool) -> int | None:
    """Of constant weights; None: they are computed, or stored in another way than exporters do."""
    if weights is None:
        return None
    if weights.data_type == _UINT8:  # multiplied in a wider way
        return 0
    if len(weights.dims) != 2 or min(weights.dims) < 1 or weights.raw is None:
        return None
    if math.prod(weights.dims) != len(weights.raw):
        return None
    matrix = np.frombuffer(weights.raw, np.int8).reshape(weights.dims)
    return largest_pair_sum(matrix.T if transposed else matrix)


def _inner(message: memoryview, number: int) -> Iterator[memoryview]:
    """The messages in the fields of this number."""
    for found, _, value in fields(message):
        if found == number and not isinstance(value, int):
            yield value


def _node(message: memoryview) -> _Node:
    node = _Node()
    for number, _, value in fields(message):
        if isinstance(value, int):
            continue
        if number == 1:
            node.inputs.append(bytes(value).decode())
        elif number == 4:
            node.op_type = bytes(value).decode()
        elif number == 5:
            node.transposed = node.transposed or _is_trans_b(value)
        elif number == 7:
            node.domain = bytes(value).decode()
    return node


def _is_trans_b(attribute: memoryview) -> bool:
    """Whether this is QGemm's transB, not 0."""
    name, number = b"", 0
    for found, _, value in fields(attribute):
        if found == 1 and not isinstance(value, int):
            name = bytes(value)
        elif found == 3 and isinstance(value, int):
            number = value
    return name == b"transB" and number != 0


def _tensor(message: memoryview) -> tuple[str, _Tensor]:
    name, tensor = "", _Tensor()
    for number, _, value in fields(message):
        if number == 1:
            tensor.dims += [signed(value)] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            tensor.data_type = value
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode()
        elif number == 9 and not isinstance(value, int):
            tensor.raw = value
    return name, tensor
