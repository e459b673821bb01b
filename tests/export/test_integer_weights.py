"""int8 that is the same on every processor: weights whose sums are never cut off, held by emulation.

The emulation agrees with ONNX Runtime on a processor with VNNI when its sums are exact, and on one with AVX2 alone when
they saturate. A test must pass on both, so it looks at ONNX Runtime only with weights for which the two are the same.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import open_clip
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from fastfsl.bundle.int8_weights import MAX_PAIR_SUM, Int8Products, int8_products, largest_pair_sum
from fastfsl.encoders import load_encoder
from fastfsl.export import quantization
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.integer_weights import BLOCK, PAIR_SUM, integer_weights
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.export.visual_graph import visual_graph
from fastfsl.flow import VelocityField, build_plan
from fastfsl.runtime.session import create_session
from tests.export.integer_emulation import (
    captured,
    emulated,
    exact_sums,
    product,
    products_of,
    saturating_sums,
    weights_of,
)

RNG = np.random.default_rng(0)


def _open(model: bytes):
    return create_session(model, "test", device="cpu", num_threads=1)


def _full_range(weight, _covariance):
    """Weights as they were written before: -127..127, each channel by itself."""
    steps = np.abs(weight).max(axis=0).astype(np.float32) / 127
    steps[steps == 0] = 1
    return np.rint(weight / steps).astype(np.int8), steps


def _int8(model, feed):
    return quantize(model, calibrate(model, [feed], _open))[0]


@pytest.fixture(scope="module")
def visual(tiny_clip_graph):
    """The demo's image tower, and images for it."""
    return tiny_clip_graph, {"images": RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)}


@pytest.fixture(scope="module")
def flow():
    """A flow as wide as the demo's, and embeddings for it."""
    torch.manual_seed(0)
    field = VelocityField(128, 2).eval()
    with torch.no_grad():  # zero-initialised layers would make v = 0
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.02))
    rows = RNG.normal(size=(40, 128)).astype(np.float32)
    graph = flow_graph(build_plan(field, 3, 1 / 3).to_arrays(), np.eye(10, 128, dtype=np.float32), 20.0)
    return graph, {"image_embeds": rows / np.linalg.norm(rows, axis=1, keepdims=True)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT-B/32 of two blocks, and images for it."""
    return _vit(tmp_path_factory.mktemp("vit"), layers=2)


@pytest.fixture(scope="module")
def whole_vit(tmp_path_factory):
    return _vit(tmp_path_factory.mktemp("whole_vit"), layers=12)


def _vit(folder, layers):
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = layers
    config["text_cfg"] |= {"layers": 1, "width": 8, "heads": 2}
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return visual_graph(load_encoder(f"local-dir:{folder}")), {
        "images": RNG.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    }


GRAPHS = ["visual", "flow", "vit", pytest.param("whole_vit", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def int8_graphs():
    """By name: a float32 graph is quantised once."""
    return {}


@pytest.fixture
def int8(request, int8_graphs):
    name = request.param
    if name not in int8_graphs:
        model, feed = request.getfixturevalue(name)
        int8_graphs[name] = _int8(model, feed), feed
    return int8_graphs[name]


def _leaves_16_bits(weights) -> bool:
    """Whether bytes 0..255 exist for which two products of adjacent rows do not fit in 16 bits together."""
    rows = np.concatenate([weights, np.zeros((len(weights) % 2, weights.shape[1]), np.int8)]).astype(np.int64)
    first, second = rows[::2], rows[1::2]
    high = 255 * (np.maximum(first, 0) + np.maximum(second, 0)).max()
    low = 255 * (np.minimum(first, 0) + np.minimum(second, 0)).min()
    return bool(high > 2**15 - 1 or low < -(2**15))


@pytest.mark.parametrize("int8", GRAPHS, indirect=True)
def test_no_pair_of_adjacent_rows_can_leave_16_bits(int8):
    model, _ = int8
    found = weights_of(model)
    tensors = [tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sorted(found) == sorted(tensors)  # there are no other int8 weights
    assert len(found) > 4
    assert not [name for name, weights in found.items() if _leaves_16_bits(weights)]
    assert int8_products(model.SerializeToString(), "a graph") == Int8Products(PAIR_SUM)


@pytest.mark.parametrize("name", ["visual", "flow"])
def test_weights_of_the_full_range_would_leave_16_bits(request, monkeypatch, name):
    monkeypatch.setattr(quantization, "integer_weights", _full_range)
    model = _int8(*request.getfixturevalue(name))
    assert all(_leaves_16_bits(weights) for weights in weights_of(model).values())
    products = int8_products(model.SerializeToString(), "a graph")
    assert products is not None
    assert MAX_PAIR_SUM < (products.max_pair_sum or 0) <= 254
    assert not products.any_processor


@pytest.mark.parametrize("int8", GRAPHS, indirect=True)
def test_emulated_integers_and_onnxruntime_agree_on_every_product(int8):
    model, feed = int8
    tensors = captured(model, feed)
    for node in products_of(model):
        expected = product(node, tensors, exact_sums)
        worst = np.abs(tensors[node.output[0]] - expected).max()
        assert worst <= 1e-3 * np.ptp(expected), (node.op_type, node.output[0])
        np.testing.assert_array_equal(_few(node, tensors, exact_sums), _few(node, tensors, saturating_sums))


def _few(node, tensors, sums):
    """Sums of some rows: saturating ones take long. Among them are the largest bytes that could come."""
    values, weights = tensors[node.input[0]], tensors[node.input[1]]
    rows = values.reshape(-1, values.shape[-1])[:6]
    worst = np.where(weights[:, :6].T > 0, 255, 0).astype(np.uint8)
    return sums(np.concatenate([rows, worst, 255 - worst]), weights)


@pytest.mark.parametrize("name", ["visual", "flow"])
def test_saturation_shows_with_weights_of_the_full_range(request, monkeypatch, name):
    monkeypatch.setattr(quantization, "integer_weights", _full_range)
    model = _int8(*request.getfixturevalue(name))
    tensors = captured(model, request.getfixturevalue(name)[1])
    for node in products_of(model):
        assert (_few(node, tensors, exact_sums) != _few(node, tensors, saturating_sums)).any(), node.output[0]


def _first(model: onnx.ModelProto, sums, feed) -> np.ndarray:
    """The graph's first output, its products summed so."""
    output, *_ = list(emulated(model, sums).run(None, feed))
    return output


@pytest.mark.parametrize("name", ["visual", "flow"])
def test_a_whole_graph_gives_the_same_where_sums_saturate(request, monkeypatch, name):
    graph, feed = request.getfixturevalue(name)
    plain, *_ = _open(graph.SerializeToString()).run(None, feed)
    model = _int8(graph, feed)
    exact, saturated = (_first(model, sums, feed) for sums in (exact_sums, saturating_sums))
    np.testing.assert_array_equal(exact, saturated)
    np.testing.assert_allclose(_open(model.SerializeToString()).run(None, feed)[0], exact, atol=0.02 * np.ptp(exact))
    monkeypatch.setattr(quantization, "integer_weights", _full_range)
    before = _first(_int8(graph, feed), saturating_sums, feed)
    assert np.abs(before - plain).mean() > 1.5 * np.abs(saturated - plain).mean()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (3, 5), (BLOCK - 1, 2), (BLOCK, 7), (2 * BLOCK + 5, 9)])
@pytest.mark.parametrize("kind", ["normal", "one sign", "outliers", "equal", "zero", "a column of zeros"])
def test_pairs_keep_the_limit_whatever_the_weights(height, width, kind):
    drawn = RNG.normal(size=(height, width))
    if kind == "one sign":
        drawn = np.abs(drawn)
    elif kind == "outliers":
        drawn = drawn**5
    elif kind == "equal":
        drawn = np.full_like(drawn, -0.37)  # 63.5 steps each: both would be rounded up
    elif kind == "zero":
        drawn[:] = 0
    elif kind == "a column of zeros":
        drawn[:, 0] = 0
    weight = drawn.astype(np.float32)
    inputs = RNG.normal(size=(200, height)) @ RNG.normal(size=(height, height))
    for covariance in (_blocks(inputs), np.zeros_like(_blocks(inputs)), np.full_like(_blocks(inputs), np.nan)):
        levels, steps = integer_weights(weight, covariance)
        assert levels.dtype == np.int8
        assert (levels.shape, steps.shape) == (weight.shape, (width,))
        assert largest_pair_sum(levels) <= PAIR_SUM
        assert not _leaves_16_bits(levels)
        assert (levels[:, weight.any(axis=0)] != 0).any(axis=0).all()
        limit = np.abs(weight).max(axis=0) / PAIR_SUM
        assert (steps[weight.any(axis=0)] <= 2 * limit[weight.any(axis=0)] * 1.001).all()
    levels, steps = integer_weights(weight, np.zeros_like(covariance))
    assert (np.abs(levels * steps - weight) <= 1.001 * steps).all()  # rows by themselves: the nearest, or the next


def _blocks(inputs):
    whole = np.zeros((len(inputs), -(-inputs.shape[1] // BLOCK) * BLOCK))
    whole[:, : inputs.shape[1]] = inputs - inputs.mean(axis=0)
    blocks = whole.reshape(len(inputs), -1, BLOCK)
    return np.einsum("nbi,nbj->bij", blocks, blocks) / len(inputs)


def test_rounding_makes_the_error_of_the_outputs_smaller_not_that_of_the_weights():
    weight = RNG.normal(size=(96, 40)).astype(np.float32)
    inputs = RNG.normal(size=(500, 8)) @ RNG.normal(size=(8, 96)) + 0.3 * RNG.normal(size=(500, 96))
    errors = []
    for covariance in (_blocks(inputs), np.zeros_like(_blocks(inputs))):
        levels, steps = integer_weights(weight, covariance)
        difference = levels * steps - weight
        errors.append((np.square((inputs - inputs.mean(axis=0)) @ difference).mean(), np.square(difference).mean()))
    assert errors[0][0] < 0.5 * errors[1][0]
    assert errors[0][1] > errors[1][1]


def test_calibration_finds_mean_and_covariance_of_every_block():
    tensors = [numpy_helper.from_array(RNG.normal(size=(BLOCK + 3, 2)).astype(np.float32), "w")]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", BLOCK + 3), ("y", 2))]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    x = (RNG.normal(size=(50, BLOCK + 3)) + 1000).astype(np.float32)  # far from 0: a difference of large numbers
    found = calibrate(model, [{"x": x[:7]}, {"x": x[7:]}], _open)["x"]
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, _blocks(exact), atol=1e-6)
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=1e-5)
