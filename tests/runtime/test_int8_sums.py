"""int8 bundles on processors that cut off sums at 16 bits: asked by computing, refused or widened, and said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastfsl import bundle
from fastfsl.bundle.int8_weights import MAX_PAIR_SUM, largest_pair_sum
from fastfsl.errors import BundleError, DeviceError
from fastfsl.runtime import Classifier, int8_sums
from fastfsl.runtime.int8_sums import PROBE_MODEL, sums_saturate
from fastfsl.runtime.session import create_session
from fastfsl.runtime.unsigned_weights import with_unsigned_weights

WIDTH = 6
MICROSOFT = "com.microsoft"


def _serialised(nodes, inputs, outputs, **tensors) -> bytes:
    takes, gives = ([helper.make_tensor_value_info(*one) for one in side] for side in (inputs, outputs))
    constants = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in tensors.items()
    ]
    graph = helper.make_graph(nodes, "int8", takes, gives, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _product(weights, operator="MatMulIntegerToFloat", *, domain=MICROSOFT, index=1, **options) -> bytes:
    """A graph whose one node has these weights."""
    inputs = ["x", "s", "z", "t", "u", "v"][: max(3, index)]
    inputs.insert(index, "w")
    node = helper.make_node(operator, inputs, ["y"], domain=domain, **options)
    return _serialised([node], [("x", TensorProto.UINT8, ["n", 4])], [("y", TensorProto.FLOAT, None)], w=weights)


def _flow(weights, kind=np.uint8) -> bytes:
    """Embeddings as bytes of a type, times int8 weights (WIDTH, WIDTH), and their logits."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image_embeds", "scale", "zero"], ["bytes"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["bytes", "w", "scale", "steps", "zero"], ["features"], domain=MICROSOFT
        ),
        helper.make_node("Transpose", ["class_embeddings"], ["columns"]),
        helper.make_node("MatMul", ["features", "columns"], ["logits"]),
    ]
    return _serialised(
        nodes,
        [("image_embeds", 1, ["batch", WIDTH]), ("class_embeddings", 1, ["C", WIDTH])],
        [("features", 1, ["batch", WIDTH]), ("logits", 1, ["batch", "C"])],
        w=weights,
        scale=np.float32(1 / 128),
        steps=np.full(WIDTH, 0.01, np.float32),
        zero=kind(128 if kind is np.uint8 else 0),
        class_embeddings=np.eye(4, WIDTH, dtype=np.float32),
    )


RANDOM = np.random.default_rng(0).integers(-63, 64, (WIDTH, WIDTH)).astype(np.int8)
OLD = np.where(RANDOM < 0, -127, 127).astype(np.int8)
OLD[:2, 0] = 127


@pytest.fixture
def made(tmp_path):
    """Makes an int8 bundle on features with these weights."""

    def make(weights, kind=np.uint8, **fields):
        target = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        manifest = {
            "method": "fma",
            "class_names": ["a", "b", "c", "d"],
            "embed_dim": WIDTH,
            "num_steps": 1,
            "step_size": 1.0,
            "precision": "int8",
            "logit_scale": 10.0,
            "preprocessing": None,
            "encoder": None,
            "versions": {},
            "metrics": {},
            "parity": {},
            "training": {},
            **fields,
        }
        with bundle.staging_folder(target) as staging:
            (staging / "flow").mkdir()
            (staging / bundle.FLOW_GRAPH).write_bytes(_flow(weights, kind))
            bundle.seal_bundle(staging, manifest)
        return target

    return make


@pytest.fixture
def processor(monkeypatch):
    """Makes this processor one that cuts sums off, or one that does not; returns what was asked of it."""

    def be(*, saturates):
        asked = []

        def answer():
            asked.append(saturates)
            return saturates

        monkeypatch.setattr(int8_sums, "sums_saturate", answer)
        return asked

    return be


def _load(path, **options):
    return Classifier.load(path, device="cpu", num_threads=1, **options)


FEATURES = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
FEATURES /= np.linalg.norm(FEATURES, axis=1, keepdims=True)


def test_weights_that_fit_run_anywhere_without_a_question(made, processor):
    asked = processor(saturates=True)
    described = _load(made(RANDOM, int8={"max_pair_sum": 126})).describe()
    assert described["int8"] == {"max_pair_sum": largest_pair_sum(RANDOM), "any_processor": True, "widened": False}
    assert not asked


def test_an_older_bundle_whose_weights_happen_to_fit_is_not_refused(made, processor):
    processor(saturates=True)
    assert _load(made(RANDOM)).describe()["int8"]["any_processor"]


def test_an_older_bundle_is_refused_where_sums_would_be_cut_off(made, processor, caplog):
    processor(saturates=True)
    with pytest.raises(DeviceError, match=r"older fastfsl.*export its run again.*fp32.*wide_int8=True \(--wide-int8\)"):
        _load(made(OLD))
    assert not caplog.records


def test_an_older_bundle_runs_where_sums_are_wide(made, processor, caplog):
    asked = processor(saturates=False)
    described = _load(made(OLD)).describe()
    assert described["int8"] == {"max_pair_sum": 254, "any_processor": False, "widened": False}
    assert asked == [False]
    assert not caplog.records


def test_an_older_bundle_runs_with_unsigned_weights_when_told_to(made, processor):
    path = made(OLD)
    processor(saturates=True)
    classifier = _load(path, wide_int8=True)
    assert classifier.describe()["int8"] == {"max_pair_sum": 254, "any_processor": False, "widened": True}
    np.testing.assert_allclose(classifier.transport(FEATURES), _transported(OLD), rtol=1e-5, atol=1e-5)
    processor(saturates=False)
    assert _load(path, wide_int8=True).describe()["int8"]["widened"] is False


def _transported(weights):
    levels = np.clip(np.rint(FEATURES * 128) + 128, 0, 255).astype(np.int64) - 128
    return levels @ weights.astype(np.int64) * (0.01 / 128)


def test_a_manifest_is_not_simply_believed(made, processor):
    for saturates in (False, True):
        processor(saturates=saturates)
        with pytest.raises((BundleError, DeviceError)):
            _load(made(OLD, int8={"max_pair_sum": 127}))
    processor(saturates=False)
    with pytest.raises(BundleError, match="add up to 127 at most, and its graphs have 254"):
        _load(made(OLD, int8={"max_pair_sum": 127}))


def test_sums_that_cannot_be_told_are_refused_where_they_may_be_cut_off(processor, tmp_path, made):
    model = _product(RANDOM[:4], "ConvInteger", domain="")
    manifest = bundle.read_manifest(made(RANDOM))
    processor(saturates=True)
    for widen in (False, True):
        with pytest.raises(DeviceError, match="cannot be computed in another way"):
            int8_sums.Int8Sums(tmp_path, manifest, widen=widen).computable(model, "a graph")
    processor(saturates=False)
    assert int8_sums.Int8Sums(tmp_path, manifest, widen=False).computable(model, "a graph") == model


def test_a_float32_bundle_has_nothing_to_say(write, tmp_path, processor):
    asked = processor(saturates=True)
    assert _load(write(tmp_path / "fp32")).describe()["int8"] is None
    assert not asked


def test_loading_asks_the_real_processor(made):
    """Whichever this one is."""
    path = made(OLD)
    if sums_saturate():
        with pytest.raises(DeviceError, match="older fastfsl"):
            _load(path)
    found = _load(path, wide_int8=True)
    assert found.describe()["int8"]["widened"] is sums_saturate()
    np.testing.assert_allclose(found.transport(FEATURES), _transported(OLD), rtol=1e-5, atol=1e-5)


def test_the_embedded_probe_is_made_anew():
    nodes, tensors = [], {"scale": np.float32(1), "steps": np.ones(64, np.float32)}
    for name, output, height in (("a", "y", 8), ("b", "z", 13)):
        tensors[f"{name}_weights"] = np.tile(np.array([127, -127], np.int8), (height, 32))
        inputs = [name, f"{name}_weights", "scale", "steps"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], domain=MICROSOFT))
    model = _serialised(
        nodes,
        [("a", TensorProto.UINT8, ["n", 8]), ("b", TensorProto.UINT8, ["n", 13])],
        [("y", TensorProto.FLOAT, ["n", 64]), ("z", TensorProto.FLOAT, ["n", 64])],
        **tensors,
    )
    assert model == PROBE_MODEL


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["y", "z"])
def test_the_probe_sees_one_sum_cut_off(monkeypatch, rows, name):
    """Of one row or of several, of a whole number of four rows of weights or not."""

    class Cut:
        def run(self, _, feed):
            found = [255.0 * 127 * len(values[0]) * np.tile([1.0, -1.0], (len(values), 32)) for values in feed.values()]
            if len(feed["a"]) == rows:
                found["yz".index(name)][0, 5] = -32768
            return found

    monkeypatch.setattr(int8_sums, "create_session", lambda *_, **__: Cut())
    assert sums_saturate.__wrapped__() is True
    monkeypatch.setattr(Cut, "run", lambda self, _, feed: [
        255 * 127 * len(values[0]) * np.tile([1, -1], (len(values), 32)) for values in feed.values()
    ])  # fmt: skip
    assert sums_saturate.__wrapped__() is False


# --------------------------------------------------------------------------------------------- with unsigned weights


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("operator", ["MatMulIntegerToFloat", "QAttention"])
def test_unsigned_weights_give_the_same_product(rows, operator):
    rng = np.random.default_rng(0)
    weights = rng.integers(-128, 128, (13, 12)).astype(np.int8)
    bias = ["b"] if operator == "QAttention" else []
    inputs = ["x", "w", *bias, "s", "t", *(["", "z"] if bias else ["z"])]
    # Two products share the weights, as the steps of a flow do.
    nodes = [helper.make_node(operator, inputs, [output], domain=MICROSOFT) for output in ("y", "again")]
    if bias:
        for node in nodes:
            node.attribute.append(helper.make_attribute("num_heads", 2))
    nodes.append(helper.make_node("Identity", ["zero_of_unsigned_weights"], ["kept"]))
    shape = [1, "n", 13] if bias else ["n", 13]
    model = _serialised(
        nodes,
        [("x", TensorProto.UINT8, shape), ("zero_of_unsigned_weights", 1, [1])],
        [("y", 1, None), ("again", 1, None), ("kept", 1, [1])],
        w=np.clip(weights // 3, -42, 42).astype(np.int8),  # as they are, no processor cuts their sums off
        b=rng.normal(size=12).astype(np.float32),
        s=np.float32(0.02),
        t=rng.uniform(0.005, 0.02, 12).astype(np.float32),
        z=np.uint8(77),
    )
    unsigned = with_unsigned_weights(model)
    assert bundle.int8_products(unsigned, "a graph") == bundle.Int8Products(0)
    x = rng.integers(0, 256, (1, rows, 13) if bias else (rows, 13)).astype(np.uint8)
    feed = {"x": x, "zero_of_unsigned_weights": np.ones(1, np.float32)}
    expected, found = (
        create_session(one, "a graph", device="cpu", num_threads=1).run(None, feed) for one in (model, unsigned)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_products_that_no_exporter_writes_are_refused(processor, tmp_path, made):
    processor(saturates=True)
    sums = int8_sums.Int8Sums(tmp_path, bundle.read_manifest(made(RANDOM)), widen=True)
    with pytest.raises(DeviceError, match="products that fastfsl does not write"):
        sums.computable(_product(OLD, "MatMulInteger", domain=""), "a graph")


@pytest.mark.parametrize("wide_int8", [False, True])
def test_rows_of_int8_are_named_where_no_unsigned_weights_help(processor, made, wide_int8):
    """ONNX Runtime does not multiply them by unsigned weights, and said that it has no such operator."""
    processor(saturates=True)
    path = made(OLD, np.int8)
    with pytest.raises(DeviceError, match=r"cannot be computed in another way \(it multiplies rows of int8"):
        _load(path, wide_int8=wide_int8)
    processor(saturates=False)
    _load(path)


def test_weights_with_a_zero_point_are_left_to_others(processor, tmp_path, made):
    node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "s", "t", "", "zero"], ["y"], domain=MICROSOFT)
    model = _serialised([node], [("x", TensorProto.UINT8, ["n", 6])], [("y", 1, None)], w=OLD, zero=np.int8(3))
    processor(saturates=True)
    with pytest.raises(DeviceError, match="has a zero point"):
        int8_sums.Int8Sums(tmp_path, bundle.read_manifest(made(RANDOM)), widen=True).computable(model, "a graph")


# ------------------------------------------------------------------------------------------------ the weights' own part


def _naive(weights) -> int:
    rows = [*weights.astype(int).tolist(), [0] * weights.shape[1]]
    sums = [
        sum(abs(one[column]) for one in (rows[first], rows[first + 1]) if one[column] * sign > 0)
        for first in range(0, len(weights), 2)
        for column in range(weights.shape[1])
        for sign in (1, -1)
    ]
    return max(sums)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 4), (9, 1), (40, 3)])
def test_the_largest_sum_of_a_pair(height, width, monkeypatch):
    rng = np.random.default_rng(height)
    for block in (1, 2**18):  # many blocks, and one
        monkeypatch.setattr("fastfsl.bundle.int8_weights._BLOCK", block)
        for _ in range(5):
            weights = rng.integers(-128, 128, (height, width)).astype(np.int8)
            assert largest_pair_sum(weights) == _naive(weights)
    assert largest_pair_sum(np.full((2, 1), -128, np.int8)) == 256


def test_128_fits_in_16_bits_and_129_does_not():
    assert 255 * MAX_PAIR_SUM <= 2**15 - 1 < 255 * (MAX_PAIR_SUM + 1)
    for pair, fits in ((64, True), (65, False)):
        weights = np.array([[pair], [64]], np.int8)
        found = bundle.int8_products(_product(weights), "a graph")
        assert found is not None
        assert (found.max_pair_sum, found.any_processor) == (pair + 64, fits)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (_product(OLD), 254),
        (_product(RANDOM), largest_pair_sum(RANDOM)),
        (_product(OLD, "QAttention", num_heads=1), 254),
        (_product(OLD, "MatMulInteger", domain=""), 254),
        (_product(OLD, "MatMulInteger", domain="ai.onnx"), 254),
        (_product(OLD, "QLinearMatMul", domain="", index=3), 254),
        (_product(OLD, "DynamicQuantizeMatMul"), 254),
        (_product(np.array([[100, 100], [27, -27]], np.int8), "QGemm", index=3), 127),
        (_product(np.array([[100, 100], [27, -27]], np.int8), "QGemm", index=3, transB=1), 200),
        (_product(OLD.view(np.uint8)), 0),  # ONNX Runtime sums unsigned weights in 32 bits
        (_product(OLD[None]), None),
        (_product(OLD, "ConvInteger", domain=""), None),
        (_product(OLD, "DequantizeLinear", domain=""), None),
        (_product(helper.make_tensor("w", TensorProto.INT8, [2, 1], [1, 2])), None),  # not as raw bytes
        (
            _serialised([helper.make_node("MatMulInteger", ["x", "x"], ["y"])], [("x", 2, [2, 2])], [("y", 6, None)]),
            None,
        ),
        (_serialised([helper.make_node("Relu", ["x"], ["y"])], [("x", 1, [2])], [("y", 1, [2])], w=OLD), "none"),
    ],
)
def test_what_is_found_in_a_graph(model, expected):
    found = bundle.int8_products(model, "a graph")
    assert ("none" if found is None else found.max_pair_sum) == expected
    assert found is None or found.any_processor is (expected is not None and expected <= MAX_PAIR_SUM)


def test_one_product_that_cannot_be_told_makes_all_so():
    together = bundle.Int8Products.together
    assert together([None, bundle.Int8Products(3), bundle.Int8Products(9)]) == bundle.Int8Products(9)
    assert together([bundle.Int8Products(3), bundle.Int8Products(None)]) == bundle.Int8Products(None)
    assert together([None]) is None


def test_bytes_that_are_no_graph_are_a_bundle_error():
    with pytest.raises(BundleError, match="a graph: not a graph that fastfsl runs"):
        bundle.int8_products(b"\xff" * 9, "a graph")


@pytest.mark.parametrize("value", [{}, {"max_pair_sum": -1}, {"max_pair_sum": 257}, {"max_pair_sum": True}, 127, [1],
                                   {"max_pair_sum": 1, "more": 1}, {"max_pair_sum": 1.0}])  # fmt: skip
def test_a_record_of_another_form_is_refused(made, value):
    path = made(RANDOM)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["int8"] is None
    (path / "manifest.json").write_text(json.dumps({**manifest, "int8": value}))
    with pytest.raises(BundleError, match="'int8' must be null, or an object with a max_pair_sum"):
        bundle.read_manifest(path)


def test_a_record_belongs_to_int8_alone_and_may_be_left_out(made):
    path = made(RANDOM)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["int8"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert bundle.read_manifest(path).int8 is None
    (path / "manifest.json").write_text(json.dumps({**manifest, "precision": "fp32", "int8": {"max_pair_sum": 127}}))
    with pytest.raises(BundleError, match="'int8' is about a bundle in int8"):
        bundle.read_manifest(path)
