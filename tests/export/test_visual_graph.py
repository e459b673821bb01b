import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastfsl.encoders import Encoder, load_encoder
from fastfsl.errors import BundleError
from fastfsl.export.parity import visual_parity
from fastfsl.export.visual_graph import visual_graph
from fastfsl.runtime.session import create_session


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("tiny-clip")


@pytest.fixture(scope="module")
def graph(encoder) -> onnx.ModelProto:
    return visual_graph(encoder)


def test_batch_is_dynamic_and_pixels_are_bytes(graph, encoder):
    (images,), (embeddings,) = graph.graph.input, graph.graph.output
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_value for dim in images.type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert embeddings.name == "image_embeds"
    assert embeddings.type.tensor_type.shape.dim[0].dim_param
    assert embeddings.type.tensor_type.shape.dim[1].dim_value == encoder.embed_dim


def test_graph_equals_open_clips_own_transform_and_tower(graph, encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    from PIL import Image

    prepared = torch.stack([encoder.transform(Image.fromarray(image)) for image in pixels])
    expected = encoder.encode_images(prepared).numpy()
    got = create_session(graph.SerializeToString(), "test", device="cpu").run(None, {"images": pixels})[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_parity_notices_altered_weights(graph, encoder):
    assert visual_parity(encoder, graph)["min_cosine"] > 0.99999
    altered = onnx.ModelProto()
    altered.CopyFrom(graph)
    largest = max(altered.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    values = onnx.numpy_helper.to_array(largest).copy()
    values[:8] = 0
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    with pytest.raises(BundleError, match="does not match torch"):
        visual_parity(encoder, altered)


def test_a_tower_beyond_two_gib_is_refused_at_once(encoder):
    clip = torch.nn.Module()
    clip.visual = torch.nn.Linear(2**15, 2**14 + 1, device="meta")
    with pytest.raises(BundleError, match=r"image tower of tiny-clip has 2\.0 GiB of weights"):
        visual_graph(replace(encoder, model=clip))


def test_graph_tells_nothing_of_the_machine_it_was_made_on(graph):
    text = graph.SerializeToString()
    assert b".py" not in text
    assert b"stack_trace" not in text


@pytest.mark.parametrize(
    "changes",
    [{"no_ln_pre": True, "mlp_ratio": 2.0}, {"pool_type": "avg"}],
)
def test_variants_of_the_tower_match(tmp_path, changes):
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision | changes, "text_cfg": text}
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "size": [32, 32]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.model.CLIP(**config)
    with torch.no_grad():  # biases begin as zeros
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = load_encoder(f"local-dir:{tmp_path}")
    graph = visual_graph(encoder)
    assert visual_parity(encoder, graph)["max_abs_error"] < 1e-5
    # 17 tokens, 2 heads: the last block has one query where the class token is all that is pooled.
    shapes = {tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1:] for value in graph.graph.value_info}
    assert ((2, 1, 17) in shapes) == (changes.get("pool_type") != "avg")
    tower: Any = encoder.model.visual
    assert type(tower.transformer.resblocks[-1]) is open_clip.transformer.ResidualAttentionBlock


@pytest.mark.slow
def test_vit_b_32_matches(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    encoder = load_encoder("ViT-B-32", str(tmp_path / "vit.safetensors"))
    assert visual_parity(encoder, visual_graph(encoder))["min_cosine"] > 0.99999
