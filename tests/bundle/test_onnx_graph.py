"""Graphs from strangers: what is not plainly a graph of ours never reaches ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fastfsl.bundle import onnx_message
from fastfsl.bundle.onnx_graph import OPERATORS, check_graph_file
from fastfsl.bundle.protobuf import fields, varints
from fastfsl.errors import BundleError

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "v1").rglob("*.onnx"))
SMALLEST = min((path.read_bytes() for path in GOLDEN), key=len)


def _value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _graph(nodes, *tensors, **options: Any) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [_value("x", 2)], [_value("y", 2)], list(tensors), **options)


def _model(nodes, *tensors, **options: Any) -> onnx.ModelProto:
    return helper.make_model(_graph(nodes, *tensors), opset_imports=[helper.make_opsetid("", 18)], **options)


def _external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def _weights(*numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), "w")


RELU = helper.make_node("Relu", ["x"], ["y"])
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [0]), [2]
)


def _refused(model: onnx.ModelProto | bytes, message: str) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(BundleError, match=message) as caught:
        check_graph_file(data, "flow/model.onnx")
    assert "flow/model.onnx" in str(caught.value)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: "/".join(path.parts[-3:]))
def test_our_graphs_pass(path):
    check_graph_file(path.read_bytes(), "model")


def test_weights_outside_are_refused_wherever_they_are_named():
    inside = _graph([helper.make_node("Constant", [], ["y"], value=_external(_weights(1)))])
    for model in (
        _model([RELU], _external(_weights(1, 2))),
        _model([helper.make_node("Constant", [], ["y"], value=_external(_weights(1)))]),
        _model([helper.make_node("Relu", ["x"], ["y"], many=[_external(_weights(1)), _weights(1)])]),
    ):
        _refused(model, "another file")
    only_place = _weights(1, 2)
    only_place.data_location = TensorProto.EXTERNAL
    _refused(_model([RELU], only_place), "another file")
    only_name = _weights(1, 2)
    only_name.external_data.add(key="location", value="x")
    _refused(_model([RELU], only_name), "another file")
    # What could hide them deeper is refused as such.
    _refused(_model([helper.make_node("If", ["x"], ["y"], then_branch=inside, else_branch=inside)]), "inside a graph")
    function = helper.make_function("ours", "f", ["x"], ["y"], [RELU], [helper.make_opsetid("", 18)])
    _refused(_model([RELU], functions=[function]), "functions")
    model = _model([RELU])
    model.graph.sparse_initializer.append(SPARSE)
    _refused(model, "sparse")
    _refused(_model([helper.make_node("Constant", [], ["y"], sparse_value=SPARSE)]), "sparse")
    model = _model([RELU])
    model.training_info.add().algorithm.CopyFrom(inside)
    _refused(model, "training")


@pytest.mark.parametrize(
    ("domain", "op_type"),
    [
        ("", "Loop"),
        ("", "RandomNormal"),
        ("", "StringConcat"),
        ("", "SequenceEmpty"),
        ("", "ImageDecoder"),
        ("", "relu"),
        ("", ""),
        ("com.microsoft", "EPContext"),  # names a file to load
        ("com.microsoft", "Relu"),
        ("ai.onnx.contrib", "PyOp"),
        ("ai.onnx.ml", "TreeEnsemble"),
        ("ours", "Relu"),
    ],
)
def test_other_operators_are_refused(domain, op_type):
    _refused(_model([helper.make_node(op_type, ["x"], ["y"], domain=domain)]), "none that it may hold")


def test_operators_are_written_as_onnx_writes_them():
    known = {schema.name for schema in onnx.defs.get_all_schemas()} | {"SimplifiedLayerNormalization"}
    assert OPERATORS[""] <= known
    assert not {"If", "Loop", "Scan", "SequenceMap"} & OPERATORS[""]


@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile", "Range", "Pad"])
@pytest.mark.parametrize("numbers", [(2**40,), (2**14, 2**13), (-(2**30),)])
@pytest.mark.parametrize("as_node", [False, True])
def test_constant_sizes_are_bounded(op_type, numbers, as_node):
    inputs = ["w"] if op_type == "ConstantOfShape" else ["x", "w"]
    node = helper.make_node(op_type, inputs, ["y"])
    if as_node:
        _refused(_model([helper.make_node("Constant", [], ["w"], value=_weights(*numbers)), node]), "makes more than")
        _refused(_model([helper.make_node("Constant", [], ["w"], value_ints=numbers), node]), "makes more than")
        small = _model([helper.make_node("Constant", [], ["w"], value_ints=(3, 4)), node])
    else:
        _refused(_model([node], _weights(*numbers)), "makes more than")
        packed = helper.make_tensor("w", TensorProto.INT64, [len(numbers)], numbers)
        _refused(_model([node], packed), "makes more than")
        small = _model([node], _weights(3, 4))
    check_graph_file(small.SerializeToString(), "model")


def test_constant_sizes_are_bounded_in_sum():
    """ONNX Runtime computes them all when it loads the graph."""
    nodes = [helper.make_node("ConstantOfShape", ["w"], [f"y{index}"]) for index in range(5)]
    check_graph_file(_model(nodes[:4], _weights(2**11, 2**11)).SerializeToString(), "model")
    _refused(_model(nodes, _weights(2**11, 2**11)), "makes more than")


@pytest.mark.parametrize("op_type", ["Cast", "Concat", "Identity", "Reshape", "Squeeze", "Unsqueeze"])
def test_constant_sizes_are_followed_through_what_hands_them_on(op_type):
    inputs = ["w", "w"] if op_type == "Concat" else ["w", "axes"][: 1 + (op_type in ("Reshape", "Squeeze"))]
    options: dict[str, Any] = {"to": TensorProto.INT64} if op_type == "Cast" else {}
    nodes = [
        helper.make_node(op_type, inputs, ["v"], **options),
        helper.make_node("Identity", ["v"], ["u"]),
        helper.make_node("Expand", ["x", "u"], ["y"]),
    ]
    large = 2**14 if op_type == "Concat" else 2**28
    _refused(_model(nodes, _weights(large)), "Expand makes more than")
    _refused(_model([nodes[2], *nodes[1::-1]], _weights(large)), "Expand makes more than")  # in any order
    check_graph_file(_model(nodes, _weights(2**12)).SerializeToString(), "model")


def test_constants_that_double_again_and_again_are_counted():
    nodes = [helper.make_node("Concat", [name] * 2, [name + "w"]) for name in ("w" * size for size in range(1, 200))]
    check_graph_file(_model(nodes[:20], _weights(2)).SerializeToString(), "model")
    _refused(_model(nodes, _weights(2)), "bytes are made of its constants")


def test_attributes_and_tensors_are_bounded():
    _refused(_model([helper.make_node("MaxPool", ["x"], ["y"], pads=[0, 2**40])]), "an attribute is")
    _refused(_model([helper.make_node("Concat", ["x"], ["y"], axis=-(2**40))]), "an attribute is")
    slice_end = helper.make_node("Constant", [], ["y"], value_int=2**63 - 1)
    check_graph_file(_model([slice_end]).SerializeToString(), "model")
    for dims in ([2**40], [-2], [3]):
        tensor = helper.make_tensor("w", TensorProto.INT8, [1], [1])
        del tensor.dims[:]
        tensor.dims.extend(dims)
        _refused(_model([RELU], tensor), "larger than its data")
    _refused(
        _model([RELU], TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"])), "of type 8"
    )


def _typed(kind, name) -> onnx.ModelProto:
    """A graph one of whose inputs, outputs, weights, constants or casts is of a type."""
    values = [helper.make_tensor_value_info(name, kind if key == name else 1, [2]) for key in ("input", "output")]
    tensor = TensorProto(name="w", data_type=kind, dims=[1], raw_data=b"\0" * 8)
    nodes = {
        "constant": helper.make_node("Constant", [], ["c"], value=tensor),
        "cast": helper.make_node("Cast", ["input"], ["c"], to=kind),
        "quantised": helper.make_node("QuantizeLinear", ["input", "w"], ["c"], output_dtype=kind),
        "softmax": helper.make_node("Softmax", ["input"], ["c"], softmax_precision=kind),
    }
    graph = helper.make_graph([nodes.get(name, RELU)], "g", values[:1], values[1:], [tensor] * (name == "weight"))
    return helper.make_model(graph)


@pytest.mark.parametrize("name", ["input", "output", "weight", "constant", "cast", "quantised", "softmax"])
def test_float16_is_for_the_bundles_that_say_so(name):
    """onnxruntime's CPU provider may end the process where it meets it; the types behind it no graph of ours has."""
    data = _typed(TensorProto.FLOAT16, name).SerializeToString()
    _refused(data, "computes in float16, which only a bundle of precision fp16 may, on CUDA")
    check_graph_file(data, "model", half=True)
    check_graph_file(_typed(TensorProto.INT8, name).SerializeToString(), "model")
    for kind in (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.COMPLEX64):
        _refused(_typed(kind, name), f"a tensor of type {kind}")


@pytest.mark.parametrize("said", [0, 1, 3, 2**20])
def test_a_split_has_as_many_outputs_as_it_says(said):
    """ONNX Runtime 1.31 ends the process otherwise: found by a mutant."""
    _refused(_model([helper.make_node("Split", ["x"], ["y", "z"], axis=0, num_outputs=said)]), "names 2 outputs")
    check_graph_file(
        _model([helper.make_node("Split", ["x"], ["y", "z"], axis=0, num_outputs=2)]).SerializeToString(), "model"
    )


def test_names_are_words():
    """ONNX Runtime loads other names, and fails when it is asked for them."""
    for change in (lambda m: m.replace(b"batch", b"\xe0atch"), lambda m: m.replace(b"features", b"\xe0eatures")):
        data = next(path for path in GOLDEN if path.parts[-3:-1] == ("images", "flow")).read_bytes()
        assert change(data) != data
        _refused(change(data), "utf-8")


def test_a_message_that_readers_could_take_in_two_ways_is_refused():
    graph = _graph([RELU]).SerializeToString()
    one = b"\x3a" + bytes([len(graph)]) + graph
    check_graph_file(one, "model")
    for data, message in {
        b"": "0 graphs",
        b"\x08\x08": "0 graphs",
        one + one: "2 graphs",  # readers merge them
        one[:-1]: "cut off",
        one + b"\x3b": "kind 3",  # groups
        one + b"\x38\x01": "field 7 is of kind 0",
        one + b"\x02\x00": "no valid number",
        one + b"\xba\x80\x80\x80\x80\x80\x01\x00": "no valid number",
        one + b"\x08" + b"\xff" * 10 + b"\x01": "too long",
        one + b"\x08\xff": "cut off",
        one + b"\x0d\x00": "cut off",
        b"\x3a\xff\xff\xff\xff\x0f" + graph: "cut off",
    }.items():
        _refused(data, message)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_to_their_end_or_refused(data):
    try:
        found = list(fields(memoryview(data)))
    except ValueError:
        return
    assert sum(len(value) for _, kind, value in found if kind == 2 and isinstance(value, memoryview)) <= len(data)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_packed_numbers_are_read_as_protobuf_writes_them(numbers):
    tensor = TensorProto(int64_data=numbers)
    packed = [value for number, _, value in fields(memoryview(tensor.SerializeToString())) if number == 7]
    assert [one for part in packed for one in varints(part)] == numbers  # type: ignore[arg-type]  # packed is a view


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SMALLEST) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_graphs_are_accepted_or_refused(edits):
    data = bytearray(SMALLEST)
    for position, value in edits:
        data[position] = value
    try:
        check_graph_file(bytes(data), "model")
    except BundleError:
        return


def test_graphs_of_very_many_parts_are_refused():
    """ONNX Runtime takes seconds for them, and walks them more than once."""
    node = helper.make_node("Identity", ["x"], ["y"]).SerializeToString()
    many = b"".join(b"\x0a" + bytes([len(node)]) + node for _ in range(onnx_message.MAX_NODES + 1))
    _refused(b"\x3a" + _varint(len(many)) + many, f"more than {onnx_message.MAX_NODES} nodes")
    tensors = (numpy_helper.from_array(np.zeros(1, np.float32), f"c{index}") for index in range(24_001))
    model = _model([RELU])
    model.graph.initializer.extend(tensors)
    _refused(model, f"more than {onnx_message.MAX_CONSTANTS} constants")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


@pytest.mark.parametrize("where", ["model", "graph", "node", "input", "constant", "metadata", "unknown", "attribute"])
def test_bytes_that_are_no_weights_are_few(where):
    """A doc_string of 200 MB took 1.1 GB."""
    model = _model([helper.make_node("Relu", ["x"], ["y"], remark="")], _weights(1))
    text = "x" * onnx_message.MAX_OTHER_BYTES
    if where == "metadata":
        model.metadata_props.add(key="a", value=text)
    elif where == "attribute":
        model.graph.node[0].attribute[0].s = text.encode()
    elif where != "unknown":
        places = {
            "model": model,
            "graph": model.graph,
            "node": model.graph.node[0],
            "input": model.graph.input[0],
            "constant": model.graph.initializer[0],
        }
        places[where].doc_string = text
    data = model.SerializeToString() + (b"\xf8\x07\x01" * (len(text) // 2) if where == "unknown" else b"")
    _refused(data, "bytes that are no weights|bytes besides its data")
    check_graph_file(_model([RELU]).SerializeToString(), "model")


def test_heads_of_constants_are_few_bytes_in_sum():
    model = _model([RELU])
    for index in range(2000):
        tensor = numpy_helper.from_array(np.zeros(1, np.float32), f"c{index}")
        tensor.doc_string = "x" * 3000
        model.graph.initializer.append(tensor)
    _refused(model, "bytes that are no weights")


def test_a_constant_holds_no_more_data_than_numbers():
    _refused(_model([RELU], TensorProto(name="w", data_type=1, dims=[2], raw_data=b"\0" * 99)), "more data than")
    _refused(_model([RELU], TensorProto(name="w", data_type=1, dims=[1] * 65, raw_data=b"\0" * 4)), "65 dimensions")
    _refused(_model([RELU], TensorProto(name="w" * 5000, data_type=1, dims=[1], raw_data=b"\0" * 4)), "head|besides")
    _refused(_model([helper.make_node("Relu", ["x" * 5000], ["y"])]), "a name of 5000 bytes")
    _refused(_model([helper.make_node("Concat", ["x"] * 5000, ["y"], axis=0)]), "more than 4096 inputs")


def test_one_name_stands_for_one_thing():
    """ONNX Runtime would take one of two, and this look at it the other."""
    one = _weights(1)
    _refused(_model([RELU], one, one), "stands for two things")
    _refused(_model([RELU, RELU]), "stands for two things")
    _refused(_model([helper.make_node("Relu", ["x"], ["w"])], one), "stands for two things")
    _refused(_model([helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]), "cycle")
    twice = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    twice.attribute.append(helper.make_attribute("to", TensorProto.INT64))
    _refused(_model([twice]), "the attribute to twice")
    double = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    double.attribute[0].ints.append(TensorProto.INT64)
    _refused(_model([double]), "two values")
    constant = helper.make_node("Constant", [], ["y"], value_int=1, value_ints=[0])
    _refused(_model([constant]), "2 values instead of one")


WHOLE = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8)


@pytest.mark.parametrize("operator", ["Div", "Mod"])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_are_divided_by_constants_above_0(operator, kind):
    def model(*before, divisor="b", **options):
        dividend = helper.make_node("Cast", ["x"], ["a"], to=kind)
        nodes = [dividend, *before, helper.make_node(operator, ["a", divisor], ["c"], **options)]
        return _model([*nodes, helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)])

    def with_divisor(*numbers, **options):
        found = model(**options)
        found.graph.initializer.append(helper.make_tensor("b", kind, [len(numbers)], numbers))
        return found

    check_graph_file(with_divisor(1, 7).SerializeToString(), "model")
    for numbers in ((0,), (1, 0), *(((-1,), (2, -1)) if kind != TensorProto.UINT8 else ())):
        _refused(with_divisor(*numbers), "may divide whole numbers")
        _refused(with_divisor(*numbers, **({"fmod": 1} if operator == "Mod" else {})), "may divide whole numbers")
    # What a caller could give in its place, what is computed, and what is not known to be of floating point.
    given = with_divisor(1)
    given.graph.input.append(helper.make_tensor_value_info("b", kind, [1]))
    _refused(given, "may divide whole numbers")
    _refused(model(helper.make_node("Sub", ["a", "a"], ["b"])), "may divide whole numbers")
    _refused(model(helper.make_node("QuantizeLinear", ["x", "x"], ["b"])), "may divide whole numbers")
    lying = model(helper.make_node("Sub", ["a", "a"], ["b"]))
    lying.graph.value_info.extend([_value("a", 2), _value("b", 2)])
    _refused(lying, "may divide whole numbers")
    long = with_divisor(*[1] * 65)  # not looked through
    _refused(long, "may divide whole numbers")


@pytest.mark.parametrize("operator", ["Shape", "Size", "ArgMax", "NonZero"])
def test_sizes_and_places_are_whole_numbers(operator):
    nodes = [helper.make_node(operator, ["x"], ["a"]), helper.make_node("Div", ["a", "a"], ["y"])]
    _refused(_model(nodes), "may divide whole numbers")


@pytest.mark.parametrize(
    "before",
    [
        [helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT)],
        [helper.make_node("Sqrt", ["x"], ["b"])],
        [helper.make_node("Identity", ["x"], ["h"]), helper.make_node("ReduceMean", ["h"], ["b"])],
        [helper.make_node("Where", ["m", "x", "x"], ["b"])],
        [helper.make_node("Constant", [], ["b"], value_float=0.0)],
        [helper.make_node("Gelu", ["x"], ["b"], domain="com.microsoft")],
    ],
)
def test_floating_point_is_divided_freely(before):
    check_graph_file(_model([*before, helper.make_node("Div", ["x", "b"], ["y"])]).SerializeToString(), "model")
    check_graph_file(_model([*before, helper.make_node("Div", ["b", "b"], ["y"])]).SerializeToString(), "model")


@pytest.mark.parametrize(
    ("operator", "attribute"),
    [("Conv", "group"), ("Conv", "strides"), ("MaxPool", "kernel_shape"), ("GroupNormalization", "num_groups")],
)
def test_numbers_that_operators_divide_by_are_above_0(operator, attribute):
    value: Any = [0, 1] if attribute in ("strides", "kernel_shape") else 0
    _refused(_model([helper.make_node(operator, ["x"], ["y"], **{attribute: value})]), f"{attribute} 0, below 1")


def test_what_a_graph_says_of_itself():
    weights = numpy_helper.from_array(np.ones((100, 100), np.int8), "w")
    scale = numpy_helper.from_array(np.array(30, np.float32), "logit_scale")
    facts = check_graph_file(
        _model([helper.make_node("MatMulInteger", ["w", "w"], ["y"])], weights, scale).SerializeToString(), "model"
    )
    assert (facts.integer_products, facts.half, facts.num_nodes) == (True, False, 1)
    levels = helper.make_node("DequantizeLinear", ["w", "logit_scale"], ["y"])
    assert check_graph_file(_model([levels], weights, scale).SerializeToString(), "model").integer_products
    assert facts.constant_names == {"w", "logit_scale"}
    assert facts.scalars == {"logit_scale": 30.0}
    assert not facts.folding_known  # a product of constants
    assert check_graph_file(_model([RELU]).SerializeToString(), "model").folding_known
    flow = check_graph_file((GOLDEN[0].parents[2] / "images" / "flow" / "model.onnx").read_bytes(), "flow")
    assert (flow.row_values, flow.images, flow.integer_products) == (24, False, False)
    tower = check_graph_file((GOLDEN[0].parents[2] / "images" / "visual" / "model.onnx").read_bytes(), "tower")
    assert (tower.row_values, tower.images) == (32 * 32 * 3, True)


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.uint64, np.float32, np.float64, np.int16])
def test_sizes_of_any_type_are_followed_through_cast(kind):
    size = numpy_helper.from_array(np.array([2**14] * 2, kind), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["s"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["s"], ["y"]),
    ]
    _refused(_model(nodes, size), "ConstantOfShape makes more than")


@pytest.mark.parametrize("rank", [9, 20, 64])
def test_shapes_of_many_dimensions_are_followed(rank):
    _refused(_model([helper.make_node("Expand", ["x", "w"], ["y"])], _weights(*[8] * rank)), "Expand makes more than")
    check_graph_file(
        _model([helper.make_node("Expand", ["x", "w"], ["y"])], _weights(*[1] * rank)).SerializeToString(), "model"
    )
    _refused(_model([helper.make_node("Expand", ["x", "w"], ["y"])], _weights(*[1] * 200)), "sizes for 200 dimensions")


def test_what_constants_grow_to_together_is_counted():
    column, row = (numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in
                   (("c", (2**13, 1)), ("r", (1, 2**13))))  # fmt: skip
    for operator in ("Add", "Mul", "Max", "Pow", "Sub"):
        _refused(_model([helper.make_node(operator, ["c", "r"], ["y"])], column, row), "makes more than")
    few = numpy_helper.from_array(np.ones((2**13, 1), np.float32), "r")
    check_graph_file(_model([helper.make_node("Add", ["c", "r"], ["y"])], column, few).SerializeToString(), "model")
