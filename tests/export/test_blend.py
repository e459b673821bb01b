"""Blends of a tuned and a frozen tower as a graph: the trunk once, the weight an input that may be left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfsl.encoders import Encoder, load_encoder
from fastfsl.errors import BundleError
from fastfsl.export.parity import visual_parity
from fastfsl.export.visual_graph import blend_record, visual_graph
from fastfsl.runtime.session import create_session


@pytest.fixture(scope="module", params=["open_clip", pytest.param("test_vit3", marks=pytest.mark.slow)])
def encoder(request, make_blended) -> Encoder:
    encoder: Encoder = make_blended(request.param)
    return encoder


@pytest.fixture(scope="module")
def graph(encoder) -> onnx.ModelProto:
    return visual_graph(encoder)


def _pixels(encoder: Encoder, batch: int) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes, and what the model gets of them, in float64."""
    height, width = encoder.preprocessing.image_size
    images = np.random.default_rng(batch).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    mean, std = (
        torch.tensor(values, dtype=torch.float64) for values in (encoder.preprocessing.mean, encoder.preprocessing.std)
    )
    return images, ((torch.from_numpy(images).double() / 255 - mean) / std).permute(0, 3, 1, 2)


def _run(graph: onnx.ModelProto, images: np.ndarray, alpha: float | None = None) -> Any:
    feed = {"images": images} if alpha is None else {"images": images, "alpha": np.array(alpha, np.float32)}
    return create_session(graph.SerializeToString(), "test", device="cpu", num_threads=1).run(None, feed)[0]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_weight_gives_the_blend_of_both_branches(encoder, graph, batch):
    model: Any = encoder.model
    images, pixels = _pixels(encoder, batch)
    with torch.inference_mode():
        tuned, frozen = (F.normalize(part.double()) for part in model.tower(pixels.float()))
        own = F.normalize(model.clip.visual(pixels.float()).double())
    assert (tuned * frozen).sum(dim=1).max() < 0.9  # the branches differ
    for alpha in (None, 0.0, 0.3, 0.55, 1.0):
        weight = 0.3 if alpha is None else alpha
        expected = (weight * tuned + (1 - weight) * frozen).numpy()
        got = _run(graph, images, alpha)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(expected, axis=1), atol=2e-6)
    np.testing.assert_allclose(_run(graph, images, 0.0), own.numpy(), atol=2e-6)


def test_the_weight_is_a_scalar_that_may_be_left_out(encoder, graph):
    onnx.checker.check_model(graph, full_check=True)
    session = create_session(graph.SerializeToString(), "test", device="cpu")
    assert [node.name for node in session.get_inputs()] == ["images"]
    (alpha,) = session.get_overridable_initializers()
    assert (alpha.name, alpha.type, alpha.shape) == ("alpha", "tensor(float)", [])
    assert blend_record(encoder) == {"alpha": 0.3, "normalized": False}
    assert graph.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert b".py" not in graph.SerializeToString()


def test_the_trunk_is_there_once(encoder, graph):
    """The lower third once, the middle one as one batch of both branches, the upper one for each branch."""
    model: Any = encoder.model
    tower = model.tower
    kinds = Counter(node.op_type for node in graph.graph.node)
    pools = 0 if tower.head.pool is None else 2  # a map pooling has an attention of its own
    assert kinds["Softmax"] == len(tower.lower) + len(tower.middle) + 2 * len(tower.upper) + pools
    patches = sum(tensor.name.endswith("_tiles") for tensor in graph.graph.initializer)  # a product in its place
    assert kinds["Conv"] + patches == 1
    weights = Counter(
        hashlib.sha256(tensor.raw_data).hexdigest() for tensor in graph.graph.initializer if len(tensor.raw_data) > 128
    )
    assert max(weights.values()) == 1
    size = sum(4 * parameter.numel() for parameter in tower.parameters())
    assert size < len(graph.SerializeToString()) < size + 100_000


def test_parity_tries_every_weight(encoder, graph):
    report = visual_parity(encoder, graph)
    assert report["batches"] == [1, 2, 5]
    assert report["alphas"] == [0.0, 0.3, 1.0]
    assert report["min_cosine"] > 0.99999
    assert report["max_abs_error"] < 1e-5


@pytest.mark.parametrize("part", ["alpha", "tuned", "frozen"])
def test_parity_notices_a_wrong_weight_and_either_branch(encoder, graph, part):
    altered = onnx.ModelProto()
    altered.CopyFrom(graph)
    names = {"alpha": "alpha", "tuned": "upper.0.out.bias", "frozen": "frozen_upper.0.out.bias"}
    (tensor,) = (
        tensor for tensor in altered.graph.initializer if tensor.name in (names[part], f"clip.tower.{names[part]}")
    )
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(BundleError, match="does not match torch"):
        visual_parity(encoder, altered)


def test_features_keep_their_length_where_the_encoder_is_not_normalised(make_blended):
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 4 * 4, 5)

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.linear(pixels.flatten(1))
            return features

    preprocessing = replace(load_encoder("tiny-clip").preprocessing, image_size=(4, 4))
    for normalized in (True, False):
        encoder = replace(
            load_encoder("tiny-clip"), model=Linear().eval(), preprocessing=preprocessing, normalized=normalized
        )
        graph = visual_graph(encoder)
        assert "alphas" not in visual_parity(encoder, graph)
        assert blend_record(encoder) is None
        lengths = np.linalg.norm(_run(graph, _pixels(encoder, 3)[0]), axis=1)
        assert np.allclose(lengths, 1, atol=1e-5) == normalized


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["test_vit", "ViT-B-32"])
def test_other_towers_match(make_blended, kind):
    torch.manual_seed(0)
    clip = open_clip.create_model(kind) if kind == "ViT-B-32" else None
    fields = {"clip": clip.eval(), "image_size": 224, "embed_dim": 512} if clip is not None else {}
    encoder = make_blended(kind, alpha=0.4, normalized=True, **fields)
    graph = visual_graph(encoder)
    report = visual_parity(encoder, graph)
    assert report["min_cosine"] >= 0.99999
    assert report["alphas"] == [0.0, 0.4, 1.0]
    model: Any = encoder.model
    size = sum(4 * parameter.numel() for parameter in model.tower.parameters())
    assert len(graph.SerializeToString()) < 1.01 * size + 100_000
