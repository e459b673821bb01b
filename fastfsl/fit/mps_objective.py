"""The objective of MPS-Tuning: cross-entropy, manifold alignment and sculpting of the tuned tower."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfsl.encoders import Encoder
from fastfsl.fit.kernel_choice import GramKind, GramLoss, gram_loss_for
from fastfsl.manifold import BlendedCLIP, TunedTower, hierarchical_sculpting_loss, temperature_at

PUBLISHED_ALPHA = 0.3


class MPSObjective(nn.Module):
    """Cross-entropy of the blended logits + λ1 · manifold alignment + λ2 · hierarchical sculpting, over two views.

    Args:
        encoder: frozen; its image tower is shared, and copied where it is trained.
        class_embeddings: L2-normalised, (C, d).
        sculpting_texts: the texts of the sculpting loss, (C, d): normalised, or raw as in the released code.
        alpha: weight of the tuned branch in the logits.
        alignment_weight: λ1.
        sculpting_weight: λ2.
        align: which Gram matrices are aligned.
        gram: norm of their difference.
        gram_loss: what computes it, called with (features, reference, kind); None: what suits the encoder's device.
        temperature: τ at the start and at the end.
        checkpointing: recompute activations instead of keeping them.

    Source: MPS-Tuning (arXiv 2508.12877), section 3.
    """

    class_embeddings: Tensor
    sculpting_texts: Tensor

    def __init__(
        self,
        encoder: Encoder,
        class_embeddings: NDArray[np.float32],
        sculpting_texts: NDArray[np.float32],
        *,
        alpha: float = PUBLISHED_ALPHA,
        alignment_weight: float = 0.5,
        sculpting_weight: float = 0.1,
        align: tuple[str, ...] = ("global", "local"),
        gram: GramKind = "l1",
        gram_loss: GramLoss | None = None,
        temperature: tuple[float, float] = (0.1, 0.05),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self._encoder = encoder  # no submodule of ours: its text tower is neither trained nor moved
        visual: nn.Module = encoder.model.get_submodule("visual")
        self.tower = TunedTower(visual).to(encoder.device)
        self.tower.checkpointing = checkpointing
        self.register_buffer("class_embeddings", torch.from_numpy(class_embeddings).to(encoder.device))
        self.register_buffer("sculpting_texts", torch.from_numpy(sculpting_texts).to(encoder.device))
        self.alpha = alpha
        self.alignment_weight = alignment_weight
        self.sculpting_weight = sculpting_weight
        self.align = align
        self.gram: GramKind = gram
        self.gram_loss = gram_loss_for(encoder.device) if gram_loss is None else gram_loss
        self.temperature = temperature

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:  # noqa: ARG002  # the contract of objectives
        """Embeddings of both branches and value streams, (n, V, d) each, and the local alignment.

        Args:
            inputs: normalised pixels (n, V, 3, h, w).
            progress: unused.
        """
        num_samples, num_views = inputs.shape[:2]
        local = self.alignment_weight > 0 and "local" in self.align
        output = self.tower.training_output(inputs.flatten(0, 1), local=local, streams=self.sculpting_weight > 0)
        by_view = {
            "tuned": output.tuned,
            "frozen": output.frozen,
            "last_stream": output.last_stream,
            "previous_stream": output.previous_stream,
        }
        outputs = {
            name: value.unflatten(0, (num_samples, num_views)) for name, value in by_view.items() if value is not None
        }
        own = None
        if output.tuned_tokens is not None and output.frozen_tokens is not None:
            aligned = self.gram_loss(output.tuned_tokens, output.frozen_tokens, self.gram)
            own = self.alignment_weight * num_views * aligned  # summed over the views, and a mean over the images
        return outputs, own

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """What couples the samples: global alignment and sculpting, and the cross-entropy."""
        tuned, frozen = outputs["tuned"].float(), outputs["frozen"].float()
        blend = self.alpha * F.normalize(tuned, dim=-1) + (1 - self.alpha) * F.normalize(frozen, dim=-1)
        with torch.autocast(tuned.device.type, enabled=False):
            logits = self._encoder.logit_scale * (blend @ self.class_embeddings.T).mean(dim=1)
        loss = F.cross_entropy(logits, labels)
        parts = {"cross_entropy": loss.item()}
        if self.alignment_weight > 0 and "global" in self.align:
            by_view = self.gram_loss(tuned.transpose(0, 1), frozen.transpose(0, 1), self.gram)
            aligned = tuned.shape[1] * by_view
            loss = loss + self.alignment_weight * aligned
            parts["alignment_global"] = aligned.item()
        if self.sculpting_weight > 0:
            # Views are queries of their own, of the label of their image.
            final, last, previous = (
                outputs[name].flatten(0, 1) for name in ("tuned", "last_stream", "previous_stream")
            )
            sculpted = hierarchical_sculpting_loss(
                final,
                last,
                previous,
                labels.repeat_interleave(tuned.shape[1]),
                self.sculpting_texts,
                temperature_at(progress, *self.temperature),
                normalize_text=False,  # they are as they are to be
            )
            loss = loss + self.sculpting_weight * sculpted
            parts["sculpting"] = sculpted.item()
        return loss, parts

    def blended(self, alpha: float) -> Encoder:
        """The encoder whose image features are the blend of both branches."""
        base = self._encoder
        digest = hashlib.sha256(f"{base.digest} mps {alpha!r}".encode())
        for name, array in sorted(self.state().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        model = BlendedCLIP(base.model, self.tower, alpha).eval()
        return replace(base, model=model, digest=digest.hexdigest(), normalized=False)

    def tuned_encoder(self) -> Encoder:
        """The encoder blended with the α of the training."""
        return self.blended(self.alpha)

    def state(self) -> dict[str, NDArray[Any]]:
        """The trained tensors by name."""
        return self.tower.state()

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take trained tensors.

        Raises:
            DataError: they do not fit this tower.
        """
        self.tower.load_state(state)

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
