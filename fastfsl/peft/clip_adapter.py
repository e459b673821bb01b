"""CLIP-Adapter: a small residual network on the image features."""

import copy
import dataclasses
from typing import Any, ClassVar, Literal, cast

from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastfsl.encoders import Encoder
from fastfsl.errors import ConfigError
from fastfsl.peft.base import SharedTextSource, unit, unit_rows


class CLIPAdapter(SharedTextSource):
    """Image features, blended with what a two-layer network makes of them.

        f  →  unit( ratio · ReLU(W₂ ReLU(W₁ f)) + (1 − ratio) · f ),    W₁ (d / reduction, d), W₂ (d, d / reduction)

    Without biases the network of c·f is c times that of f, so the features' length does not matter.

    Args:
        encoder: the base encoder.
        class_embeddings: of its text tower, (C, d), any length.
        ratio: share of the network's output, above 0, at most 1.
        reduction: by what the width is divided in between.

    Raises:
        ConfigError: a parameter out of its range.
        ShapeError: class embeddings of another shape.

    Source: CLIP-Adapter (arXiv 2110.04544), section 3.2.
    """

    kind: ClassVar[str] = "clip-adapter"
    takes: ClassVar[Literal["pixels", "features"]] = "features"
    texts: Tensor

    def __init__(
        self, encoder: Encoder, class_embeddings: ArrayLike, *, ratio: float = 0.2, reduction: int = 4
    ) -> None:
        super().__init__(encoder)
        width = encoder.embed_dim
        if not 0 < ratio <= 1 or not 1 <= reduction <= width:
            raise ConfigError(f"expected 0 < ratio <= 1 and 1 <= reduction <= {width}, got {ratio} and {reduction}")
        self.adapter = _Adapter(width, width // reduction, ratio).to(encoder.device)
        self.register_buffer("texts", unit_rows(class_embeddings, encoder), persistent=False)

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """`features`: adapted unit features (n, d) of features (n, d)."""
        return {"features": self.adapter(inputs)}

    def text_features(self) -> Tensor:
        """The unit class embeddings (C, d), which stay as they are."""
        return self.texts

    def tuned_encoder(self) -> Encoder:
        """The encoder with the adapter behind it; it shares the base encoder's weights, so both are on one device."""
        adapter = copy.deepcopy(self.adapter).to(self.encoder.device).eval().requires_grad_(requires_grad=False)
        model = _AdaptedCLIP(self.encoder.model, adapter)
        return dataclasses.replace(self.encoder, model=model, digest=self.digest(ratio=self.adapter.ratio))


class _Adapter(nn.Module):
    def __init__(self, width: int, inner: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.layers = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        return unit(self.ratio * self.layers(features) + (1 - self.ratio) * features)


class _AdaptedCLIP(nn.Module):
    """A CLIP model whose image features go through the adapter."""

    def __init__(self, clip: Any, adapter: _Adapter) -> None:  # noqa: ANN401  # open_clip's models are untyped
        super().__init__()
        self.clip = clip
        self.adapter = adapter
        self.logit_scale = clip.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        return cast("Tensor", self.adapter(self.clip.encode_image(pixels)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.clip.encode_text(tokens))
