"""open_clip's text towers from token embeddings: the same features as from the tokens."""

import pytest
import torch
import torch.nn.functional as F

from fastfsl.errors import ConfigError
from fastfsl.peft import CLIPLoRA, CoOp
from fastfsl.peft.text_tower import TextTower, read_prompts

PROMPTS = ["a cat", "a photo of a small dog.", "x"]


def test_reads_prompts_as_the_model_does(text_form):
    embeddings, positions = read_prompts(text_form.model, text_form.tokenizer(PROMPTS))
    features = F.normalize(TextTower(text_form.model)(embeddings, positions), dim=-1)
    torch.testing.assert_close(features, text_form.encode_texts(PROMPTS), rtol=0, atol=1e-6)


def test_leaves_out_padding_that_nothing_sees(toy, toy_encoder):
    tokens = toy.tokenizer(PROMPTS)
    assert read_prompts(toy.model, tokens)[0].shape == (3, 9, 32)  # start, 7 tokens, end
    bidirectional = toy_encoder({"no_causal_mask": True})
    assert read_prompts(bidirectional.model, tokens)[0].shape == (3, 16, 32)


def test_other_towers_are_refused_by_name(toy_encoder):
    transformers_like = toy_encoder({})
    transformers_like.model.text = torch.nn.Linear(2, 2)
    for encoder in (toy_encoder({"embed_cls": True}), toy_encoder({"pool_type": "none"}), transformers_like):
        for make in (CoOp, lambda encoder, names: CLIPLoRA(encoder, names, "{}")):
            with pytest.raises(ConfigError, match=r"expected a text tower .* got (TextTransformer|Linear) of Custom"):
                make(encoder, ("cat", "dog"))
    frozen_text = CLIPLoRA(toy_encoder({"embed_cls": True}), ("a", "b"), "{}", towers=("visual",))
    assert frozen_text.num_parameters == 2 * 3 * 2 * 64 * 2
