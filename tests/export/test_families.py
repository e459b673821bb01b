"""Image and text towers of every open_clip family: exported, they give what torch gives."""

from __future__ import annotations

import logging

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastfsl.bundle.onnx_graph import check_graph_file
from fastfsl.encoders import Encoder, load_encoder
from fastfsl.errors import BundleError
from fastfsl.export.parity import visual_parity
from fastfsl.export.quantization import calibrate, quantize
from fastfsl.export.textual_graph import textual_graph, tokens_to_embedding
from fastfsl.export.visual_graph import visual_graph
from fastfsl.images import preprocess
from fastfsl.runtime.session import create_session
from tests.export.open_clip_families import FAMILIES, PREPROCESSING, family_folder, randomise

# The others take three seconds and more; what is particular to them is held by one of these, but for their own layers.
_FAST = ("openai-vit", "resnet")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    encoders: dict[str, Encoder] = {}

    def loaded(family):
        if family not in encoders:
            logging.getLogger().setLevel(logging.ERROR)  # open_clip says that there are no weights yet
            encoders[family] = load_encoder(family_folder(family, tmp_path_factory.mktemp(family)))
        return encoders[family]

    return loaded


def _open(model: bytes):
    return create_session(model, "a tower", device="cpu", num_threads=1)


def assert_text_matches(encoder):
    graph = textual_graph(encoder)
    assert graph.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    check_graph_file(graph.SerializeToString(), "text tower")
    session = _open(graph.SerializeToString())
    texts = ["a photo of a cat", "", "red kite", "word " * 99, "日本"]
    for batch in (1, 2, 5):
        ids = encoder.tokenizer(texts[-batch:])
        with torch.inference_mode():
            expected = tokens_to_embedding(encoder)(ids).numpy()
        np.testing.assert_allclose(session.run(None, {"token_ids": ids.numpy()})[0], expected, atol=1e-5)
        np.testing.assert_allclose(encoder.encode_texts(texts[-batch:]).numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "family", [family if family in _FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_image_and_text_tower_match_torch(load, family):
    encoder = load(family)
    graph = visual_graph(encoder)
    report = visual_parity(encoder, graph)
    assert report["batches"] == [1, 2, 5]
    check_graph_file(graph.SerializeToString(), "image tower")
    height, width = encoder.preprocessing.height, encoder.preprocessing.width
    pixels = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    int8, layers = quantize(graph, calibrate(graph, [{"images": pixels}], _open))
    assert layers
    check_graph_file(int8.SerializeToString(), "image tower in int8")
    expected, got = (_open(model.SerializeToString()).run(None, {"images": pixels})[0] for model in (graph, int8))
    assert (expected * got).sum(axis=1).min() > 0.99
    assert report["max_abs_error"] < 1e-5
    assert_text_matches(encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_prepared_as_the_family_wants_them(load, family):
    encoder = load(family)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    pixels = torch.from_numpy(preprocess(image, encoder.preprocessing)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(getattr(encoder.preprocessing, name)).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close((pixels - mean) / std, encoder.transform(image), atol=1e-6, rtol=0)
    wanted = PREPROCESSING.get(family, {"interpolation": "bicubic", "resize_mode": "shortest"})
    assert encoder.preprocessing.interpolation == wanted["interpolation"]
    assert encoder.preprocessing.resize_mode == wanted["resize_mode"]


class _Untraceable(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class _Untranslatable(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.mT).sum(dim=-1, keepdim=True) + x


@pytest.mark.parametrize("layer", [_Untraceable(), _Untranslatable()])
def test_a_layer_that_cannot_be_exported_is_named(load, layer):
    config = FAMILIES["openai-vit"]
    vision = {**config["vision_cfg"], "layers": 2}  # the last block is exported in another form
    model = open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"])
    model.visual.transformer.resblocks[0].mlp.c_fc = nn.Sequential(
        model.visual.transformer.resblocks[0].mlp.c_fc, layer
    )
    encoder = load("openai-vit")
    broken = Encoder(**{**vars(encoder), "model": model.eval()})
    name = rf"in the layer clip\.visual\.transformer\.resblocks\.0\.mlp\.c_fc\.1 \({type(layer).__name__}\)"
    with pytest.raises(BundleError, match=f"image tower of .* cannot be exported.* {name}"):
        visual_graph(broken)


def test_a_text_tower_beyond_two_gib_is_refused_at_once(load):
    encoder = load("openai-vit")
    clip = nn.Module()
    clip.visual = nn.Linear(2**15, 2**14 + 1, device="meta")
    clip.transformer = nn.Linear(2**15, 2**14 + 1, device="meta")
    with pytest.raises(BundleError, match=r"text tower of .* has 2\.0 GiB of weights"):
        textual_graph(Encoder(**{**vars(encoder), "model": clip}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16"])
def test_a_real_model_matches(tmp_path, name):
    torch.manual_seed(0)
    model = randomise(open_clip.create_model(name))
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    encoder = load_encoder(name, str(tmp_path / "vit.safetensors"))
    assert visual_parity(encoder, visual_graph(encoder))["min_cosine"] > 0.99999
    assert_text_matches(encoder)
