"""Fused graphs: the same function as torch's, from the operators that were meant, whatever the tower."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from torch import nn

from fastfsl.encoders import load_encoder
from fastfsl.export.attention import attention_operators, plain_attention
from fastfsl.export.fusion import fuse
from fastfsl.export.torch_export import TRACED_BATCH, to_onnx
from fastfsl.export.visual_graph import visual_graph
from fastfsl.runtime.session import create_session

RNG = np.random.default_rng(0)


def run(model, **feed):
    return create_session(model.SerializeToString(), "test", device="cpu").run(None, feed)[0]


@pytest.fixture(scope="module")
def tiny():
    return visual_graph(load_encoder("tiny-clip"))


def test_a_vision_transformer_has_no_operator_that_is_not_needed(tiny):
    kinds = Counter(node.op_type for node in tiny.graph.node)
    assert kinds["Attention"] == 5
    assert kinds["Softmax"] == 1  # of the last block, where the class token alone asks
    assert kinds["Gelu"] == 6
    assert kinds["LayerNormalization"] == 2 * 6 + 2
    assert kinds["Transpose"] == 4 + 1  # the last block's queries, keys, values and what comes out; the patches
    assert not {"Conv", "Erf", "Squeeze", "Unsqueeze"} & kinds.keys()
    onnx.checker.check_model(tiny)


class _Stem(nn.Module):
    """Pixels through a convolution to tokens."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, **options)

    def forward(self, images):
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.3, 0.2, 0.25]).view(1, 3, 1, 1)
        pixels = (images.permute(0, 3, 1, 2).to(torch.float32) / 255.0 - mean) / std
        return self.conv(pixels).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("options", "product"),
    [
        ({"kernel_size": 4, "stride": 4}, True),
        ({"kernel_size": (2, 4), "stride": (2, 4), "bias": False}, True),
        ({"kernel_size": 5, "stride": 5}, False),  # 16 is no multiple of 5: pixels are left over
        ({"kernel_size": 4, "stride": 2}, False),
        ({"kernel_size": 4, "stride": 4, "padding": 2}, False),
    ],
)
def test_only_patches_that_tile_the_image_become_a_product(options, product):
    torch.manual_seed(0)
    stem = _Stem(**options).eval()
    images = torch.zeros(TRACED_BATCH, 16, 16, 3, dtype=torch.uint8)
    fused = fuse(to_onnx(stem, {"images": images}, "tokens", "stem"))
    assert ("Conv" not in {node.op_type for node in fused.graph.node}) == product
    pixels = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    expected = stem(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(run(fused, images=pixels), expected, atol=1e-5)


class _Masked(nn.Module):
    """Attention with a mask of any kind."""

    def __init__(self, mask, *, is_causal=False):
        super().__init__()
        self.mask, self.is_causal = mask, is_causal

    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(
            heads, 0.5 * heads, heads + 1, attn_mask=self.mask, is_causal=self.is_causal, scale=0.7
        )


_ALLOWED = torch.ones(6, 6).tril().bool()


@pytest.mark.parametrize(
    "attention",
    [
        _Masked(None),
        _Masked(None, is_causal=True),
        _Masked(_ALLOWED),
        _Masked(torch.zeros(6, 6).masked_fill(~_ALLOWED, -torch.inf)),
    ],
    ids=["plain", "causal", "boolean", "added"],
)
def test_attention_with_a_mask_is_torchs(attention):
    x = torch.randn(TRACED_BATCH, 6, 8, generator=torch.Generator().manual_seed(0))
    model = to_onnx(attention.eval(), {"x": x}, "mixed", "attention")
    np.testing.assert_allclose(run(model, x=x.numpy()), attention(x).numpy(), atol=1e-6)


class _SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as towers call it."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
        if bias:  # zeros, as torch makes it
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_a_mask_is_one_operator(bias):
    torch.manual_seed(0)
    layer = _SelfAttention(bias=bias).eval()
    model = to_onnx(layer, {"x": torch.zeros(TRACED_BATCH, 6, 8)}, "mixed", "attention")
    assert ("Attention" in {node.op_type for node in model.graph.node}) == bias  # which needs one
    x = torch.randn(3, 6, 8)
    np.testing.assert_allclose(run(model, x=x.numpy()), layer(x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "one"),
    [({"qkv_bias": True}, True), ({"qkv_bias": False}, False), ({"qkv_bias": True, "qk_norm": True}, False)],
)
def test_timms_attention_is_one_operator_where_it_is_plain(options, one):
    torch.manual_seed(0)
    layer = nn.Sequential(TimmAttention(8, num_heads=2, norm_layer=nn.LayerNorm, **options)).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model = to_onnx(layer, {"input": torch.zeros(TRACED_BATCH, 6, 8)}, "mixed", "attention")
    assert ("Attention" in {node.op_type for node in model.graph.node}) == one
    x = torch.randn(3, 6, 8)
    np.testing.assert_allclose(run(model, input=x.numpy()), layer(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert type(layer[0]) is TimmAttention
    mask = torch.ones(6, 6).tril().bool()
    masked = layer[0](x, attn_mask=mask)
    with plain_attention(layer):
        assert (type(layer[0]) is TimmAttention) != one
        torch.testing.assert_close(layer[0](x, attn_mask=mask), masked)


def test_attention_layers_are_as_they_were_after_an_export():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    holder: Any = nn.Sequential(nn.Sequential(layer)).eval()
    x = torch.randn(3, 5, 8)
    boolean = ~torch.ones(5, 5).tril().bool()
    for mask in (boolean, torch.zeros(5, 5).masked_fill(boolean, -torch.inf)):
        expected = layer(x, x, x, need_weights=False, attn_mask=mask)[0]
        with plain_attention(holder):
            replaced = holder[0][0]
            assert replaced is not layer
            torch.testing.assert_close(replaced(x, x, x, need_weights=False, attn_mask=mask)[0], expected)
            torch.testing.assert_close(replaced(x, x[:, :2], x[:, :2])[0], layer(x, x[:, :2], x[:, :2])[0])
    assert holder[0][0] is layer


def test_grouped_queries_are_refused():
    nothing: Any = None
    with pytest.raises(NotImplementedError, match="fewer heads"):
        attention_operators(nothing, nothing, nothing, enable_gqa=True)
