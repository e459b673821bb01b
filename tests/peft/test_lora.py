"""CLIP-LoRA: what it computes, what it trains, and the encoder it is merged into."""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastfsl.encoders import class_embeddings, weights_digest
from fastfsl.errors import ConfigError
from fastfsl.peft import CLIPLoRA

NAMES = ("tabby_cat", "dog", "a far longer name of something than the others have, cut to the context of the tower")
TEMPLATES = ("a photo of a {}.", "{} texture.")
# alpha / √rank of the default, 1 and 2
SCALE = 2**-0.5
TIMM = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"}


def with_updates(source, model, scale=SCALE):
    """A copy of the model whose packed weights are W + scale · B A, read from the source's state."""
    reference = copy.deepcopy(model)
    state = source.state()
    for name in state:
        if not name.endswith(".A"):
            continue
        path = name.removeprefix("clip.").removesuffix(".update.A")
        parent = reference.get_submodule(path.removesuffix(".qkv"))
        packed = parent.in_proj_weight if hasattr(parent, "in_proj_weight") else parent.qkv.weight
        rows = len(packed) // 3
        for part, (a, b) in enumerate(zip(state[name], state[name.removesuffix("A") + "B"], strict=True)):
            packed.data[part * rows : (part + 1) * rows] += scale * torch.from_numpy(b @ a)
    return reference


def images_of(source, pixels):
    return source(pixels[:, None], 0.0)[0]["features"]


def texts_of(model, tokenizer):
    texts = F.normalize(
        model.encode_text(tokenizer([t.format(n.replace("_", " ")) for n in NAMES for t in TEMPLATES])), dim=-1
    )
    return F.normalize(texts.reshape(3, 2, -1).mean(1), dim=-1)


def test_starts_at_the_frozen_model(text_form, pixels):
    source = CLIPLoRA(text_form, NAMES, TEMPLATES)
    assert any(array.any() for name, array in source.state().items() if name.endswith("A"))
    torch.testing.assert_close(images_of(source, pixels), text_form.encode_images(pixels))  # dropout sees only zeros
    expected = torch.from_numpy(class_embeddings(text_form, NAMES, TEMPLATES))
    torch.testing.assert_close(torch.from_numpy(source.class_embeddings()), expected)


def test_computes_w_plus_scaled_b_a(text_form, pixels, randomised):
    source = randomised(CLIPLoRA(text_form, NAMES, TEMPLATES)).eval()
    reference = with_updates(source, text_form.model)
    with torch.no_grad():
        images, texts = F.normalize(reference.encode_image(pixels), dim=-1), texts_of(reference, text_form.tokenizer)
        assert not torch.allclose(images, text_form.encode_images(pixels), atol=0.1)
        torch.testing.assert_close(images_of(source, pixels), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(source.text_features(), texts, rtol=0, atol=1e-5)
    merged = source.tuned_encoder()
    torch.testing.assert_close(merged.encode_images(pixels), images, rtol=0, atol=1e-5)
    again = torch.from_numpy(class_embeddings(merged, NAMES, TEMPLATES))
    torch.testing.assert_close(torch.from_numpy(source.class_embeddings()), again, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scaling", "power"), [("sqrt-rank", 0.5), ("rank", 1.0)])
@pytest.mark.parametrize("rank", [2, 4, 16])
def test_logits_are_those_of_w_plus_alpha_over_root_rank_b_a(toy_encoder, randomised, rank, scaling, power):
    """In float64, to 1e-12: the update's factor is alpha / √rank as in the released code, or alpha / rank if asked."""
    encoder, alpha = toy_encoder(), 1.5
    encoder.model.double()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {} if scaling == "sqrt-rank" else {"scaling": scaling}  # the default is the published one
    source = randomised(CLIPLoRA(encoder, NAMES, TEMPLATES, rank=rank, alpha=alpha, **options), std=0.2).eval()
    reference = with_updates(source, encoder.model, alpha / rank**power)
    merged = source.tuned_encoder().model
    with torch.no_grad():
        texts = texts_of(reference, encoder.tokenizer)
        expected = 10 * F.normalize(reference.encode_image(pixels), dim=-1) @ texts.T
        again = 10 * F.normalize(merged.encode_image(pixels), dim=-1) @ texts_of(merged, encoder.tokenizer).T
        found = source.logits(source(pixels[:, None], 0.0)[0])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
    frozen = 10 * F.normalize(encoder.model.encode_image(pixels), dim=-1) @ texts_of(encoder.model, encoder.tokenizer).T
    assert (frozen - expected).abs().max() > 0.1


def test_tunes_timm_trunks(toy_encoder, randomised):
    encoder = toy_encoder({}, TIMM)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    source = randomised(CLIPLoRA(encoder, NAMES, TEMPLATES, towers=("visual",))).eval()
    with torch.no_grad():
        images = F.normalize(with_updates(source, encoder.model).encode_image(pixels), dim=-1)
        assert not torch.allclose(images, encoder.encode_images(pixels), atol=0.01)
        torch.testing.assert_close(images_of(source, pixels), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(source.tuned_encoder().encode_images(pixels), images, rtol=0, atol=1e-5)
    assert type(source.tuned_encoder().model.visual.trunk.blocks[0].attn.qkv) is torch.nn.Linear


def test_merged_model_is_an_ordinary_one_and_the_given_one_is_unchanged(toy, randomised):
    before = toy.digest
    source = randomised(CLIPLoRA(toy, NAMES, TEMPLATES))
    merged = source.tuned_encoder()
    assert [type(m) for m in merged.model.modules()] == [type(m) for m in toy.model.modules()]
    assert weights_digest(toy.model, {}) == before
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())
    assert len({before, merged.digest, CLIPLoRA(toy, NAMES, TEMPLATES).tuned_encoder().digest}) == 3
    assert source.tuned_encoder().digest == merged.digest


@pytest.mark.parametrize("towers", [("visual", "text"), ("visual",), ("text",)])
def test_gradients_reach_exactly_the_updates(toy, pixels, randomised, towers):
    source = randomised(CLIPLoRA(toy, NAMES, TEMPLATES, towers=towers))
    outputs, own = source(pixels[:, None], 0.0)
    assert own is None
    source.batch_loss(outputs, torch.tensor([0, 1, 2]), 0.0)[0].backward()
    reached = {
        name for name, parameter in source.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == set(source.state())
    blocks = {"visual": "clip.visual.transformer.resblocks.", "text": "clip.transformer.resblocks."}
    expected = {f"{blocks[t]}{block}.attn.qkv.update.{m}" for t in towers for block in range(2) for m in "AB"}
    assert reached == expected


def test_gradients_are_those_of_the_merged_weights(toy, pixels, randomised):
    """dL/dB = scale · (dL/dW) Aᵀ and dL/dA = scale · Bᵀ (dL/dW), with autograd on the plain model for dL/dW."""
    source = randomised(CLIPLoRA(toy, NAMES, TEMPLATES)).eval()
    target = torch.tensor([0, 1, 2])
    loss, parts = source.batch_loss(source(pixels[:, None], 0.0)[0], target, 0.0)
    loss.backward()
    plain = with_updates(source, toy.model).requires_grad_(True)
    cosines = F.normalize(plain.encode_image(pixels), dim=-1) @ texts_of(plain, toy.tokenizer).T
    expected = F.cross_entropy(10 * cosines, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert parts == {"cross_entropy": pytest.approx(float(expected.detach()), rel=1e-5)}
    for path, update in source.updates.items():
        gradient = plain.get_submodule(path).in_proj_weight.grad.unflatten(0, (3, -1))
        torch.testing.assert_close(update.B.grad, SCALE * gradient @ update.A.mT, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(update.A.grad, SCALE * update.B.mT @ gradient, rtol=1e-3, atol=1e-5)


def test_dropout_is_on_the_updates_input_alone(toy, randomised):
    source = randomised(CLIPLoRA(toy, NAMES, TEMPLATES, dropout=0.5))
    assert {type(m) for m in source.clip.modules() if m.training} == {
        torch.nn.Dropout,
        type(next(iter(source.updates.values()))),
    }
    update = next(iter(source.updates.values()))
    x = torch.ones(4000, 64)
    torch.manual_seed(0)
    dropped = update(x).unflatten(-1, (3, -1))
    torch.testing.assert_close(dropped.mean(0).flatten(), update.eval()(x[0]), rtol=0.1, atol=0.2)
    spread = (dropped - dropped.mean(0)).flatten(1).T.cov().unflatten(0, (3, -1)).unflatten(-1, (3, -1))
    assert spread[0, :, 0].abs().mean() > 10 * spread[0, :, 1].abs().mean()  # q, k and v have masks of their own
    embeddings = source.class_embeddings()
    assert source.training
    assert update.training
    assert not any(module.training for module in source.eval().modules())
    assert np.array_equal(embeddings, source.class_embeddings())


def test_several_passes_of_the_text_tower_change_nothing(toy, pixels, randomised, monkeypatch):
    source = randomised(CLIPLoRA(toy, NAMES, TEMPLATES, dropout=0.0))
    gradients = []
    for tokens in (8192, 40):
        monkeypatch.setattr("fastfsl.peft.text_tower.TOKENS_PER_PASS", tokens)
        source.zero_grad()
        source.batch_loss(source(pixels[:, None], 0.0)[0], torch.tensor([0, 1, 2]), 0.0)[0].backward()
        gradients.append([parameter.grad for parameter in source.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


def test_trains_92160_numbers_a_rank_on_vit_b_16(toy, toy_encoder):
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).requires_grad_(False)
    encoder = toy_encoder()
    encoder.model, encoder.device, encoder.embed_dim = model, torch.device("meta"), 512
    for rank in (2, 4, 16):
        assert CLIPLoRA(encoder, NAMES, TEMPLATES, rank=rank).num_parameters == 92160 * rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"scaling": "root"}, "scaling 'sqrt-rank' or 'rank', got 'root'"),
        ({"towers": ()}, "towers"),
        ({"towers": ("image",)}, "towers"),
    ],
)
def test_refuses_settings_that_make_no_sense(toy, options, message):
    with pytest.raises(ConfigError, match=message):
        CLIPLoRA(toy, NAMES, TEMPLATES, **options)


def test_refuses_towers_without_such_attention(toy_encoder):
    resnet = toy_encoder(vision={"layers": (1, 1, 1, 1), "head_width": 8, "image_size": 64})
    with pytest.raises(ConfigError, match=r"visual tower of toy .* fused qkv"):
        CLIPLoRA(resnet, NAMES, TEMPLATES)
    assert CLIPLoRA(resnet, NAMES, TEMPLATES, towers=("text",)).num_parameters == 2 * 3 * 2 * 32 * 2
