"""Attention as one operator where ONNX Runtime has it, else as few plain ones, with nothing copied that need not be.

torch's own translation moves every query, key and value through half a dozen reshapes and transposes of its own and of
`nn.MultiheadAttention`'s. A layer without a mask is ONNX Runtime's Attention, the projection to queries, keys and
values included, which has an int8 form (QAttention). Elsewhere the operators are those of the ONNX standard.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnxscript import opset18
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

# While torch exports, these take and give onnx_ir's values; their annotations are of another use.
op: Any = opset18


class _PlainAttention(nn.Module):
    """`nn.MultiheadAttention` in evaluation, on its parameters, (n, T, width) in and out; of the weights none."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        # Transposed, as Attention takes it: a transposition would be an operator of the graph, and no constant.
        self.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().T.contiguous(), requires_grad=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        **options: Tensor | bool | None,
    ) -> tuple[Tensor, Tensor | None]:
        attention: Any = self.attention  # to the type checker it cannot be without a bias
        if query is not key or key is not value or options.get("key_padding_mask") is not None:
            theirs: tuple[Tensor, Tensor | None] = attention(query, key, value, attn_mask=attn_mask, **options)
            return theirs
        if attn_mask is None and attention.in_proj_bias is not None:
            mixed = _one_operator(query, self.in_proj_weight, attention.in_proj_bias, attention.num_heads)
            return attention.out_proj(mixed), None
        packed = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
        heads = [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1)]
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # True forbids here, and allows there
            attn_mask = ~attn_mask
        if attn_mask is not None and attn_mask.ndim == 3:  # one for each head of each sample, as CoCa's text tower has
            attn_mask = attn_mask.unflatten(0, (-1, attention.num_heads))
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask)
        projected: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected, None


class _PlainTimmAttention(nn.Module):
    """timm's attention in evaluation, on its parameters, (n, T, width) in and out."""

    def __init__(self, attention: TimmAttention) -> None:
        super().__init__()
        self.attention = attention
        self.qkv_weight = nn.Parameter(attention.qkv.weight.detach().T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: bool) -> Tensor:
        attention = self.attention
        if attn_mask is not None or any(options.values()):
            masked: Tensor = attention(x, attn_mask=attn_mask, **options)
            return masked
        projected: Tensor = attention.proj(_one_operator(x, self.qkv_weight, attention.qkv.bias, attention.num_heads))
        return projected


def _one_operator(tokens: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with (Q, K, V) = tokens weight + bias, (n, T, width); computes nothing in torch."""
    options: dict[str, Any] = {"dtype": tokens.dtype, "shape": tokens.shape, "version": 1}
    return torch.onnx.ops.symbolic(
        "com.microsoft::Attention", (tokens, weight, bias), {"num_heads": num_heads}, **options
    )


@contextlib.contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Within the block, the attention layers of a module are such as are exported well; then they are as they were."""
    replaced: dict[str, nn.Module] = {}
    try:
        for name, layer in list(module.named_modules()):
            made = _made_plain(layer)
            if made is not None:
                replaced[name] = layer
                module.set_submodule(name, made)
        yield
    finally:
        for name, layer in replaced.items():
            module.set_submodule(name, layer)


def packed_attention(layer: nn.Module) -> nn.MultiheadAttention:
    """torch's own attention layer, which `plain_attention` may have put into another."""
    return layer.attention if isinstance(layer, _PlainAttention) else layer  # type: ignore[return-value]


def _made_plain(layer: nn.Module) -> nn.Module | None:
    """What takes the place of a layer, or None."""
    part: Any = layer  # to the type checker a module's options cannot be missing
    if type(layer) is nn.MultiheadAttention:
        plain = part.in_proj_weight is not None and part.batch_first and part.bias_k is None and not part.add_zero_attn
        return _PlainAttention(layer) if plain else None
    if type(layer) is TimmAttention:
        width = part.proj.in_features
        qkv = part.qkv
        plain = qkv.bias is not None and type(qkv) is nn.Linear and qkv.weight.shape == (3 * width, width)
        # Norms of queries and keys, and newer releases' norm and gate of what comes out.
        extras = (getattr(part, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
        plain = plain and all(extra is None or type(extra) is nn.Identity for extra in extras)
        return _PlainTimmAttention(layer) if plain else None
    return None


def attention_operators(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001  # there is none in evaluation
    is_causal: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002  # the same
) -> ir.Value:
    """softmax(scale Q K^T + mask) V in operators of the ONNX standard.

    Args:
        query: (n, heads, T, d).
        key: (n, heads, S, d).
        value: (n, heads, S, e).
        attn_mask: broadcast to (n, heads, T, S); added, or if boolean True where a key may be seen.
        dropout_p: has no effect.
        is_causal: token t sees keys up to t.
        scale: None: 1 / sqrt(d).
        enable_gqa: not supported.
    """
    if enable_gqa:
        raise NotImplementedError("attention with fewer heads of keys than of queries")
    if query.shape is None or key.shape is None:
        raise NotImplementedError("attention on tensors of unknown rank")
    rank = len(query.shape)
    factor = 1 / math.sqrt(int(query.shape[-1])) if scale is None else scale  # type: ignore[arg-type]  # a constant
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), turned)
    if is_causal:
        size = [int(shape[-2]) for shape in (query.shape, key.shape)]  # type: ignore[arg-type]  # constants
        mask = np.triu(np.full(size, -np.inf, np.float32), 1)
        scores = op.Add(scores, op.Constant(value=ir.tensor(mask)))
    elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Where(attn_mask, scores, op.Constant(value_float=-math.inf))
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    mixed: ir.Value = op.MatMul(op.Softmax(scores, axis=-1), value)
    return mixed


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention_operators
}
