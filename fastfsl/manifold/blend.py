"""A CLIP model whose image features are a blend of the tuned and the frozen tower's.

b = α·unit(tuned) + (1 − α)·unit(frozen), so that logit_scale · b · class_embeddingsᵀ are the blended logits
α·tuned + (1 − α)·zero-shot. The length of b belongs to them: it is not normalised.

Source: "Preserve and Sculpt" (arXiv 2508.12877), method section.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfsl.errors import ConfigError
from fastfsl.manifold.tower import TunedTower


class BlendedCLIP(nn.Module):
    """A CLIP model with a tuned image tower beside its frozen one.

    Args:
        clip: The open_clip model: its text tower and logit scale.
        tower: The tuned tower made of its visual tower.
        alpha: Weight of the tuned features, 0 to 1.

    Attributes:
        alpha: The weight, a float32 scalar buffer.

    Raises:
        ConfigError: alpha is not in [0, 1].
    """

    alpha: Tensor

    def __init__(self, clip: nn.Module, tower: TunedTower, alpha: float) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(f"expected alpha, the weight of the tuned features, between 0 and 1, got {alpha}")
        self.clip, self.tower = clip, tower
        self.logit_scale = clip.get_parameter("logit_scale")
        self.register_buffer("alpha", torch.tensor(alpha, device=self.logit_scale.device))
        self.eval()

    def branches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """L2-normalised features of the tuned and of the frozen tower, (n, d) each, of pixels (n, 3, height, width)."""
        tuned, frozen = self.tower(pixels)
        return F.normalize(tuned, dim=-1), F.normalize(frozen, dim=-1)

    def encode_image(self, pixels: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Blend b (n, d) of pixels (n, 3, height, width), not normalised; `alpha` in place of the model's own."""
        tuned, frozen = self.branches(pixels)
        weight = self.alpha if alpha is None else alpha
        return weight * tuned + (1 - weight) * frozen

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (n, d) of the frozen text tower, not normalised."""
        return cast("Callable[[Tensor], Tensor]", self.clip.encode_text)(tokens)
