"""The image encoder as an ONNX graph: uint8 pixels in, embeddings out; of a blend the weight may be given too."""

import contextlib
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fastfsl.encoders import Encoder
from fastfsl.export.class_token import class_token_alone
from fastfsl.export.fusion import fuse
from fastfsl.export.torch_export import TRACED_BATCH, check_size, to_onnx
from fastfsl.flow.readout import normalize
from fastfsl.manifold import BlendedCLIP


class _PixelsToEmbedding(nn.Module):
    """uint8 images (n, h, w, 3) -> embeddings (n, d), with the encoder's own mean and deviation."""

    clip: Any  # open_clip's models are untyped
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.clip = encoder.model
        self.normalized = encoder.normalized
        self.register_buffer("mean", torch.tensor(encoder.preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor, alpha: Tensor | None = None) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2).to(torch.float32) / 255.0 - self.mean) / self.std
        embeddings: Tensor = self.clip.encode_image(pixels, *(() if alpha is None else (alpha,)))
        return normalize(embeddings) if self.normalized else embeddings


def pixels_to_embedding(encoder: Encoder) -> nn.Module:
    """The torch module that `visual_graph` exports: the reference of its parity check."""
    return _PixelsToEmbedding(encoder).eval()


def blend_record(encoder: Encoder) -> dict[str, Any] | None:
    """What a manifest says of an encoder's blend: the trained weight and whether it is normalised; None of another."""
    if not isinstance(encoder.model, BlendedCLIP):
        return None
    # The shortest number that is this float32: 0.3, not 0.30000001192092896.
    return {"alpha": float(str(encoder.model.alpha.cpu().numpy())), "normalized": encoder.normalized}


def visual_graph(encoder: Encoder) -> onnx.ModelProto:
    """Export the image tower with pixel normalisation, and embedding normalisation where it has one, inside.

    Inputs: `images` (batch, height, width, 3) uint8, the pixels that `fastfsl.images.preprocess` returns; of a blend of
    two towers also `alpha`, a float32 scalar that may be left out: it is an initialiser that holds the trained weight.
    Output: `image_embeds` (batch, d) float32, L2-normalised if the encoder is. The batch is dynamic.

    Raises:
        BundleError: if the tower is too large, cannot be exported, or not with a dynamic batch; the layer is named
            where torch names it.
    """
    what, clip = f"image tower of {encoder.backbone}", encoder.model
    tower = clip.tower if isinstance(clip, BlendedCLIP) else getattr(clip, "visual", clip)
    check_size(tower, what)  # without the text tower, which is not exported here
    height, width = encoder.preprocessing.height, encoder.preprocessing.width
    inputs = {"images": torch.zeros(TRACED_BATCH, height, width, 3, dtype=torch.uint8)}
    blend = blend_record(encoder)
    if blend is not None:
        inputs["alpha"] = torch.tensor(blend["alpha"])
    module = pixels_to_embedding(encoder).cpu()
    with class_token_alone(tower) if blend is None else contextlib.nullcontext():  # a blend's blocks are its own
        model = fuse(to_onnx(module, inputs, "image_embeds", what))
    if blend is not None:  # an input with a value of its own may be left out
        model.graph.initializer.append(numpy_helper.from_array(inputs["alpha"].numpy(), "alpha"))
    return model
