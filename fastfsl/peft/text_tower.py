"""open_clip's own text towers, run from the embeddings of their tokens instead of the tokens."""

from typing import Any, cast

import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfsl.errors import ConfigError

# What is read at once while gradients are kept: it bounds the activations, whatever the number of classes.
TOKENS_PER_PASS = 8192


class TextTower(nn.Module):
    """The text tower of CLIP, or of CustomTextCLIP (SigLIP and others), without its vocabulary.

        text feature = projection(LayerNorm(transformer(embeddings + positions))[position])

    It shares the model's modules; copy it to keep it apart.

    Args:
        model: open_clip model.

    Raises:
        ConfigError: The tower is not one of these.
    """

    attn_mask: Tensor | None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        source = text_part(model)
        self.transformer = source.transformer
        self.positional_embedding = source.positional_embedding
        self.ln_final = source.ln_final
        self.text_projection = source.text_projection
        self.register_buffer("attn_mask", source.attn_mask, persistent=False)

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Read prompts.

        Args:
            embeddings: token embeddings (n, L, width), as `read_prompts` gives them or with some of them replaced.
            positions: index of the token whose output is the text's, (n,).

        Returns:
            Text features (n, d), not normalised. More than `TOKENS_PER_PASS` tokens are read in several passes, whose
            activations are computed again for the gradient.
        """
        size = max(1, TOKENS_PER_PASS // embeddings.shape[1])
        if len(embeddings) <= size:
            return self._read(embeddings, positions)
        chunks = zip(embeddings.split(size), positions.split(size), strict=True)
        return torch.cat([recomputed(self._read, *chunk) for chunk in chunks])

    def _read(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        length = embeddings.shape[1]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.transformer(embeddings + self.positional_embedding[:length], attn_mask=mask)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), positions])
        if self.text_projection is None:
            return cast("Tensor", x)
        linear = isinstance(self.text_projection, nn.Linear)
        return cast("Tensor", self.text_projection(x) if linear else x @ self.text_projection)


def read_prompts(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token embeddings of prompts, and which token's output is the text's.

    Under a causal mask a token sees none that come after it, so the padding after the last position is left out.

    Args:
        model: open_clip model.
        tokens: token ids (n, context length), on the CPU.

    Returns:
        Embeddings (n, L, width), L at most the context length, and positions (n,), on the model's device.

    Raises:
        ConfigError: The tower is not one that `TextTower` runs.
    """
    source = text_part(model)
    flat = isinstance(source, CLIP)
    pool_type = source.text_pool_type if flat else source.pool_type
    if pool_type == "argmax":  # the end token has the highest id
        positions = tokens.argmax(dim=1)
    elif pool_type == "eos":
        positions = (tokens == (source.text_eos_id if flat else source.eos_id)).int().argmax(dim=1)
    else:
        positions = torch.full((len(tokens),), tokens.shape[1] - 1 if pool_type == "last" else 0)
    if source.attn_mask is not None:
        tokens = tokens[:, : int(positions.max()) + 1]
    table = source.token_embedding.weight
    with torch.no_grad():
        return source.token_embedding(tokens.to(table.device)), positions.to(table.device)


def text_part(model: nn.Module) -> Any:  # noqa: ANN401  # open_clip's models are untyped
    """The module that holds the text tower's layers.

    Raises:
        ConfigError: The tower is not one that `TextTower` runs.
    """
    source: Any = model if isinstance(model, CLIP) else getattr(model, "text", None)
    masked = getattr(source, "cls_emb", None) is not None or getattr(source, "use_pad_mask", False)
    pool_type = getattr(source, "text_pool_type" if isinstance(source, CLIP) else "pool_type", None)
    if isinstance(source, CLIP | TextTransformer) and not masked and pool_type != "none":
        return source
    raise ConfigError(
        f"expected a text tower of open_clip's own, CLIP's or a TextTransformer without class token and padding mask, "
        f"got {type(source).__name__} of {type(model).__name__} (pool_type {pool_type!r}): towers of transformers and "
        "CoCa's are not supported; tune the image side alone (CLIP-Adapter, or CLIP-LoRA with towers=('visual',))"
    )


def recomputed(function: Any, *inputs: Tensor) -> Tensor:  # noqa: ANN401  # any function of tensors
    """function(*inputs), whose activations are not kept for the gradient but computed again."""
    if not torch.is_grad_enabled():
        return cast("Tensor", function(*inputs))
    return cast("Tensor", checkpoint(function, *inputs, use_reentrant=False))
