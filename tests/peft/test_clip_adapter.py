"""CLIP-Adapter: its formula, by hand, and the encoder with the adapter inside."""

import numpy as np
import pytest
import torch

from fastfsl.errors import ConfigError, ShapeError
from fastfsl.peft import CLIPAdapter


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_hand(source, features, ratio):
    first, second = source.state().values()
    hidden = np.maximum(features @ first.T, 0)
    return unit(ratio * np.maximum(hidden @ second.T, 0) + (1 - ratio) * features)


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_formula_by_hand(toy, features, randomised, ratio):
    texts = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).numpy()
    source = randomised(CLIPAdapter(toy, texts, ratio=ratio))
    outputs, _ = source(features[:, None], 0.0)
    expected = by_hand(source, features.numpy(), ratio)
    np.testing.assert_allclose(outputs["features"].detach(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(source.logits(outputs).detach(), 10 * expected @ unit(texts).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(source.class_embeddings(), unit(texts), rtol=0, atol=1e-6)


def test_tuned_encoder_adapts_its_features(toy, pixels, randomised):
    texts = np.eye(32)[:3]
    source = randomised(CLIPAdapter(toy, texts))
    tuned = source.tuned_encoder()
    expected = by_hand(source, toy.encode_images(pixels).numpy(), 0.2)
    np.testing.assert_allclose(tuned.encode_images(pixels), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tuned.encode_texts(["a cat"]), toy.encode_texts(["a cat"]))
    randomised(source, std=1.0)
    np.testing.assert_allclose(tuned.encode_images(pixels), expected, rtol=0, atol=1e-6)  # it has its own copy
    other_ratio = CLIPAdapter(toy, texts, ratio=0.3)
    other_ratio.load_state(source.state())
    digests = {encoder.digest for encoder in (toy, tuned, source.tuned_encoder(), other_ratio.tuned_encoder())}
    assert len(digests) == 4


def test_size(toy):
    assert CLIPAdapter(toy, np.eye(32)[:3]).num_parameters == 2 * 32 * 8
    assert CLIPAdapter(toy, np.eye(32)[:3], reduction=2).num_parameters == 2 * 32 * 16


def test_refuses_what_makes_no_sense(toy):
    texts = np.eye(32)[:3]
    for options in ({"ratio": 0.0}, {"ratio": 1.1}, {"reduction": 0}, {"reduction": 33}):
        with pytest.raises(ConfigError, match="ratio <= 1 and 1 <= reduction <= 32"):
            CLIPAdapter(toy, texts, **options)
    with pytest.raises(ShapeError, match=r"\(n, 32\)"):
        CLIPAdapter(toy, texts[:, :31])
