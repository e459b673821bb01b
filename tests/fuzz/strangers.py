"""What a stranger could write into a graph or a manifest on purpose: operators put in, floods, and lies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

WHOLE = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
_SIZES = (1, 2, 3, 16, 2**8, 2**12, 2**13, 2**14, 2**15, 2**20, 2**28, 2**40)
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)

Added = tuple[list[NodeProto], list[TensorProto]]
node = helper.make_node


def _range(kind: np.dtype[Any]) -> tuple[int, int]:
    """The smallest and the largest whole number of a type."""
    bits, is_signed = 8 * kind.itemsize, kind.kind == "i"
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)


class _Names:
    """Names that no graph of ours has."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._count = 0

    def new(self) -> str:
        self._count += 1
        return f"stranger_{self._rng.randrange(10**6)}_{self._count}"


def with_added(data: bytes, rng: random.Random) -> bytes:
    """The graph, and before its first nodes some that a stranger wrote; what they make goes into an output, times 0."""
    model = onnx.ModelProto()
    model.ParseFromString(data)
    names = _Names(rng)
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice((_division, _division, _sizes, _sizes, _broadcast, _broadcast, _repeated, _flood, _words))
        nodes, tensors = kind(model.graph, names, rng)
        _join(model.graph, nodes, tensors, names, rng)
    changed: bytes = model.SerializeToString()
    return changed


def _join(
    graph: Any, nodes: Sequence[NodeProto], tensors: Sequence[TensorProto], names: _Names, rng: random.Random
) -> None:
    graph.initializer.extend(tensors)
    every = [*nodes, *graph.node]
    if nodes and graph.output and rng.random() < 0.9:
        output, cast, greatest, nothing, scaled, plain = graph.output[0].name, *(names.new() for _ in range(5))
        for one in every:
            one.output[:] = [plain if name == output else name for name in one.output]
            one.input[:] = [plain if name == output else name for name in one.input]
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), nothing))
        every += [
            node("Cast", [nodes[-1].output[0]], [cast], to=TensorProto.FLOAT),
            node("ReduceMax", [cast], [greatest], keepdims=0),
            node("Mul", [greatest, nothing], [scaled]),
            node("Add", [plain, scaled], [output]),
        ]
    if rng.random() < 0.1:
        rng.shuffle(every)
    del graph.node[:]
    graph.node.extend(every)


def _late(graph: Any, names: _Names, onnx_type: int) -> tuple[list[NodeProto], str]:
    """A number that is 0, of a type, and known only when the graph runs."""
    whole, number, nothing = names.new(), names.new(), names.new()
    nodes = [
        node("Shape", [graph.input[0].name], [whole]),
        node("ReduceMax", [whole], [number], keepdims=0),
        node("Sub", [number, number], [f"{nothing}_0"]),
        node("Cast", [f"{nothing}_0"], [nothing], to=onnx_type),
    ]
    return nodes, nothing


def _division(graph: Any, names: _Names, rng: random.Random) -> Added:
    """`Div` or `Mod` of whole numbers, by what may be 0 or -1, as constants or computed."""
    kind = np.dtype(rng.choice(WHOLE))
    onnx_type, least = helper.np_dtype_to_tensor_dtype(kind), _range(kind)[0]
    divisor = rng.choice((0, 1, 3, *((-1, -1) if least else ())))
    left, right, made = (names.new() for _ in range(3))
    count = rng.choice((1, 1, 7, 64, 100))
    tensors = [
        numpy_helper.from_array(np.full(count, number, kind), name)
        for number, name in ((rng.choice((least, 0, 5)), left), (divisor, right))
    ]
    nodes: list[NodeProto] = []
    if rng.random() < 0.5:
        late, nothing = _late(graph, names, onnx_type)
        nodes += [
            *late,
            node("Add", [left, nothing], [f"{left}_late"]),
            node("Add", [right, nothing], [f"{right}_late"]),
        ]
        left, right = (f"{name}_late" if rng.random() < 0.7 else name for name in (left, right))
    operator = rng.choice(("Div", "Div", "Mod"))
    options: dict[str, Any] = {"fmod": 1} if operator == "Mod" and rng.random() < 0.3 else {}
    nodes.append(node(operator, [left, right], [made], **options))
    if rng.random() < 0.1:  # a word of another type, which is a lie
        graph.value_info.append(helper.make_tensor_value_info(left, TensorProto.FLOAT, [count]))
    return nodes, tensors


def _sizes(_graph: Any, names: _Names, rng: random.Random) -> Added:
    """Something large of sizes that are constants of any type and rank, and come by a detour or not."""
    rank = rng.choice((1, 1, 2, 4, 8, 9, 12, 40))
    kind = np.dtype(rng.choice((np.int64, np.int64, np.int32, np.float32, np.float64, np.uint64, np.uint8)))
    numbers = [rng.choice(_SIZES) if rng.random() < 2 / rank else 1 for _ in range(rank)]
    numbers = [min(number, _range(kind)[1]) if kind.kind in "iu" else number for number in numbers]
    shape, one, made = (names.new() for _ in range(3))
    tensors = [
        numpy_helper.from_array(np.array(numbers).astype(kind), shape),
        numpy_helper.from_array(np.ones(1, np.float32), one),
    ]
    nodes: list[NodeProto] = []
    for operator in rng.choices(("Cast", "Mul", "Add", "Max", "Identity", "Concat"), k=rng.choice((0, 1, 2))):
        found = names.new()
        if operator == "Cast":
            nodes.append(node("Cast", [shape], [found], to=rng.choice((TensorProto.INT64, *_FLOATS))))
        elif operator == "Identity":
            nodes.append(node("Identity", [shape], [found]))
        elif operator == "Concat":
            nodes.append(node("Concat", [shape] * rng.choice((1, 2)), [found], axis=0))
        else:
            nodes.append(node(operator, [shape, shape], [found]))
        shape = found
    final = names.new()
    nodes.append(node("Cast", [shape], [final], to=TensorProto.INT64))
    operator = rng.choice(("Expand", "Expand", "ConstantOfShape", "Tile", "Pad"))
    nodes.append(node(operator, [final] if operator == "ConstantOfShape" else [one, final], [made]))
    return nodes, tensors


def _broadcast(_graph: Any, names: _Names, rng: random.Random) -> Added:
    """Much of two small constants."""
    side = rng.choice((2**4, 2**8, 2**12, 2**13, 2**15))
    column, row, made = (names.new() for _ in range(3))
    operator = rng.choice(("Add", "Mul", "Pow", "Max", "MatMul", "Einsum", "Gather", "Equal", "Where"))
    kind = rng.choice((np.float32, np.float32, np.int64, np.float64))
    columns: np.ndarray[Any, Any] = np.ones((side, 1), kind)
    rows: np.ndarray[Any, Any] = np.ones((1, side), kind)
    inputs, options = [column, row], {}
    if operator == "Einsum":
        options, columns, rows = {"equation": "i,j->ij"}, columns[:, 0], rows[0]
    elif operator == "Gather":
        columns, rows = np.ones((1, side), np.float32), np.zeros(min(side, 2**13), np.int64)
    elif operator == "Where":
        inputs = [f"{column}_yes", column, row]
    tensors = [numpy_helper.from_array(array, name) for array, name in ((columns, column), (rows, row))]
    if operator == "Where":
        tensors.append(numpy_helper.from_array(np.ones((1, 1), np.bool_), inputs[0]))
    return [node(operator, inputs, [made], **options)], tensors


def _repeated(_graph: Any, names: _Names, rng: random.Random) -> Added:
    """A chain that doubles, or many results of one constant."""
    start = names.new()
    tensors = [numpy_helper.from_array(np.ones(rng.choice((1, 2**10, 2**16)), np.float32), start)]
    nodes, last, count = [], start, rng.choice((2, 10, 30, 200))
    operator = rng.choice(("Concat", "Neg", "Tanh"))
    for _ in range(count):
        made = names.new()
        options: dict[str, Any] = {"axis": 0} if operator == "Concat" else {}
        nodes.append(node(operator, [last] * (2 if operator == "Concat" else 1), [made], **options))
        last = made
    return nodes, tensors


def _flood(graph: Any, names: _Names, rng: random.Random) -> Added:
    """Very many nodes, constants or inputs."""
    count = rng.choice((100, 3000, 11_000, 30_000))
    if rng.random() < 0.3:
        return [], [TensorProto(name=names.new(), data_type=1, dims=[1], raw_data=b"\0" * 4) for _ in range(count)]
    last, nodes = graph.input[0].name, []
    for _ in range(count):
        made = names.new()
        nodes.append(NodeProto(op_type="Identity", input=[last], output=[made]))
        last = made
    return nodes, []


def _words(graph: Any, _names: _Names, rng: random.Random) -> Added:
    """Bytes that are no weights."""
    text = "x" * rng.choice((10, 5000, 2**20, 2**23, 2**25))
    kind = rng.randrange(6)
    if kind == 0:
        graph.doc_string = text
    elif kind == 1:
        rng.choice(graph.node).doc_string = text
    elif kind == 2:
        rng.choice(graph.initializer).doc_string = text
    elif kind == 3:
        rng.choice(graph.node).metadata_props.add(key="x", value=text)
    elif kind == 4:
        rng.choice(graph.node).attribute.append(helper.make_attribute("stranger", text))
    else:
        for index in range(rng.choice((10, 10_000, 200_000))):
            graph.value_info.add(name=f"v{index}")
    return [], []


def lies(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A manifest that says of its graphs what they do not show, or very much of nothing."""
    steps, names = values["num_steps"], values["class_names"]
    told: tuple[dict[str, Any], ...] = (
        {"num_steps": rng.choice((0, 1, 2, steps + 1, 1000)), "read_steps": []},
        {"num_steps": 1000, "read_steps": list(range(1001))},
        {"read_steps": sorted({*values["read_steps"], rng.randrange(steps + 1), steps}) if steps else []},
        {"precision": rng.choice(("int8", "fp16"))},
        {"class_names": [*names[:-1], names[0]]},
        {"class_names": [*names, names[-1]]},
        {"logit_scale": values["logit_scale"] * rng.choice((0.5, 1.001, 100))},
        {"step_size": rng.choice((0.2, 1e9, None))},
        {"embed_dim": values["embed_dim"] + rng.choice((-1, 1))},
        {"training": {"many": [rng.choice(([], {}, 0, ""))] * rng.choice((10**5, 10**6, 3 * 10**6))}},
        {"metrics": {str(index): index for index in range(rng.choice((10**4, 3 * 10**5)))}},
    )
    return {**values, **rng.choice(told)}
