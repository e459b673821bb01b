"""Only the class token of the last block: a tower that pools by it throws the other tokens of that block away."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from fastfsl.export.attention import packed_attention


class _LastBlock(nn.Module):
    """A residual block for its first token alone: keys and values of all tokens (n, T, width), out (n, 1, width)."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.block = block
        # Slices of one matrix would be operators of the graph, and no constants that can be quantised.
        width, weight, bias = block.attn.embed_dim, block.attn.in_proj_weight, block.attn.in_proj_bias
        self.query = _linear(weight[:width], bias[:width])
        self.key_and_value = _linear(weight[width:], bias[width:])

    def forward(self, tokens: Tensor, attn_mask: None = None) -> Tensor:  # noqa: ARG002  # open_clip passes it by name
        block, attention = self.block, packed_attention(self.block.attn)
        normed = block.ln_1(tokens)
        parts = (self.query(normed[:, :1]), *self.key_and_value(normed).chunk(2, dim=-1))
        heads = [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        token = tokens[:, :1] + block.ls_1(attention.out_proj(mixed))
        out: Tensor = token + block.ls_2(block.mlp(block.ln_2(token)))
        return out


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer


@contextlib.contextmanager
def class_token_alone(tower: nn.Module) -> Iterator[None]:
    """Within the block, an image tower leaves out what its class token does not need; then it is as it was.

    Of open_clip's own vision transformers that pool by the class token the last block gets one query instead of T,
    which saves three quarters of that block. Any other tower is left alone.
    """
    if not _has_class_token(tower):
        yield
        return
    visual: Any = tower
    blocks = visual.transformer.resblocks
    last = blocks[-1]
    blocks[-1] = _LastBlock(last)
    try:
        yield
    finally:
        blocks[-1] = last


def _has_class_token(tower: nn.Module) -> bool:
    visual: Any = tower  # of a module, any attribute is a tensor or a module to the type checker
    return (
        type(tower) is VisionTransformer
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        and type(visual.transformer) is Transformer
        and visual.transformer.batch_first
        and len(visual.transformer.resblocks) > 0
        and type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock
        and not hasattr(visual.transformer.resblocks[-1], "ln_1_kv")
        and type(visual.transformer.resblocks[-1].attn) is nn.MultiheadAttention
        and _is_packed(visual.transformer.resblocks[-1].attn)
    )


def _is_packed(attention: Any) -> bool:  # noqa: ANN401 - torch says that there always is a weight; there is not
    return attention.in_proj_weight is not None and attention.in_proj_bias is not None
