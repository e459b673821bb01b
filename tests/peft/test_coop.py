"""CoOp and CoCoOp: their prompts, against tokens whose embeddings are the context, and their gradients."""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastfsl.encoders import class_embeddings
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.peft import CoCoOp, CoOp

LONG = "a far longer name of something than the others have and cut to the context of the tower"
NAMES = ("tabby_cat", "dog", LONG)


def texts_with_context(encoder, context, names=NAMES):
    """Class embeddings of "v_1 ... v_M name.": words that the vectors are put in for in a copy's vocabulary."""
    model = copy.deepcopy(encoder.model)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"][: len(context)]
    table = (model if hasattr(model, "token_embedding") else model.text).token_embedding.weight
    for word, vector in zip(words, context, strict=True):
        table.data[encoder.tokenizer.encode(word)] = vector
    prompts = [f"{' '.join(words)} {name.replace('_', ' ')}." for name in names]
    with torch.no_grad():
        return F.normalize(model.encode_text(encoder.tokenizer(prompts)), dim=-1)


def test_coop_reads_its_context_in_place_of_words(text_form, features, randomised):
    source = randomised(CoOp(text_form, NAMES, num_contexts=5))
    expected = texts_with_context(text_form, source.prompts.context.detach())
    np.testing.assert_allclose(source.class_embeddings(), expected, rtol=0, atol=1e-5)
    outputs, _ = source(7 * features[:, None], 0.0)
    np.testing.assert_allclose(source.logits(outputs).detach(), 10 * features @ expected.T, rtol=0, atol=1e-4)
    plain = class_embeddings(text_form, NAMES, "{}.")
    assert np.abs(plain - expected.numpy()).max() > 0.01


def test_coop_starts_from_a_phrase(text_form):
    source = CoOp(text_form, NAMES, num_contexts=4, init="a photo of a")
    expected = class_embeddings(text_form, NAMES, "a photo of a {}.")
    np.testing.assert_allclose(source.class_embeddings(), expected, rtol=0, atol=1e-6)
    assert source.tuned_encoder() is text_form


def test_coop_starts_from_noise(toy):
    torch.manual_seed(0)
    first, second = CoOp(toy, NAMES, num_contexts=8), CoOp(toy, NAMES, num_contexts=8)
    (context,) = first.state().values()
    assert context.shape == (8, 32)
    assert context.std() == pytest.approx(0.02, rel=0.2)
    assert not np.array_equal(context, second.state()["prompts.context"])


def test_coop_in_several_passes(toy, features, randomised, monkeypatch):
    source, labels = randomised(CoOp(toy, NAMES, num_contexts=4)), torch.tensor([0, 1, 2, 2, 1, 0])
    gradients, read = [], []
    for tokens in (8192, 16):
        monkeypatch.setattr("fastfsl.peft.text_tower.TOKENS_PER_PASS", tokens)
        source.zero_grad()
        source.batch_loss(source(features[:, None], 0.0)[0], labels, 0.0)[0].backward()
        gradients.append(source.prompts.context.grad.clone())
        source.prompts.tower.transformer.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    torch.testing.assert_close(*gradients)
    assert read == [1] * 6  # each class alone, and again for the gradient


def test_coop_gradient_by_finite_differences(toy, features, randomised):
    source = randomised(CoOp(toy, NAMES, num_contexts=3)).double()
    context, labels = source.prompts.context, torch.tensor([0, 1, 2, 2, 1, 0])

    def loss():
        return source.batch_loss(source(features.double()[:, None], 0.0)[0], labels, 0.0)[0]

    loss().backward()
    direction = torch.randn(context.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        context += 1e-6 * direction
        above = loss()
        context -= 2e-6 * direction
        below = loss()
    assert float((context.grad * direction).sum()) == pytest.approx(float(above - below) / 2e-6, rel=1e-6)


def logits_by_hand(source, encoder, features):
    """Image by image: context + W2 ReLU(W1 f + b1) + b2, the texts of that context, scaled cosines."""
    state = source.state()
    w_1, b_1, w_2, b_2 = (state[f"meta_net.{layer}.{part}"] for layer in (0, 2) for part in ("weight", "bias"))
    texts = []
    for row in features.numpy():
        shift = w_2 @ np.maximum(w_1 @ row + b_1, 0) + b_2
        texts.append(texts_with_context(encoder, torch.from_numpy(state["prompts.context"] + shift)))
    conditional = torch.stack(texts)
    return 10 * torch.einsum("nd,ncd->nc", features, conditional), F.normalize(conditional.mean(0), dim=-1)


def test_cocoop_reads_a_context_of_every_image(text_form, features, randomised):
    source = randomised(CoCoOp(text_form, NAMES))
    logits, mean = logits_by_hand(source, text_form, features)
    assert (logits - logits.roll(1, 0)).abs().max() > 0.1
    np.testing.assert_allclose(source(7 * features[:, None], 0.0)[0]["logits"].detach(), logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(source.conditional_logits(7 * features.numpy()), logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(source.class_embeddings(7 * features.numpy()), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 60, 100])
def test_cocoop_in_passes_of_bounded_size(toy, features, randomised, monkeypatch, tokens):
    source = randomised(CoCoOp(toy, NAMES), std=0.2)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])

    def results():
        source.zero_grad()
        outputs, _ = source(features[:, None], 0.0)
        source.batch_loss(outputs, labels, 0.0)[0].backward()
        embeddings = torch.from_numpy(source.class_embeddings(features.numpy()))
        return outputs["logits"], embeddings, *(p.grad.clone() for p in source.parameters() if p.requires_grad)

    at_once = results()
    monkeypatch.setattr("fastfsl.peft.cocoop.TOKENS_PER_PASS", tokens)
    read = []
    source.prompts.tower.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    torch.testing.assert_close(at_once, results())
    assert max(read) <= tokens
    # Once forward, once again for the gradient instead of keeping it all, once for the class embeddings.
    assert len(read) == 3 * -(-18 // (tokens // 16)) > 3


def test_cocoop_loss_of_a_batch_is_the_mean_of_its_images(toy, features, randomised):
    source, labels = randomised(CoCoOp(toy, NAMES)), torch.tensor([0, 1, 2, 2, 1, 0])
    losses = [
        source.batch_loss(source(rows[:, None], 0.0)[0], label, 0.0)[0]
        for rows, label in ((features, labels), *zip(features.split(1), labels.split(1), strict=True))
    ]
    torch.testing.assert_close(losses[0], torch.stack(losses[1:]).mean())


def test_sizes_on_vit_b_16(toy_encoder):
    encoder = toy_encoder()
    with torch.device("meta"):
        encoder.model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).requires_grad_(False)
    encoder.device, encoder.embed_dim = torch.device("meta"), 512
    assert CoOp(encoder, NAMES).num_parameters == 8192
    assert CoCoOp(encoder, NAMES).num_parameters == 4 * 512 + 512 * 32 + 32 + 32 * 512 + 512


def test_refuses_contexts_that_do_not_fit(toy):
    for num_contexts in (0, 14):
        with pytest.raises(ConfigError, match=r"num_contexts 1..13 \(toy reads 16 tokens\)"):
            CoOp(toy, NAMES, num_contexts=num_contexts)
    assert np.isfinite(CoOp(toy, NAMES, num_contexts=13).class_embeddings()).all()
    with pytest.raises(ConfigError, match="of 4: set num_contexts to 4"):
        CoOp(toy, NAMES, num_contexts=5, init="a photo of a")
    with pytest.raises(ConfigError, match="of 0"):
        CoOp(toy, NAMES, num_contexts=5, init="")
    with pytest.raises(ConfigError, match="of 14"):
        CoOp(toy, NAMES, num_contexts=5, init="a photo " * 50)
    with pytest.raises(DataError, match="no word"):
        CoOp(toy, ("cat", "_"), num_contexts=2)
    with pytest.raises(ShapeError, match=r"\(n, 32\)"):
        CoCoOp(toy, NAMES).conditional_logits(np.ones((2, 31)))
