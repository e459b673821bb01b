"""Vision transformers taken apart give back what the library that owns them computes."""

from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn

from fastfsl.errors import ConfigError
from fastfsl.manifold.vit import take_apart


def _library_blocks(visual: Any) -> list[nn.Module]:
    trunk = getattr(visual, "trunk", None)
    return list(visual.transformer.resblocks if trunk is None else trunk.blocks)


def test_the_parts_together_are_the_tower(visual, pixels):
    anatomy = take_apart(visual)
    x = anatomy.embed(pixels(visual, 2))
    for block, original in zip(anatomy.blocks, _library_blocks(visual), strict=True):
        torch.testing.assert_close(block(x), original(x), rtol=1e-10, atol=1e-10)
        x = block(x)
    expected = visual(pixels(visual, 2))
    read = x[:, 0] if anatomy.head.pool is None else x
    torch.testing.assert_close(anatomy.head.feature(read), expected, rtol=1e-10, atol=1e-10)
    feature, tokens = anatomy.head.feature_and_tokens(x)
    torch.testing.assert_close(feature, expected, rtol=1e-10, atol=1e-10)
    assert tokens.shape == (*x.shape[:2], expected.shape[1])


def test_reading_one_token_gives_the_first_of_all(visual, pixels):
    anatomy = take_apart(visual)
    x = anatomy.embed(pixels(visual, 3))
    torch.testing.assert_close(anatomy.blocks[0].read(x), anatomy.blocks[0](x)[:, 0], rtol=1e-10, atol=1e-10)


def test_the_parts_are_the_towers_own_parameters(visual):
    anatomy = take_apart(visual)
    own = {id(parameter) for parameter in visual.parameters()}
    parts = [anatomy.embed, *anatomy.blocks, anatomy.head]
    assert {id(parameter) for part in parts for parameter in part.parameters()} == own


def test_queries_and_keys_are_normed_where_the_block_does(pixels):
    visual = TimmModel("test_vit", 24, pool="token", proj="linear").double().eval()
    visual.set_input_size(48)
    for block in visual.trunk.blocks:
        attention = type(block.attn)(64, num_heads=2, qkv_bias=False, qk_norm=True, norm_layer=nn.LayerNorm).double()
        nn.init.normal_(attention.q_norm.weight)
        nn.init.normal_(attention.k_norm.bias)
        block.attn = attention
    anatomy = take_apart(visual)
    x = anatomy.embed(pixels(visual, 2))
    torch.testing.assert_close(anatomy.blocks[0](x), visual.trunk.blocks[0](x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(anatomy.blocks[0].read(x), visual.trunk.blocks[0](x)[:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=32, width=8), "ModifiedResNet, which"),
        (lambda: TimmModel("test_convnext", 8, pool="avg", proj="linear"), "ConvNeXt, which"),
        (lambda: TimmModel("test_convnext", 8, image_size=64, pool="abs_attn", proj=""), "ConvNeXt, which"),
        (lambda: TimmModel("test_vit", 8, pool="max", proj="linear"), "VisionTransformer pools by 'max'"),
        (nn.Identity, "Identity, which"),
    ],
)
def test_other_towers_are_refused_by_name(tower, message):
    with pytest.raises(ConfigError, match=message) as caught:
        take_apart(tower())
    assert "supported are open_clip's VisionTransformer" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "with an attentional pooler"),
        ({"pool_type": "none"}, "does not pool"),
        ({"qk_norm": True}, "blocks of the class CustomResidualAttentionBlock"),
    ],
)
def test_options_that_change_the_plain_tower_are_refused(make_tower, options, message):
    with pytest.raises(ConfigError, match=message):
        take_apart(make_tower(**options))


@pytest.mark.parametrize("option", [{"gated": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}])
def test_attention_with_more_after_it_is_refused(option):
    visual = TimmModel("test_vit", 8, pool="token", proj="linear")
    visual.trunk.blocks[3].attn = type(visual.trunk.blocks[3].attn)(64, **option)
    with pytest.raises(ConfigError, match="a gate or a norm on its attention's result"):
        take_apart(visual)


def test_blocks_of_another_class_are_refused():
    visual = TimmModel("test_vit", 8, pool="token", proj="linear")
    visual.trunk.blocks[1] = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="has blocks Linear"):
        take_apart(visual)
