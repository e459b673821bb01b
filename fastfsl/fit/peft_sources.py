"""CLIP-LoRA, CLIP-Adapter, CoOp and CoCoOp as sources, with their published recipes."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastfsl.data import prompt_names
from fastfsl.encoders import Encoder
from fastfsl.fit.batches import num_batches
from fastfsl.fit.source import ClassTexts, Source, SourceSupport, Tuned
from fastfsl.fit.tuning import Schedule
from fastfsl.peft import CLIPAdapter, CLIPLoRA, CoCoOp, CoOp
from fastfsl.peft.lora import Scaling

_Kind = TypeVar("_Kind")


@dataclass(kw_only=True)
class LoRASource(Source):
    """CLIP-LoRA: low-rank updates of the query, key and value projections; 500 updates for each image of a class.

    Attributes:
        rank: of the updates.
        scale: what the update is multiplied with is scale / √rank, or scale / rank.
        scaling: which, `sqrt-rank` as in the released code or `rank`.
        dropout: on what enters the update, in training.
        towers: which towers are updated.

    Source: CLIP-LoRA (arXiv 2405.18541).
    """

    learning_rate: float = 2e-4
    schedule: Schedule = "update"
    final_rate: float = 1e-6
    weight_decay: float = 0.01
    warmup_epochs: int = 0
    drop_last: bool = False
    rank: int = 2
    scale: float = 1.0
    scaling: Scaling = "sqrt-rank"
    dropout: float = 0.25
    towers: Literal["both", "visual", "text"] = "both"

    takes: ClassVar[Literal["pixels", "features"]] = "pixels"
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "adamw"

    def num_epochs(self, num_samples: int, num_classes: int) -> int:
        """As many whole epochs as 500 updates for each image of a class take."""
        updates = 500 * max(1, round(num_samples / num_classes))
        return math.ceil(updates / num_batches(num_samples, self.images_at_once, drop_last=self.drop_last))

    def objective(self, encoder: Encoder, texts: ClassTexts) -> CLIPLoRA:
        """The untrained objective."""
        return CLIPLoRA(
            encoder,
            texts.names,
            texts.templates,
            rank=self.rank,
            alpha=self.scale,
            dropout=self.dropout,
            towers=("visual", "text") if self.towers == "both" else (self.towers,),
            scaling=self.scaling,
        )

    def embeddings_of(self, objective: Tuned, support: SourceSupport) -> NDArray[np.float32]:  # noqa: ARG002  # every source's signature
        """As the updated text tower reads the prompts."""
        return _as(CLIPLoRA, objective).class_embeddings()


@dataclass(kw_only=True)
class AdapterSource(Source):
    """CLIP-Adapter: a small network on the image features, mixed with them.

    Attributes:
        ratio: share of the network's output.
        reduction: how much narrower its middle is.

    Source: CLIP-Adapter (arXiv 2110.04544); its ratio as in FMA (arXiv 2510.14543).
    """

    ratio: float = 0.2
    reduction: int = 4

    takes: ClassVar[Literal["pixels", "features"]] = "features"

    def num_epochs(self, num_samples: int, num_classes: int) -> int:  # noqa: ARG002  # the same for all
        """200."""
        return 200

    def objective(self, encoder: Encoder, texts: ClassTexts) -> CLIPAdapter:
        """The untrained objective."""
        return CLIPAdapter(encoder, texts.embeddings, ratio=self.ratio, reduction=self.reduction)


@dataclass(kw_only=True)
class CoOpSource(Source):
    """CoOp: context vectors in front of every class name, learned.

    Attributes:
        num_contexts: how many.
        context: words that they start from, as many as there are vectors; None: random.

    Source: CoOp (arXiv 2109.01134).
    """

    num_contexts: int = 16
    context: str | None = None

    takes: ClassVar[Literal["pixels", "features"]] = "features"

    def num_epochs(self, num_samples: int, num_classes: int) -> int:
        """50 at one shot, 100 up to four, else 200."""
        shots = max(1, round(num_samples / num_classes))
        return 50 if shots == 1 else 100 if shots <= 4 else 200

    def objective(self, encoder: Encoder, texts: ClassTexts) -> CoOp:
        """The untrained objective."""
        names = prompt_names(texts.names, texts.templates)
        return CoOp(encoder, names, num_contexts=self.num_contexts, init=self.context)

    def embeddings_of(self, objective: Tuned, support: SourceSupport) -> NDArray[np.float32]:  # noqa: ARG002  # every source's signature
        """As the text tower reads the learned prompts."""
        return _as(CoOp, objective).class_embeddings()

    def embeddings_for(self, encoder: Encoder, texts: ClassTexts) -> NDArray[np.float32]:
        """The learned context in front of other class names."""
        return _as(CoOp, self.restored_objective(encoder, texts)).class_embeddings()


@dataclass(kw_only=True)
class CoCoOpSource(Source):
    """CoCoOp: as CoOp, and every image shifts the context vectors by a small network.

    An estimator after it sees the class embeddings averaged over the support's images.

    Attributes:
        num_contexts: how many context vectors.
        context: words that they start from.

    Source: CoCoOp (arXiv 2203.05557).
    """

    num_contexts: int = 4
    context: str = "a photo of a"

    takes: ClassVar[Literal["pixels", "features"]] = "features"
    conditional: ClassVar[bool] = True
    published_batch_size: ClassVar[int] = 1

    def num_epochs(self, num_samples: int, num_classes: int) -> int:  # noqa: ARG002  # the same for all
        """10."""
        return 10

    def objective(self, encoder: Encoder, texts: ClassTexts) -> CoCoOp:
        """The untrained objective."""
        names = prompt_names(texts.names, texts.templates)
        return CoCoOp(encoder, names, num_contexts=self.num_contexts, init=self.context)

    def embeddings_of(self, objective: Tuned, support: SourceSupport) -> NDArray[np.float32]:
        """The mean over the support's images."""
        plain, _ = support.features()
        return _as(CoCoOp, objective).class_embeddings(plain)

    def conditional_logits(
        self, encoder: Encoder, texts: ClassTexts, features: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Logits (n, C) of unit features (n, d), each by its own prompts."""
        return _as(CoCoOp, self.restored_objective(encoder, texts)).conditional_logits(features)


def _as(kind: type[_Kind], objective: Tuned) -> _Kind:
    assert isinstance(objective, kind)  # noqa: S101  # for the type checker: `objective` makes no other
    return objective
