"""CoOp: learned vectors in place of the prompt's words."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfsl.encoders import Encoder
from fastfsl.peft.base import SharedTextSource, unit
from fastfsl.peft.context import ContextPrompts


class CoOp(SharedTextSource):
    """Context optimisation: M vectors, shared by the classes, in front of the class name.

        class embedding of c = text tower( [start] v_1 … v_M name_c . [end] )

    Args:
        encoder, class_names, num_contexts, init: as for `ContextPrompts`.

    Source: CoOp (arXiv 2109.01134), section 3.2 (unified context, class token at the end).
    """

    kind: ClassVar[str] = "coop"
    takes: ClassVar[Literal["pixels", "features"]] = "features"

    def __init__(
        self, encoder: Encoder, class_names: Sequence[str], *, num_contexts: int = 16, init: str | None = None
    ) -> None:
        super().__init__(encoder)
        self.prompts = ContextPrompts(encoder, class_names, num_contexts, init)

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """`features`: the features (n, d) at unit length."""
        return {"features": unit(inputs)}

    def text_features(self) -> Tensor:
        """Unit class embeddings (C, d) of the learned prompts."""
        classes = torch.arange(self.prompts.num_classes, device=self.prompts.context.device)
        features: Tensor = self.prompts(self.prompts.context, classes)
        return features
