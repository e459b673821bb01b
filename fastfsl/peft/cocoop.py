"""CoCoOp: a learned prompt that every image shifts."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fastfsl.encoders import Encoder
from fastfsl.peft.base import FeatureSource, unit, unit_rows
from fastfsl.peft.context import ContextPrompts
from fastfsl.peft.text_tower import TOKENS_PER_PASS, recomputed


class CoCoOp(FeatureSource):
    """Conditional context optimisation: a small network of the image feature shifts every context vector.

        v_m(f) = v_m + W₂ ReLU(W₁ f + b₁) + b₂,    W₁ (d / 16, d), W₂ (width, d / 16), f of unit length
        logits(f)_c = logit_scale · cos(f, text tower( [start] v_1(f) … v_M(f) name_c . [end] ))

    An image is classified by class embeddings of its own: n images and C classes are n·C texts. They are read
    `TOKENS_PER_PASS` tokens at a time.

    Args:
        encoder, class_names, num_contexts, init: as for `ContextPrompts`.

    Source: CoCoOp (arXiv 2203.05557), section 3.2.
    """

    kind: ClassVar[str] = "cocoop"
    takes: ClassVar[Literal["pixels", "features"]] = "features"

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        *,
        num_contexts: int = 4,
        init: str | None = "a photo of a",
    ) -> None:
        super().__init__(encoder)
        self.prompts = ContextPrompts(encoder, class_names, num_contexts, init)
        width, inner = self.prompts.context.shape[1], max(1, encoder.embed_dim // 16)
        self.meta_net = nn.Sequential(nn.Linear(encoder.embed_dim, inner), nn.ReLU(), nn.Linear(inner, width))
        self.meta_net.to(encoder.device)

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """`logits` (n, C) of features (n, d)."""
        images = unit(inputs)
        parts = [(texts * images[image]).sum(dim=-1) for image, _, texts in self._texts(images)]
        return {"logits": self.encoder.logit_scale * torch.cat(parts).unflatten(0, (len(images), -1))}

    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """What `forward` gave."""
        return outputs["logits"]

    def conditional_logits(self, features: ArrayLike) -> NDArray[np.float32]:
        """Logits (n, C) of image features (n, d), each by its own class embeddings.

        Raises:
            ShapeError: features of another shape.
        """
        with torch.no_grad():
            logits: NDArray[np.float32] = (
                self.outputs(unit_rows(features, self.encoder))["logits"].float().cpu().numpy()
            )
        return logits

    def class_embeddings(self, features: ArrayLike) -> NDArray[np.float32]:
        """Class embeddings (C, d), float32: the unit mean of those that the images of features (n, d) give.

        Raises:
            ShapeError: features of another shape.
        """
        images = unit_rows(features, self.encoder)
        total = images.new_zeros(self.prompts.num_classes, images.shape[1])
        with torch.no_grad():
            for _, classes, texts in self._texts(images):
                total.index_add_(0, classes, texts.to(total.dtype))
        embeddings: NDArray[np.float32] = unit(total).float().cpu().numpy()
        return embeddings

    def _texts(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All pairs of an image and a class in passes of bounded size: image (k,), class (k,), unit texts (k, d)."""
        shifts = self.meta_net(images)
        pairs = torch.arange(len(images) * self.prompts.num_classes, device=images.device)
        length = len(self.prompts.prefix) + len(self.prompts.context) + self.prompts.suffix.shape[1]
        passes = pairs.split(max(1, TOKENS_PER_PASS // length))
        for pair in passes:
            image, classes = pair // self.prompts.num_classes, pair % self.prompts.num_classes
            if len(passes) == 1:
                yield image, classes, self._conditional(shifts[image], classes)
            else:
                yield image, classes, recomputed(self._conditional, shifts[image], classes)

    def _conditional(self, shifts: Tensor, classes: Tensor) -> Tensor:
        texts: Tensor = self.prompts(self.prompts.context + shifts[:, None], classes)
        return texts
