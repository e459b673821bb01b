"""Vision transformers taken apart: one view of open_clip's own towers and of timm's, on the same parameters.

A block is x <- x + s_1(W_o softmax(Q K^T / sqrt(d_h)) V), then x <- x + s_2(MLP(LN_2 x)), where Q, K, V are projections
of LN_1 x and s_1, s_2 the layer scales. Only three things are ever asked of it: all tokens, the one token that is read,
and the value stream, in which a token attends to nothing but itself.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from fastfsl.errors import ConfigError

_SUPPORTED = (
    "supported are open_clip's VisionTransformer of plain blocks with token or average pooling, and timm's "
    "VisionTransformer of plain blocks with token, average or map pooling (ViT-B-16, ViT-L-14, ViT-B-16-SigLIP, ...)"
)


class Block(nn.Module):
    """A transformer block, on the parameters of another library's.

    Args:
        norm_1: LayerNorm before the attention.
        in_weight: Packed projection (3w, width) to queries, keys and values, in that order.
        in_bias: Its bias (3w,), or None.
        num_heads: Attention heads.
        norm_q: Norm of each head's queries, Identity where there is none.
        norm_k: Norm of each head's keys.
        out: Projection of the attention's result.
        scale_1: Layer scale of the attention, Identity where there is none.
        norm_2: LayerNorm before the MLP.
        mlp: The MLP.
        scale_2: Layer scale of the MLP.
    """

    def __init__(
        self,
        *,
        norm_1: nn.Module,
        in_weight: nn.Parameter,
        in_bias: nn.Parameter | None,
        num_heads: int,
        norm_q: nn.Module,
        norm_k: nn.Module,
        out: nn.Module,
        scale_1: nn.Module,
        norm_2: nn.Module,
        mlp: nn.Module,
        scale_2: nn.Module,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm_1, norm_2
        self.in_weight, self.in_bias = in_weight, in_bias
        self.num_heads = num_heads
        self.norm_q, self.norm_k = norm_q, norm_k
        self.out, self.mlp = out, mlp
        self.scale_1, self.scale_2 = scale_1, scale_2

    def forward(self, x: Tensor) -> Tensor:
        """All tokens (n, T, width) to all tokens (n, T, width)."""
        query, key, value = self._heads(F.linear(self.norm_1(x), self.in_weight, self.in_bias), 3)
        return self._after_attention(x, self._mix(query, key, value))

    def read(self, x: Tensor) -> Tensor:
        """The first token (n, width) after the block: all (n, T, width) give keys and values, it alone a query."""
        width = self.in_weight.shape[0] // 3
        normed = self.norm_1(x)
        (query,) = self._heads(self._project(normed[:, :1], slice(width)), 1)
        key, value = self._heads(self._project(normed, slice(width, None)), 2)
        return self._after_attention(x[:, :1], self._mix(query, key, value))[:, 0]

    def value_stream(self, x: Tensor) -> Tensor:
        """Tokens (..., width), each by itself: v = x + s_1(W_o V(LN_1 x)), then v + s_2(MLP(LN_2 v))."""
        width = self.in_weight.shape[0] // 3
        return self._after_attention(x, self._project(self.norm_1(x), slice(2 * width, None)))

    def _project(self, normed: Tensor, rows: slice) -> Tensor:
        return F.linear(normed, self.in_weight[rows], None if self.in_bias is None else self.in_bias[rows])

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """(n, T, count * w) to `count` tensors (n, heads, T, w / heads)."""
        parts = projected.chunk(count, dim=-1)  # before the heads, so that the gradients of the parts meet in one copy
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.norm_q(query), self.norm_k(key), value)
        return mixed.transpose(1, 2).flatten(2)

    def _after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.scale_1(self.out(mixed))
        y: Tensor = x + self.scale_2(self.mlp(self.norm_2(x)))
        return y


class Head(nn.Module):
    """What follows the last block: norm, pooling to one token, a second norm where there is one, projection.

    Args:
        norm: Norm of every token, before the pooling.
        pool: Tokens (n, T, width) to (n, width). None reads the first token.
        norm_pooled: Norm after the pooling.
        projection: (..., width) to (..., d).
    """

    def __init__(self, norm: nn.Module, pool: nn.Module | None, norm_pooled: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.pool, self.norm_pooled, self.projection = norm, pool, norm_pooled, projection

    def feature(self, x: Tensor) -> Tensor:
        """Feature (n, d) of the token that is read (n, width), or of all tokens (n, T, width) where they are pooled."""
        x = self.norm(x)
        pooled: Tensor = self.projection(self.norm_pooled(x if self.pool is None else self.pool(x)))
        return pooled

    def feature_and_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (n, d), and every token (n, T, d) through norm and projection."""
        x = self.norm(x)
        tokens: Tensor = self.projection(self.norm_pooled(x))
        if self.pool is None:
            return tokens[:, 0], tokens
        return self.projection(self.norm_pooled(self.pool(x))), tokens


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision transformer, on its own parameters.

    Attributes:
        embed: Pixels (n, 3, height, width) to the tokens (n, T, width) that enter the first block.
        blocks: The blocks in order.
        head: What follows them.
    """

    embed: nn.Module
    blocks: tuple[Block, ...]
    head: Head


def take_apart(visual: nn.Module) -> Anatomy:
    """The parts of open_clip's visual tower.

    Args:
        visual: `model.visual` of an open_clip model.

    Raises:
        ConfigError: A tower of another kind; the message names its class and what is supported.
    """
    if type(visual) is VisionTransformer:
        return _take_apart_open_clip(visual)
    if type(visual) is TimmModel and type(visual.trunk) is TimmVisionTransformer:
        return _take_apart_timm(visual)
    raise _unsupported(visual.trunk if type(visual) is TimmModel else visual)


class _OpenClipEmbedding(nn.Module):
    """Patches, class token, positions, norm; without patch dropout."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.conv, self.norm = visual.conv1, visual.ln_pre
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x: Tensor = self.norm(torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype))
        return x


class _TimmEmbedding(nn.Module):
    """Patches, class and register tokens, positions, norm; without patch dropout."""

    def __init__(self, trunk: TimmVisionTransformer) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        trunk = self.trunk
        x: Tensor = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels)))  # noqa: SLF001  # it has no other name
        return x


class _Mean(nn.Module):
    """Mean of the tokens from number `first` on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first :].mean(dim=1)


class _Map(nn.Module):
    """Attention pooling of the tokens from number `first` on."""

    def __init__(self, pool: nn.Module, first: int) -> None:
        super().__init__()
        self.pool, self.first = pool, first

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x[:, self.first :])
        return pooled


class _Matrix(nn.Module):
    """x @ weight, weight (width, d)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _take_apart_open_clip(visual: VisionTransformer) -> Anatomy:
    if visual.attn_pool is not None or visual.pool_type not in {"tok", "avg"}:
        raise _unsupported(visual, "pools with an attentional pooler" if visual.attn_pool else "does not pool")
    blocks = []
    for block in visual.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or block.attn.in_proj_weight is None:
            raise _unsupported(visual, f"has blocks of the class {type(block).__name__}")
        blocks.append(
            Block(
                norm_1=block.ln_1,
                in_weight=block.attn.in_proj_weight,
                in_bias=block.attn.in_proj_bias,
                num_heads=block.attn.num_heads,
                norm_q=nn.Identity(),
                norm_k=nn.Identity(),
                out=block.attn.out_proj,
                scale_1=block.ls_1,
                norm_2=block.ln_2,
                mlp=block.mlp,
                scale_2=block.ls_2,
            )
        )
    norms = (nn.Identity(), visual.ln_post) if visual.final_ln_after_pool else (visual.ln_post, nn.Identity())
    pool = None if visual.pool_type == "tok" else _Mean(1)
    projection = nn.Identity() if visual.proj is None else _Matrix(visual.proj)
    return Anatomy(_OpenClipEmbedding(visual), tuple(blocks), Head(norms[0], pool, norms[1], projection))


def _take_apart_timm(visual: TimmModel) -> Anatomy:
    trunk = visual.trunk
    blocks = []
    for block in trunk.blocks:
        attention = getattr(block, "attn", block)
        if type(block) is not TimmBlock or type(attention) is not TimmAttention:
            raise _unsupported(trunk, f"has blocks {type(block).__name__} with {type(attention).__name__}")
        if attention.gate is not None or not isinstance(attention.norm, nn.Identity):
            raise _unsupported(trunk, "has a gate or a norm on its attention's result")
        blocks.append(
            Block(
                norm_1=block.norm1,
                in_weight=cast("nn.Parameter", attention.qkv.weight),
                in_bias=attention.qkv.bias,
                num_heads=attention.num_heads,
                norm_q=attention.q_norm,
                norm_k=attention.k_norm,
                out=attention.proj,
                scale_1=block.ls1,
                norm_2=block.norm2,
                mlp=block.mlp,
                scale_2=block.ls2,
            )
        )
    first = 0 if trunk.pool_include_prefix else trunk.num_prefix_tokens
    pool: nn.Module | None
    if trunk.global_pool == "token":
        pool = None
    elif trunk.global_pool == "avg":
        pool = _Mean(first)
    elif trunk.global_pool == "map":
        pool = _Map(trunk.attn_pool, first)
    else:
        raise _unsupported(trunk, f"pools by {trunk.global_pool!r}")
    head = Head(trunk.norm, pool, trunk.fc_norm, nn.Sequential(trunk.head, visual.head))
    return Anatomy(_TimmEmbedding(trunk), tuple(blocks), head)


def _unsupported(tower: object, reason: str = "") -> ConfigError:
    because = f" {reason}" if reason else ""
    return ConfigError(
        f"the visual tower {type(tower).__name__}{because}, which tuning cannot take apart: {_SUPPORTED}"
    )
