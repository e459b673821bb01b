"""CLIP-LoRA: low-rank updates of the query, key and value projections of both towers."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from fastfsl.data import class_prompts
from fastfsl.encoders import Encoder, class_embeddings
from fastfsl.errors import ConfigError
from fastfsl.peft.base import SharedTextSource, unit
from fastfsl.peft.text_tower import TextTower, read_prompts

Tower = Literal["visual", "text"]
Scaling = Literal["sqrt-rank", "rank"]


class CLIPLoRA(SharedTextSource):
    """LoRA on q, k and v of every attention block of CLIP's towers.

        W x  →  W x + (alpha / √rank) · B A dropout(x),    A (rank, width) Kaiming-uniform, B (width, rank) zero

    q, k and v have an A, a B and a dropout mask each. The towers work on a copy of the encoder's model; with the text
    tower among them the class embeddings are computed anew for every batch, with their gradient.

    Args:
        encoder: CLIP of open_clip: towers of its own blocks, or timm trunks whose attention has a fused `qkv`.
        class_names: C names as found in the data.
        templates: as for `encoders.class_embeddings`; each template costs a pass of the text tower.
        rank: of the updates.
        alpha: their scale, times the root of the rank.
        dropout: probability on their input, in training.
        towers: which are tuned.
        scaling: `sqrt-rank`, alpha / √rank as in the released code; `rank`, alpha / rank as in LoRA (arXiv 2106.09685).

    Raises:
        ConfigError: a parameter out of its range, or a tower that is not supported.

    Source: CLIP-LoRA (arXiv 2405.18541), section 4 (low-rank few-shot adaptation).
    """

    kind: ClassVar[str] = "clip-lora"
    takes: ClassVar[Literal["pixels", "features"]] = "pixels"
    texts: Tensor
    positions: Tensor | None

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        templates: str | Sequence[str],
        *,
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        towers: Sequence[Tower] = ("visual", "text"),
        scaling: Scaling = "sqrt-rank",
    ) -> None:
        super().__init__(encoder)
        if rank < 1 or not 0 <= dropout < 1 or not alpha > 0:
            raise ConfigError(f"expected rank >= 1, 0 <= dropout < 1 and alpha > 0, got {rank}, {dropout} and {alpha}")
        if not towers or not {"visual", "text"}.issuperset(towers):
            raise ConfigError(f"expected towers to be 'visual', 'text' or both, got {tuple(towers)}")
        if scaling not in ("sqrt-rank", "rank"):
            raise ConfigError(f"expected scaling 'sqrt-rank' or 'rank', got {scaling!r}")
        self.scale = alpha / (rank if scaling == "rank" else math.sqrt(rank))
        self.clip: Any = copy.deepcopy(encoder.model)
        self.num_classes = len(class_names)
        if "text" in towers:
            tokens = encoder.tokenizer(class_prompts(class_names, templates)).cpu()
            texts, positions = read_prompts(encoder.model, tokens)
        else:
            texts, positions = torch.from_numpy(class_embeddings(encoder, class_names, templates)), None
        # Token embeddings of the prompts; class embeddings where the text tower stays as it is.
        self.register_buffer("texts", texts.to(encoder.device), persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.updates = {
            path: self._adapt(path, rank, dropout) for tower in dict.fromkeys(towers) for path in self._paths(tower)
        }
        self.train()

    def train(self, mode: bool = True) -> "CLIPLoRA":  # noqa: FBT001, FBT002  # torch's signature
        """Training mode is the updates' dropout alone: what is frozen stays as it is when it is used."""
        super().train(mode)
        self.clip.eval()
        for update in self.updates.values():
            update.train(mode)
        return self

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """`features`: unit image features (n, d) of pixels (n, 3, height, width)."""
        return {"features": unit(self.clip.encode_image(inputs))}

    def text_features(self) -> Tensor:
        """Unit class embeddings (C, d): the mean over the templates of unit text features, at unit length."""
        if self.positions is None:
            return self.texts
        prompts = unit(TextTower(self.clip)(self.texts, self.positions))
        return unit(prompts.unflatten(0, (self.num_classes, -1)).mean(dim=1))

    def tuned_encoder(self) -> Encoder:
        """The encoder with the updates added to its weights: a model of the same form."""
        merged = copy.deepcopy(self.encoder.model)
        with torch.no_grad():
            for path, update in self.updates.items():
                weight = _packed(merged.get_submodule(path))[0]
                weight.add_(update.weight().to(weight.device))
        return dataclasses.replace(self.encoder, model=merged, digest=self.digest(scale=self.scale))

    def _paths(self, tower: Tower) -> list[str]:
        paths = [path for path in _attentions(self.clip) if path.startswith("visual.") == (tower == "visual")]
        if not paths:
            raise ConfigError(
                f"the {tower} tower of {self.encoder.backbone} has no attention that CLIP-LoRA can tune: expected "
                "open_clip's own ViT and text blocks, or a timm trunk whose attention has a fused qkv layer"
            )
        return paths

    def _adapt(self, path: str, rank: int, dropout: float) -> "_Update":
        attention = self.clip.get_submodule(path)
        weight, bias = _packed(attention)
        update = _Update(weight, rank, self.scale, dropout)
        projection = _Projection(weight, bias, update)
        whole = isinstance(attention, nn.MultiheadAttention)
        self.clip.set_submodule(path, _Attention(projection, attention) if whole else projection)
        return update


class _Update(nn.Module):
    """scale · B A x of q, k and v, one after the other: (..., width) → (..., 3 · heads' width)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows, width = weight.shape
        self.A = nn.Parameter(weight.new_empty(3, rank, width))
        self.B = nn.Parameter(weight.new_zeros(3, rows // 3, rank))
        for matrix in self.A.data:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(F.linear(self.dropout(x), a), b) for a, b in zip(self.A, self.B, strict=True)]
        return self.scale * torch.cat(parts, dim=-1)

    def weight(self) -> Tensor:
        """The update of the packed weight, (3 · heads' width, width)."""
        return self.scale * (self.B @ self.A).flatten(0, 1)


class _Projection(nn.Module):
    """A packed projection to q, k and v, and its update; takes the place of timm's `qkv`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, update: _Update) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + cast("Tensor", self.update(x))


class _Attention(nn.Module):
    """Self-attention in the place of nn.MultiheadAttention, batch first, as open_clip's blocks call it."""

    def __init__(self, projection: _Projection, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.qkv = projection
        self.out_proj = attention.out_proj
        self.num_heads = attention.num_heads

    def forward(
        self, query: Tensor, _key: Tensor, _value: Tensor, *, attn_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, None]:
        del need_weights
        q, k, v = self.qkv(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(heads.transpose(1, 2).flatten(2)), None


def _attentions(model: nn.Module) -> Iterator[str]:
    """Paths of the modules that hold packed weights of q, k and v in attention blocks."""
    for path, module in model.named_modules():
        if isinstance(module, ResidualAttentionBlock) and isinstance(module.attn, nn.MultiheadAttention):
            yield f"{path}.attn"
        # EVA's attention with a bias of its own reads qkv.weight and goes past the layer.
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and getattr(module, "q_bias", None) is None:
            yield f"{path}.qkv"


def _packed(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Packed weight and bias of q, k and v."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight, module.in_proj_bias
    return cast("nn.Parameter", module.weight), cast("nn.Parameter | None", module.bias)
