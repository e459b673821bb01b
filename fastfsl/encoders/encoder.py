"""A loaded CLIP model with everything that goes with it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from PIL import Image

from fastfsl.devices import resolve_device
from fastfsl.images import Preprocessing


@dataclass
class Encoder:
    """A frozen CLIP model in evaluation mode and fp32.

    Attributes:
        model: open_clip model: `encode_image`, `encode_text`, `logit_scale`. No parameter requires a gradient.
        tokenizer: Texts to token ids (n, context_length), int64.
        preprocessing: What the model does with an image before its pixels go in; as the bundle stores it.
        transform: open_clip's evaluation transform, PIL image to normalised pixels (3, height, width).
        backbone: Name that loads the same architecture again (a -quickgelu name where the weights needed it).
        pretrained: Tag or checkpoint file, or None where the backbone brings its weights along.
        digest: Identity of the architecture and the weights, sha256 in hex.
        embed_dim: Width d of the shared embedding.
        logit_scale: exp of the learned temperature.
        device: Where the model is.
        normalized: Whether image features are L2-normalised. A blend of two encoders' features is not where its length
            belongs to the logits.
    """

    model: torch.nn.Module
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    preprocessing: Preprocessing
    transform: Callable[[Image.Image], torch.Tensor]
    backbone: str
    pretrained: str | None
    digest: str
    embed_dim: int
    logit_scale: float
    device: torch.device
    normalized: bool = True

    def to(self, device: str | torch.device) -> Self:
        """Move the model, in place.

        Raises:
            DeviceError: There is no such device.
        """
        self.device = resolve_device(device)
        self.model.to(self.device)
        return self

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed prepared images.

        Args:
            pixels: Normalised pixels (n, 3, height, width), as `transform` gives them, on any device.

        Returns:
            Features (n, d), fp32, on the model's device; L2-normalised if the encoder is `normalized`.
        """
        encode = cast("Callable[[torch.Tensor], torch.Tensor]", self.model.encode_image)
        features = encode(pixels.to(self.device, non_blocking=True)).float()
        return F.normalize(features, dim=-1) if self.normalized else features

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts; those longer than the model's context are cut by its tokenizer.

        Returns:
            L2-normalised features (n, d), fp32, on the model's device.
        """
        encode = cast("Callable[[torch.Tensor], torch.Tensor]", self.model.encode_text)
        return F.normalize(encode(self.tokenizer(list(texts)).to(self.device)).float(), dim=-1)


def weights_digest(model: torch.nn.Module, config: Mapping[str, Any]) -> str:
    """Identity of a model: sha256 over its configuration and all weights.

    The configuration belongs to it: two models with the same weights and another activation or number of heads are
    different encoders.

    Args:
        model: The model.
        config: Its open_clip configuration (embed_dim, quick_gelu, vision_cfg, text_cfg, ...).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
