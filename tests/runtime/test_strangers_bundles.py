"""Bundles from strangers: none ends the process, takes the machine's memory, or says what its graphs do not show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fastfsl import bundle
from fastfsl.bundle.manifest import MAX_MANIFEST_BYTES
from fastfsl.bundle.onnx_graph import check_graph_file
from fastfsl.errors import BundleError, DataError
from fastfsl.runtime import Classifier
from tests.runtime.forged_bundles import GOLDEN, WIDTH, flow, forged, node

# What one bundle may take beside the imports: of 64 MiB of constants ONNX Runtime holds two copies for a moment.
MAX_MEGABYTES = 300
MICROSOFT = "com.microsoft"
ONE = np.ones(1, np.float32)

# Loads bundles and computes with each; says of each what came of it, and the most memory until then.
_VISITOR = """
import json, sys, numpy
from fastfsl.runtime import Classifier
from fastfsl.errors import FastFSLError

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024

Classifier.load(sys.argv[1], device="cpu", num_threads=1)
before = peak()
for path in sys.argv[2:]:
    try:
        with Classifier.load(path, device="cpu", num_threads=1) as classifier:
            classifier.feature_probabilities(numpy.ones((2, 24), numpy.float32))
        said = "computed"
    except FastFSLError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([path, said, peak() - before]), flush=True)
"""


def _visit(*paths: Path) -> Mapping[str, tuple[str, int]]:
    """What came of each bundle in a process of its own, and the megabytes that it held at most by then."""
    ended = subprocess.run(
        [sys.executable, "-c", _VISITOR, str(GOLDEN / "images"), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert (ended.returncode, len(answers)) == (0, len(paths)), f"ended with {ended.returncode}: {ended.stderr}"
    return {Path(path).name: (said, megabytes) for path, said, megabytes in answers}


def _with_flow(target: Path, data: bytes, **lies) -> Path:
    return forged(target, files={bundle.FLOW_GRAPH: data}, **lies)


def _dividing(operator: str, kind: type[np.signedinteger], divisor: int, *, computed: bool) -> bytes:
    """The smallest whole number of a type by another; computed: only when it runs."""
    least, onnx_type = np.iinfo(kind).min, helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    late = [node("Cast", ["zero"], ["late"], to=onnx_type)]
    if computed:
        late += [node("Add", ["a", "late"], ["dividend"]), node("Add", ["b", "late"], ["divisor"])]
        names = ["dividend", "divisor"]
    else:
        names = ["a", "b"]
    return flow([*late, node(operator, names, ["made"])], a=np.array([least], kind), b=np.array([divisor], kind))


def test_a_division_of_whole_numbers_that_ends_the_process_is_a_bundle_error(tmp_path):
    """SIGFPE: of a constant at load, of a computed number at the first call."""
    paths = [
        _with_flow(tmp_path / f"{operator} {kind.__name__} {divisor} {computed}", graph)
        for operator in ("Div", "Mod")
        for kind in (np.int32, np.int64)
        for divisor in (-1, 0)
        for computed in (False, True)
        for graph in [_dividing(operator, kind, divisor, computed=computed)]
    ]
    for name, (said, _) in _visit(*paths).items():
        assert re.match("BundleError: .*may divide whole numbers", said), f"{name}: {said}"


def _varint(number: int) -> bytes:
    high, low = divmod(number, 128)
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


def _beyond_its_type(kind: type[np.integer], number: int) -> bytes:
    """A division by a constant whose number has more bits than its type, of which a reader keeps the lowest."""
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    model = ModelProto.FromString(flow([node("Div", ["a", "b"], ["made"])], a=np.array([np.iinfo(kind).min], kind)))
    data = _varint(number)
    constant = b"\x08\x01\x10" + bytes([onnx_type]) + b"\x2a" + bytes([len(data)]) + data + b"\x42\x01b"
    graph = model.graph.SerializeToString() + b"\x2a" + bytes([len(constant)]) + constant
    model.ClearField("graph")
    return model.SerializeToString() + b"\x3a" + _varint(len(graph)) + graph


def test_a_divisor_that_becomes_another_number_is_a_bundle_error(tmp_path):
    """A number that its type cannot hold is -1 or 0 in the end, and looks like one above 0."""
    least = np.array([np.iinfo(np.int32).min], np.int32)
    cast = {
        (TensorProto.INT32,): np.array([2**32 - 1]),
        (TensorProto.INT8, TensorProto.INT32): np.array([255]),
        (TensorProto.INT64, TensorProto.INT32): np.array([2**64 - 1], np.uint64),
        (TensorProto.UINT16, TensorProto.INT32): np.array([2.0**16], np.float32),
        (TensorProto.INT32, TensorProto.INT64, TensorProto.INT32): np.array([np.inf], np.float32),
    }
    paths = []
    for number, (steps, divisor) in enumerate(cast.items()):
        names = ["divisor", *(f"b{index}" for index in range(len(steps)))]
        casts = [node("Cast", [names[index]], [names[index + 1]], to=step) for index, step in enumerate(steps)]
        graph = flow([*casts, node("Div", ["a", names[-1]], ["made"])], a=least, divisor=divisor)
        paths.append(_with_flow(tmp_path / f"may divide {number}", graph))
    for kind, number in ((np.int32, 2**33 - 1), (np.int32, 2**32), (np.uint8, 256)):
        name = f"a number beyond its type {kind.__name__} {number}"
        paths.append(_with_flow(tmp_path / name, _beyond_its_type(kind, number)))
    for name, (said, _) in _visit(*paths).items():
        message = "may divide" if "may divide" in name else "a number beyond its type"
        assert re.match(f"BundleError: .*{message}", said), f"{name}: {said}"


def test_operators_that_fail_over_an_empty_tensor_are_none_that_a_bundle_may_hold(tmp_path):
    """SIGFPE, SIGSEGV, and SIGABRT of Attention over a past that is a number (ONNX Runtime 1.32)."""
    wide, none = np.ones((2, 3, 4), np.float32), np.ones((2, 3, 0), np.float32)
    gains, positions, table = np.ones(4, np.float32), np.zeros(1, np.int64), np.ones((4, 1), np.float32)
    quantised = {"bytes": np.ones(4, np.uint8), "scale": ONE[:0], "zero_point": np.uint8(0), "one": np.float32(1)}
    nodes: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
        "QLinearConcat": (["scale", "zero_point", "bytes", "scale", "zero_point"], {"axis": 0}, quantised),
        "QLinearSoftmax": (["bytes", "scale", "zero_point", "one", "zero_point"], {"opset": 13}, quantised),
        "QLinearWhere": (
            ["where", *["bytes", "scale", "zero_point"] * 2, "one", "zero_point"],
            {},
            {**quantised, "where": np.ones(4, bool)},
        ),
        "QLinearConv": (
            ["image", "one", "zero_point", "none", "one", "zero_point", "one", "zero_point"],
            {},
            {**quantised, "image": np.ones((1, 1, 4, 4), np.uint8), "none": np.ones((0, 1, 1, 1), np.uint8)},
        ),
        "MultiHeadAttention": (["none"] * 3, {"num_heads": 1}, {"none": none}),
        "RotaryEmbedding": (
            ["none", "positions", "table", "table"],
            {"num_heads": 1},
            {"none": none, "positions": positions, "table": table},
        ),
        "SkipLayerNormalization": (
            ["wide", "none", "gains"], {}, {"wide": wide, "none": wide[:0], "gains": gains},
        ),
        "SkipSimplifiedLayerNormalization": (
            ["wide", "none", "gains"], {}, {"wide": wide, "none": wide[:0], "gains": gains},
        ),
    }  # fmt: skip
    paths = []
    for name, (inputs, options, constants) in nodes.items():
        made = [
            node(name, inputs, ["result"], domain=MICROSOFT, **options),
            node("ReduceSum", ["result"], ["made"], keepdims=0),
        ]
        paths.append(_with_flow(tmp_path / name, flow(made, **constants)))
    attention = node("Attention", ["heads", "heads", "heads", "", "one", "heads"], ["result", "key", "value"])
    ending = node("ReduceSum", ["result"], ["made"], keepdims=0)
    constants = {"heads": np.ones((1, 1, 4, 4), np.float32), "one": np.float32(1)}
    model = ModelProto.FromString(flow([attention, ending], **constants))
    model.opset_import[0].version = 23
    paths.append(_with_flow(tmp_path / "Attention", model.SerializeToString()))
    for name, (said, _) in _visit(*paths).items():
        assert re.match("BundleError: .*is none that it may hold", said), f"{name}: {said}"


def test_operators_that_divide_by_the_size_of_what_they_read_read_something(tmp_path):
    """QAttention without rows, SIGFPE; InstanceNormalization without pixels, SIGSEGV (ONNX Runtime 1.32)."""
    levels, gains = np.ones((4, 12), np.int8), np.ones(12, np.float32)
    both = {"levels": levels, "bias": gains, "one": np.float32(1), "gains": gains[:3], "index": np.array([0])}
    both |= {"shape": np.array([2, 3, 4]), "some": np.ones((2, 3, 4), np.float32), "nothing_of": np.array([2, 0, 4])}
    empties = {
        "cut off": [node("Slice", ["some", "index", "index", "index"], ["x"])],
        "repeated": [node("Expand", ["zero", "nothing_of"], ["x"])],
        "chosen": [node("Compress", ["some", "never"], ["x"], axis=1)],
        "computed": [node("Slice", ["some", "index", "index", "index"], ["y"]), node("Add", ["y", "zero"], ["x"])],
        "the sizes of a scalar": [
            node("Shape", ["zero"], ["y"]), node("Cast", ["y"], ["z"], to=1), node("Unsqueeze", ["z", "ends"], ["x"]),
        ],
        "a constant": [node("Add", ["none", "zero"], ["x"])],
    }  # fmt: skip
    readers = {
        "InstanceNormalization": [node("InstanceNormalization", ["x", "gains", "gains"], ["result"])],
        "QAttention": [
            node("Cast", ["x"], ["bytes"], to=TensorProto.UINT8),
            node("QAttention", ["bytes", "levels", "bias", "one", "one"], ["result"], num_heads=1, domain=MICROSOFT),
        ],
    }  # fmt: skip
    more = {"never": np.zeros(3, bool), "ends": np.array([0, 1]), "none": np.ones((0, 3, 4), np.float32)}
    ending = node("ReduceSum", ["result"], ["made"], keepdims=0)
    paths = [
        _with_flow(tmp_path / f"{operator} of what is {name}", flow([*makers, *reader, ending], **both, **more))
        for operator, reader in readers.items()
        for name, makers in empties.items()
    ]
    for name, (said, _) in _visit(*paths).items():
        assert re.match("BundleError: .*may read a tensor without elements", said), f"{name}: {said}"
    full = [node("Expand", ["zero", "shape"], ["y"]), node("Concat", ["y", "some"], ["x"], axis=0)]
    graphs = {operator: flow([*full, *reader, ending], **both) for operator, reader in readers.items()}
    check_graph_file(graphs["QAttention"], "an int8 graph")
    path = _with_flow(tmp_path / "of something", graphs["InstanceNormalization"])
    assert _visit(path)["of something"][0] == "computed"


def test_scales_and_kernels_have_elements(tmp_path):
    """SIGFPE and SIGSEGV; a convolution with a kernel of no pixels may also never end (ONNX Runtime 1.32)."""
    products = {"bytes": np.ones((2, 4), np.uint8), "levels": np.ones((4, 3), np.int8), "one": np.float32(1)}
    where = {"where": np.ones((2, 4), bool), "bytes": products["bytes"], "zero_point": np.uint8(0)}
    empty = [node("Compress", ["some", "never"], ["none"])]
    quantised = [
        node("DequantizeLinear", ["bytes", "none", "zero_point"], ["x"]),
        node("Where", ["where", "x", "x"], ["y"]),
        node("QuantizeLinear", ["y", "none", "zero_point"], ["result"]),
    ]
    nodes: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
        "Einsum": (
            [node("Einsum", ["wide", "wide"], ["result"], equation="ij,jk->ik")],
            {"wide": np.ones((0, 0), np.float32)},
        ),
        "Einsum of what is computed": (
            [node("Unsqueeze", ["none", "axis"], ["x"]), node("Einsum", ["x", "x"], ["result"], equation="ij,ij->i")],
            {"axis": np.array([0])},
        ),
        "MatMulIntegerToFloat": (
            [node("MatMulIntegerToFloat", ["bytes", "levels", "one", "none"], ["result"], domain=MICROSOFT)],
            products,
        ),
        "DynamicQuantizeMatMul": (
            [node("DynamicQuantizeMatMul", ["ones", "levels", "none"], ["result"], domain=MICROSOFT)],
            {**products, "ones": np.ones((2, 4), np.float32)},
        ),
        "Conv": (
            [node("Conv", ["image", "kernel"], ["result"])],
            {"image": np.ones((2, 4, 5, 0), np.float32), "kernel": np.ones((8, 4, 0, 0), np.float32)},
        ),
        "Conv with a kernel that is computed": (
            [
                node("Unsqueeze", ["none", "axes"], ["kernel"]),
                node("FusedConv", ["image", "kernel"], ["result"], domain=MICROSOFT, activation="Relu"),
            ],
            {"image": np.ones((1, 1, 5, 5), np.float32), "axes": np.array([0, 1, 2])},
        ),
        "DequantizeLinear": (quantised, where),
        "QuantizeLinear": (quantised[2:], {**where, "y": np.ones((2, 4), np.float32)}),
    }
    some = {"some": np.ones(4, np.float32), "never": np.zeros(4, bool)}
    ending = [node("Cast", ["result"], ["float"], to=1), node("ReduceSum", ["float"], ["made"], keepdims=0)]
    paths = [
        _with_flow(tmp_path / name, flow([*empty, *made, *ending], **some, **constants))
        for name, (made, constants) in nodes.items()
    ]
    for name, (said, _) in _visit(*paths).items():
        assert re.match(f"BundleError: .*{name.split()[0].replace('Conv', '(Fused)?Conv')} may read", said), said
    # What is convolved or multiplied may be empty: a tower may compute no tokens.
    late = [node("Expand", ["zero", "shape"], ["y"]), node("Slice", ["y", "start", "start", "start"], ["x"])]
    sizes = {"shape": np.array([2, 4]), "start": np.array([0]), "levels": np.ones((4, 3), np.int8)}
    product = [
        node("QuantizeLinear", ["x", "one", "zero_point"], ["bytes"]),
        node("MatMulIntegerToFloat", ["bytes", "levels", "one", "one"], ["result"], domain=MICROSOFT),
    ]
    graph = flow([*late, *product, *ending], **sizes, one=np.float32(1), zero_point=np.uint8(0))
    path = _with_flow(tmp_path / "of nothing", graph, precision="int8")
    assert _visit(path)["of nothing"][0] == "computed"


def test_a_sum_whose_sides_are_not_of_the_sizes_that_the_graph_says_is_no_end_of_the_process(tmp_path):
    """SIGFPE: ONNX Runtime 1.32 fuses it with the normalization that reads it."""
    nodes = [
        node("Expand", ["zero", "shape"], ["a"]),
        node("Compress", ["a", "never"], ["b"], axis=0),
        node("Add", ["a", "b"], ["sum"]),
        node("LayerNormalization", ["sum", "gains", "gains"], ["made"]),
    ]
    constants = {"shape": np.array([2, 4, 8]), "never": np.zeros(2, bool), "gains": np.ones(8, np.float32)}
    model = ModelProto.FromString(flow(nodes, **constants))
    model.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 4, 8]))
    path = _with_flow(tmp_path / "bundle", model.SerializeToString())
    assert re.match("BundleError: .*cannot compute", _visit(path)["bundle"][0])


def test_a_division_by_a_constant_above_0_computes(tmp_path):
    """Exporters divide sizes so; a divisor that a caller may give, or one of 0, is none."""
    nodes = [
        node("Shape", ["image_embeds"], ["shape"]),
        node("Div", ["shape", "two"], ["halves"]),
        node("Mod", ["halves", "two"], ["made"]),
    ]
    path = _with_flow(tmp_path / "bundle", flow(nodes, two=np.array([2], np.int64)))
    assert _visit(path)["bundle"][0] == "computed"


LARGE = 2**28
COLUMN, ROW = np.ones((2**15, 1), np.float32), np.ones((1, 2**15), np.float32)
# Of each: the nodes, their constants, and what refuses it: the look at the graph, or ONNX Runtime's arena.
MEMORY = {
    "a shape of nine numbers": (
        [node("Expand", ["one", "shape"], ["made"])],
        {"one": ONE, "shape": np.array([16] * 7 + [1, 4])},
        "makes more than",
    ),
    "a float constant through Cast": (
        [node("Cast", ["size"], ["shape"], to=TensorProto.INT64), node("ConstantOfShape", ["shape"], ["made"])],
        {"size": np.array([LARGE], np.float32)},
        "makes more than",
    ),
    "a uint64 constant through Cast": (
        [node("Cast", ["size"], ["shape"], to=TensorProto.INT64), node("ConstantOfShape", ["shape"], ["made"])],
        {"size": np.array([LARGE], np.uint64)},
        "makes more than",
    ),
    "two constants of 128 KiB, added": (
        [node("Add", ["column", "row"], ["made"])],
        {"column": COLUMN, "row": ROW},
        "makes more than",
    ),
    "a list of numbers for a repetition": (
        [node("Constant", [], ["shape"], value_floats=[float(LARGE)]), node("Cast", ["shape"], ["sizes"], to=7),
         node("Tile", ["one", "sizes"], ["made"])],
        {"one": ONE},
        "cannot compute|makes more than",
    ),
    "a product of constants": ([node("MatMul", ["column", "row"], ["made"])], {"column": COLUMN, "row": ROW}, "arena"),
    "an Einsum of constants": (
        [node("Einsum", ["a", "b"], ["made"], equation="i,j->ij")],
        {"a": COLUMN[:, 0], "b": ROW[0]},
        "arena",
    ),
    "rows gathered again and again": (
        [node("Gather", ["row", "indices"], ["made"])],
        {"row": ROW, "indices": np.zeros(2**13, np.int64)},
        "arena",
    ),
    "sizes multiplied": (
        [node("Mul", ["size", "size"], ["shape"]), node("Expand", ["one", "shape"], ["made"])],
        {"one": ONE, "size": np.array([2**14])},
        "arena",
    ),
    "a range of small steps": (
        [node("Mul", ["step", "step"], ["small"]), node("Range", ["start", "end", "small"], ["made"])],
        {"start": np.float32(0), "end": np.float32(256), "step": np.float32(2**-11)},
        "arena",
    ),
    "a margin multiplied": (
        [node("Mul", ["size", "size"], ["margins"]), node("Pad", ["one", "margins"], ["made"])],
        {"one": ONE, "size": np.array([0, 2**14])},
        "arena",
    ),
    "a margin of a convolution": (
        [node("Expand", ["zero", "shape"], ["image"]),
         node("Conv", ["image", "kernel"], ["made"], kernel_shape=[1, 1], pads=[2**13] * 4)],
        {"shape": np.array([1, 1, 1, 1]), "kernel": np.ones((1, 1, 1, 1), np.float32)},
        "arena",
    ),
    "a result that grows as it runs": (
        [node("Add", ["zero", "size"], ["float_size"]), node("Cast", ["float_size"], ["number"], to=TensorProto.INT64),
         node("Unsqueeze", ["number", "axis"], ["shape"]), node("ConstantOfShape", ["shape"], ["made"])],
        {"size": np.float32(LARGE), "axis": np.array([0])},
        "arena",
    ),
    "a list that doubles": (
        [node("Concat", [f"c{index}"] * 2, [f"c{index + 1}" if index < 27 else "made"], axis=0) for index in range(28)],
        {"c0": ONE},
        "bytes are made of its constants",
    ),
    "many results of constants": (
        [*(node("Neg", ["big"], [f"n{index}"]) for index in range(64)),
         node("Sum", [f"n{index}" for index in range(64)], ["made"])],
        {"big": np.ones(2**20, np.float32)},
        "bytes are made of its constants",
    ),
    "many results of unknown size": (
        [*(node("MatMul", ["column", "row"], [f"n{index}"]) for index in range(40)),
         *(node("ReduceMax", [f"n{index}"], [f"m{index}"], keepdims=0) for index in range(40)),
         node("Sum", [f"m{index}" for index in range(40)], ["made"])],
        {"column": COLUMN[: 2**12], "row": ROW[:, : 2**11]},
        "computed",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    paths = [_with_flow(folder / name, flow(nodes, **constants)) for name, (nodes, constants, _) in MEMORY.items()]
    return _visit(*paths)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded(visited, name):
    expected = MEMORY[name][2]
    said, megabytes = visited[name]
    if expected == "arena":
        assert re.match("BundleError: .*cannot compute.*Available memory.*FASTFSL_ARENA_BYTES", said), said
    else:
        assert re.search(expected, said), said
    assert megabytes < MAX_MEGABYTES


def test_a_manifest_of_millions_of_values_is_refused(tmp_path):
    path = forged(tmp_path / "bundle")
    file = path / bundle.MANIFEST_NAME
    data = file.read_bytes().rstrip().removesuffix(b"}")
    for value in (b"[]", b"{}", b"0", b'""'):
        count = (MAX_MANIFEST_BYTES - len(data) - 100) // (len(value) + 1)
        file.write_bytes(data + b', "training": [' + b",".join([value] * count) + b"]}")
        with pytest.raises(BundleError, match=r"manifest\.json: \d+ JSON values, more than"):
            Classifier.load(path, device="cpu")


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"num_steps": 0, "read_steps": []}, "has 3 steps, the manifest says 0"),
        ({"num_steps": 1000, "read_steps": []}, "has 3 steps, the manifest says 1000"),
        ({"num_steps": 2, "read_steps": [1, 2]}, "has 3 steps, the manifest says 2"),
        ({"read_steps": []}, r"reads the steps \[1\] before the last, the manifest says \[\]"),
        ({"read_steps": [1, 2, 3]}, r"reads the steps \[1\] before the last, the manifest says \[1, 2\]"),
        ({"precision": "int8"}, "says precision int8, and no graph multiplies whole numbers"),
        ({"logit_scale": 100.0}, r"logit_scale is 30\.0, the manifest's 100\.0"),
        ({"class_names": ["a", "b", "c", "d", "a"]}, "'class_names' must be a list of names, each of them once"),
        ({"embed_dim": 23}, "expected the input image_embeds of shape"),
    ],
)
def test_a_manifest_that_its_graphs_contradict_is_refused(tmp_path, lies, message):
    path = forged(tmp_path / "bundle", without=(bundle.FLOW_PLAN,), **lies)
    with pytest.raises(BundleError, match=message):
        Classifier.load(path, device="cpu", num_threads=1)


@pytest.mark.parametrize("lies", [{"num_steps": 2, "read_steps": [2]}, {"step_size": 0.2}, {"embed_dim": 25}])
def test_a_plan_that_the_manifest_contradicts_is_refused(tmp_path, lies):
    with pytest.raises(BundleError, match=r"plan\.safetensors: \(steps, width, step size\) are"):
        Classifier.load(forged(tmp_path / "bundle", **lies), device="cpu", num_threads=1)


def test_steps_that_no_graph_can_have_are_refused(tmp_path):
    """Of a graph whose names say nothing."""
    path = tmp_path / "bundle"
    forged(path, without=(bundle.FLOW_PLAN,), files={bundle.FLOW_GRAPH: flow()}, num_steps=1000, read_steps=[])
    with pytest.raises(BundleError, match="has at most 5 steps, the manifest says 1000"):
        Classifier.load(path, device="cpu", num_threads=1)


@pytest.mark.parametrize("operator", ["MatMulInteger", "DequantizeLinear"])
def test_fp32_over_a_graph_of_int8_is_refused(tmp_path, operator):
    """Of what is dequantised ONNX Runtime makes products of whole numbers, too."""
    nodes = [node(operator, ["bytes", "bytes" if operator == "MatMulInteger" else "one"], ["made"])]
    graph = flow(nodes, bytes=np.ones((2, 2), np.int8), one=np.float32(1))
    with pytest.raises(BundleError, match="multiplies whole numbers, and the manifest says precision fp32"):
        Classifier.load(_with_flow(tmp_path / "fp32", graph), device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def reading_texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "bundle"
    shutil.copytree(GOLDEN / "text", path)
    with Classifier.load(path, device="cpu", num_threads=1) as classifier:
        yield classifier


@pytest.mark.parametrize(
    ("name", "prompts", "message"),
    [
        ("blue \ud800 jay", None, r"class name .*lone surrogate, U\+D800"),
        ("blue jay", ["a \udfff"], r"prompt .*lone surrogate, U\+DFFF"),
        ("blue jay", "a \ud83d jay", "prompt .*lone surrogate"),
        ("blue\0jay", None, "class name .*control character"),
        ("blue\x1b[2Jjay", None, "class name .*control character"),
        ("blue\njay", None, "class name .*control character"),
        ("a" * 1025, None, "at most 1024 characters"),
        ("blue jay", ["a" * (2**16 + 1)], "at most 65536 characters"),
        ("blue jay", ["a jay"] * 4097, "at most 4096 prompts"),
    ],
)
def test_a_class_of_no_text_is_a_data_error(reading_texts, name, prompts, message):
    known = reading_texts.class_names
    with pytest.raises(DataError, match=message):
        reading_texts.add_class(name, prompts)
    assert reading_texts.class_names == known


def test_a_class_of_any_script_is_added(reading_texts):
    reading_texts.add_class("Blauhäher 🐦 日本", ["a jay,\n\tblue"])
    assert reading_texts.class_names[-1] == "Blauhäher 🐦 日本"
    assert reading_texts.feature_probabilities(np.ones((1, WIDTH), np.float32)).shape == (1, 6)


def test_a_text_tower_of_int8_is_a_bundle_error(tmp_path):
    """Its products could be cut off at 16 bits, and the manifest says nothing of it."""
    model = ModelProto.FromString((GOLDEN / "text" / bundle.TEXT_GRAPH).read_bytes())
    model.graph.initializer.append(numpy_helper.from_array(np.full((2, 2), 127, np.int8), "levels"))
    model.graph.node.append(node("MatMulInteger", ["levels", "levels"], ["products"]))
    path = forged(tmp_path / "bundle", "text", files={bundle.TEXT_GRAPH: model.SerializeToString()})
    classifier = Classifier.load(path, device="cpu", num_threads=1)
    with pytest.raises(BundleError, match="multiplies whole numbers"):
        classifier.add_class("emu")
