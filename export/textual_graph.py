"""The text tower as an ONNX graph: token ids in, text embeddings out."""

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fastfsl.encoders import Encoder
from fastfsl.export.torch_export import TRACED_BATCH, check_size, to_onnx
from fastfsl.flow.readout import normalize
from fastfsl.manifold import BlendedCLIP


class _TokensToEmbedding(nn.Module):
    """Token ids (n, context_length) -> L2-normalised embeddings (n, d)."""

    clip: Any  # open_clip's models are untyped

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.clip = encoder.model

    def forward(self, token_ids: Tensor) -> Tensor:
        return normalize(self.clip.encode_text(token_ids))


def tokens_to_embedding(encoder: Encoder) -> nn.Module:
    """The torch module that `textual_graph` exports: the reference of its parity check."""
    return _TokensToEmbedding(encoder).eval()


def textual_graph(encoder: Encoder) -> onnx.ModelProto:
    """Export the text tower with the normalisation inside.

    Input: `token_ids` (batch, context_length) int64, as the encoder's tokenizer gives them. Output: `text_embeds`
    (batch, d) float32, L2-normalised. The batch is dynamic.

    Raises:
        BundleError: if the tower is too large or cannot be exported; the layer is named where it can be found.
    """
    what = f"text tower of {encoder.backbone}"
    clip = encoder.model.clip if isinstance(encoder.model, BlendedCLIP) else encoder.model
    check_size(nn.ModuleList(part for name, part in clip.named_children() if name != "visual"), what)
    tokens = encoder.tokenizer(["a photo of a cat"] * TRACED_BATCH)
    module = tokens_to_embedding(encoder).cpu()
    with torch.no_grad():
        return to_onnx(module, {"token_ids": tokens}, "text_embeds", what)
