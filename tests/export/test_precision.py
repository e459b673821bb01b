"""int8 and fp16 bundles: what is quantised, what the gate refuses, which layers are kept, where they may run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from fastfsl.encoders import load_encoder
from fastfsl.errors import BundleError, ConfigError, DataError, DeviceError
from fastfsl.export import bundle_writer
from fastfsl.export import precision as precision_module
from fastfsl.export.accuracy_gate import Graphs, answers, check_agreement, compare
from fastfsl.export.bundle_writer import export_run
from fastfsl.export.integer_weights import integer_weights
from fastfsl.export.precision import reduce_precision
from fastfsl.export.quantization import calibrate, linear_layers, quantize, rounding_noise
from fastfsl.fit.config import load_config
from fastfsl.fit.run import Run
from fastfsl.fit.support import support_set
from fastfsl.fit.train import train
from fastfsl.runtime import Classifier
from fastfsl.runtime import precision as runtime_precision
from fastfsl.runtime.probe import Probe
from fastfsl.runtime.session import create_session

BRIEF = {"num_blocks": 1, "epochs": 5, "batch_size": 8, "learning_rate": 1e-2, "num_steps": 2}


def _open(model: bytes):
    return create_session(model, "test", device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of coloured noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for index in range(4):
            pixels = rng.integers(0, 160, (40, 40, 3))
            pixels[..., label] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Run:
    flags = {"method": "fma", "backbone": "tiny-clip", "shots": 4, "device": "cpu", "num_views": 1, **BRIEF}
    return train(folder, load_config(flags=flags), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def visual(tiny_clip_graph):
    return tiny_clip_graph


@pytest.fixture
def exported(visual, monkeypatch):
    """An export takes the tower that is exported already."""
    monkeypatch.setattr(bundle_writer, "visual_graph", lambda _: visual)


@pytest.fixture(scope="module")
def graphs(run, visual) -> Graphs:
    from fastfsl.export.flow_graph import flow_graph

    deployed = run.deployment()
    return Graphs(visual, flow_graph(deployed.plan.to_arrays(), deployed.class_embeddings, deployed.logit_scale), None)


PIXELS = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


def test_every_product_with_weights_is_int8_and_takes_the_pixels_as_bytes(visual):
    ranges = calibrate(visual, [{"images": PIXELS[:4]}, {"images": PIXELS[4:]}], _open)
    int8, names = quantize(visual, ranges)
    onnx.checker.check_model(int8)
    assert len(names) == len(linear_layers(visual)) == 27
    kinds = Counter(node.op_type for node in int8.graph.node)
    assert (kinds["MatMulIntegerToFloat"], kinds["QAttention"]) == (22, 5)
    assert kinds["Cast"] == 0  # of the pixels
    assert linear_layers(int8) == []
    assert int8.ByteSize() < visual.ByteSize() / 3
    expected, got = (_open(model.SerializeToString()).run(None, {"images": PIXELS})[0] for model in (visual, int8))
    cosines = (expected * got).sum(axis=1)
    assert 0.999 < cosines.min() < 0.999999
    alone = [_open(int8.SerializeToString()).run(None, {"images": PIXELS[at : at + 1]})[0] for at in range(3)]
    np.testing.assert_array_equal(np.concatenate(alone), got[:3])  # an image's result is its own


def test_a_product_is_its_formula():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    weight[:, 1] = 0
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1),
        helper.make_node("Gemm", ["x", "w", "b"], ["z"], transB=1, alpha=2.0),
    ]
    value = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 6), ("y", 3), ("z", 3))]
    constants = [numpy_helper.from_array(weight.T.copy(), "w"), numpy_helper.from_array(bias, "b")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    x = rng.normal(size=(20, 6)).astype(np.float32) + 1
    (found,) = calibrate(model, [{"x": x[:7]}, {"x": x[7:]}], _open).values()
    assert (found.low, found.high) == (x.min(), x.max())
    np.testing.assert_allclose(found.variance, x.var(axis=0), rtol=1e-4)
    int8, names = quantize(model, {"x": found})
    assert names == ["w"]
    y, z = _open(int8.SerializeToString()).run(["y", "z"], {"x": x})
    np.testing.assert_allclose(z, 2 * x @ weight + bias, rtol=1e-5)  # alpha is 2: left alone
    zero = np.rint(-found.low / found.step)
    levels = np.clip(np.rint(x / np.float32(found.step)) + zero, 0, 255) - zero
    integers, steps = integer_weights(weight, found.covariance)
    rounded = integers * steps
    shift = x.astype(np.float64).mean(axis=0) @ (weight - rounded)  # the mean output stays
    np.testing.assert_allclose(y, levels * found.step @ rounded + bias + shift, atol=1e-4)
    assert 0 < rounding_noise(linear_layers(model), {"x": found})["w"] < 1e-3


def _graph(nodes, constants, outputs):
    """Of `x` (n, 1) and constants."""
    values = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 1), *outputs)]
    constants = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_only_a_bias_of_every_output_goes_into_the_product():
    product = helper.make_node("MatMul", ["x", "w"], ["p"])
    model = _graph([product, helper.make_node("Add", ["p", "b"], ["y"])], {"w": [[1, 2, 3]], "b": [7]}, [("y", 3)])
    x = np.array([[0.5], [1]], np.float32)
    ranges = calibrate(model, [{"x": x}], _open)
    int8, _ = quantize(model, ranges)
    np.testing.assert_allclose(_open(int8.SerializeToString()).run(None, {"x": x})[0], x * [1, 2, 3] + 7, atol=0.05)
    wide = _graph([product, helper.make_node("Add", ["p", "b"], ["y"])], {"w": [[2]], "b": [7, 8, 9]}, [("y", 3)])
    int8, _ = quantize(wide, ranges)
    np.testing.assert_allclose(_open(int8.SerializeToString()).run(None, {"x": x})[0], 2 * x + [7, 8, 9], atol=0.05)


def test_a_product_that_is_an_output_too_keeps_its_bias_outside():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    model = _graph(nodes, {"w": [[1, 2, 3]], "b": [7, 8, 9]}, [("y", 3), ("p", 3)])
    x = np.array([[0.5], [1]], np.float32)
    int8, _ = quantize(model, calibrate(model, [{"x": x}], _open))
    y, p = _open(int8.SerializeToString()).run(["y", "p"], {"x": x})
    np.testing.assert_allclose(p, x * [1, 2, 3], atol=0.05)
    np.testing.assert_allclose(y - p, np.tile([7, 8, 9], (2, 1)), atol=1e-5)


def test_gelu_by_tanh_is_as_near_as_is_said():
    x = np.linspace(-8, 8, 20001, dtype=np.float32)[:, None]
    found = []
    for kind in ("Gelu", "FastGelu"):
        model = _graph([helper.make_node(kind, ["x"], ["y"], domain="com.microsoft")], {}, [("y", 1)])
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        found.append(_open(model.SerializeToString()).run(None, {"x": x})[0])
    assert 0 < np.abs(found[0] - found[1]).max() < 0.0005


@pytest.mark.parametrize("keep", [[], ["w"]])
def test_only_after_an_int8_product_gelu_is_approximated(keep):
    product = helper.make_node("MatMul", ["x", "w"], ["p"])
    model = _graph([product, helper.make_node("Gelu", ["p"], ["y"], domain="com.microsoft")], {"w": [[3]]}, [("y", 1)])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    int8, _ = quantize(model, calibrate(model, [{"x": x}], _open), keep=keep)
    assert int8.graph.node[-1].op_type == ("Gelu" if keep else "FastGelu")
    exact = _open(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(_open(int8.SerializeToString()).run(None, {"x": x})[0], exact, atol=0.03)


def test_a_flow_of_no_step_has_nothing_to_calibrate():
    model = _graph([helper.make_node("Add", ["x", "b"], ["y"])], {"b": [7]}, [("y", 1)])
    ranges = calibrate(model, [{"x": np.ones((2, 1), np.float32)}], _open)
    assert ranges == {}
    assert quantize(model, ranges) == (model, [])


def _with_outliers(model: onnx.ModelProto, gain: float) -> tuple[onnx.ModelProto, set[str]]:
    """The same function with a few channels `gain` times larger before the second product of every third layer."""
    loud = onnx.ModelProto()
    loud.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in loud.graph.initializer}
    norms = {node.output[0]: node for node in loud.graph.node if node.op_type == "LayerNormalization"}
    touched = set()
    readers = Counter(name for node in loud.graph.node for name in node.input)
    for layer in [layer for layer in linear_layers(loud) if layer.source in norms and readers[layer.source] == 1][1::3]:
        factor = np.ones(len(layer.weight), np.float32)
        factor[::40] = gain
        for name in norms[layer.source].input[1:]:
            values = numpy_helper.to_array(tensors[name])
            assert [node.name for node in loud.graph.node if name in node.input] == [norms[layer.source].name]
            tensors[name].CopyFrom(numpy_helper.from_array(values * factor, name))
        tensors[layer.name].CopyFrom(numpy_helper.from_array(layer.weight / factor[:, None], layer.name))
        touched.add(f"visual/{layer.name}")
    return loud, touched


def test_layers_with_outlier_channels_stay_fp32(run, graphs):
    loud, touched = _with_outliers(graphs.visual, 3e4)
    assert len(touched) == 4
    loud_graphs = replace(graphs, visual=loud)
    reference = answers(graphs, PIXELS)
    assert compare(reference, answers(loud_graphs, PIXELS), np.zeros(9, np.int64))["min_cosine"] > 0.9999
    ranges = calibrate(loud, [{"images": PIXELS}], _open)
    whole = answers(replace(graphs, visual=quantize(loud, ranges)[0]), PIXELS)
    assert compare(reference, whole, np.zeros(9, np.int64))["min_cosine"] < 0.9
    made, report = reduce_precision("int8", loud_graphs, run, load_encoder("tiny-clip").preprocessing)
    assert report["agreement"] >= 0.99
    assert touched <= set(report["fp32_layers"])
    assert made.visual is not None
    assert {layer.name for layer in linear_layers(made.visual)} >= {name.removeprefix("visual/") for name in touched}


def test_outliers_everywhere_are_refused_unless_allowed(run, graphs, monkeypatch):
    monkeypatch.setattr(precision_module, "_KEPT_PARTS", (0.0,))
    loud = replace(graphs, visual=_with_outliers(graphs.visual, 3e4)[0])
    preprocessing = load_encoder("tiny-clip").preprocessing
    with pytest.raises(BundleError, match=r"int8 gives \d+\.\d % of 12 support images"):
        reduce_precision("int8", loud, run, preprocessing)
    _, report = reduce_precision("int8", loud, run, preprocessing, allow_drop=True)
    assert report["allow_drop"]
    assert report["agreement"] < 0.99


def test_an_int8_bundle_is_smaller_and_says_how_it_compares(run, exported, tmp_path):
    manifest = export_run(run, tmp_path / "int8", precision="int8")
    fp32 = export_run(run, tmp_path / "fp32")
    report = manifest.parity["precision"]
    assert (manifest.precision, fp32.precision) == ("int8", "fp32")
    assert "precision" not in fp32.parity
    assert report["num_samples"] == 12
    assert report["samples"] == "support images"
    assert report["agreement"] >= 0.99
    assert report["int8_layers"] == {"visual": 27, "flow": 5}
    assert manifest.files["visual/model.onnx"]["size"] < fp32.files["visual/model.onnx"]["size"] / 3
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("int8", "fp32")}
    assert "int8 against fp32: the same class for" in cards["int8"]
    assert "fitted estimator, of the graphs in fp32 that those in int8 were made from: visual" in cards["int8"]
    assert "fitted estimator: visual" in cards["fp32"]
    small, large = (Classifier.load(tmp_path / name, device="cpu", num_threads=1) for name in ("int8", "fp32"))
    paths = support_set(run).paths or ()
    assert small.describe()["precision"] == "int8"
    difference = np.abs(small.probabilities(paths) - large.probabilities(paths)).max()
    assert 0 < difference < 0.1
    with pytest.raises(DeviceError, match="int8, which is for CPUs"):
        Classifier.load(tmp_path / "int8", device="cuda")
    assert Classifier.load(tmp_path / "int8", device="auto").describe()["providers"]["visual"] == [
        "CPUExecutionProvider"
    ]


def test_an_fp16_bundle_is_half_as_large_and_never_reaches_the_cpu(run, exported, tmp_path, monkeypatch):
    manifest = export_run(run, tmp_path / "fp16", precision="fp16")
    report = manifest.parity["precision"]
    assert "was not run" in report["checked"]
    assert "the fp16 graph itself was not run" in (tmp_path / "fp16" / "README.md").read_text()
    assert report["agreement"] >= 0.99
    half = onnx.load(tmp_path / "fp16" / "visual" / "model.onnx")
    types = Counter(tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) > 1)
    assert types[onnx.TensorProto.FLOAT16] > 26
    assert types[onnx.TensorProto.FLOAT] == 0
    assert half.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    with pytest.raises(DeviceError, match="--precision int8 or fp32"):
        Classifier.load(tmp_path / "fp16", device="cpu")
    monkeypatch.setattr(runtime_precision, "probe", lambda device: Probe(device, "", "there is no card"))
    for device in ("auto", "cuda"):
        with pytest.raises(DeviceError, match="there is no card"):
            Classifier.load(tmp_path / "fp16", device=device)


def test_a_run_on_features_is_calibrated_and_checked_on_them(tmp_path):
    rng = np.random.default_rng(0)
    means, labels = rng.normal(size=(4, 16)), np.repeat(np.arange(4), 5)
    path = tmp_path / "features.npz"
    np.savez(
        path,
        train_features=(means[labels] + 0.2 * rng.normal(size=(20, 16))).astype(np.float32),
        train_labels=labels,
        class_embeddings=means.astype(np.float32),
        logit_scale=np.float32(20),
    )
    run = train(path, load_config(flags={"method": "fma", "device": "cpu", **BRIEF}))
    report = export_run(run, tmp_path / "bundle", precision="int8").parity["precision"]
    assert (report["samples"], report["num_samples"]) == ("support features", 20)
    assert report["int8_layers"] == {"flow": 5}
    linear = train(path, load_config(flags={"method": "gda", "device": "cpu"}))
    with pytest.raises(ConfigError, match="export it as fp32"):
        export_run(linear, tmp_path / "linear", precision="int8")
    path.unlink()
    with pytest.raises(DataError, match="put them back"):
        export_run(run, tmp_path / "again", precision="int8")
    export_run(run, tmp_path / "again")


def test_the_gate_lets_99_of_100_pass():
    report = {"agreement": 0.99, "num_samples": 100, "samples": "support images", "accuracy": 0.5, "accuracy_fp32": 1.0}
    check_agreement("int8", report, allow_drop=False)
    with pytest.raises(BundleError, match=r"98\.0 % of 100 support images"):
        check_agreement("int8", report | {"agreement": 0.98}, allow_drop=False)
    check_agreement("int8", report | {"agreement": 0.98}, allow_drop=True)
