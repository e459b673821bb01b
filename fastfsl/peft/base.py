"""What CLIP-LoRA, CLIP-Adapter, CoOp and CoCoOp have in common: cross-entropy, and the trained tensors as arrays."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fastfsl.encoders import Encoder, weights_digest
from fastfsl.errors import DataError, ShapeError


class FeatureSource(nn.Module, ABC):
    """A way to tune an encoder's features or class embeddings on labelled images, by cross-entropy.

        loss = mean over the batch of −log softmax(logit_scale · cos(feature, class embeddings))_label

    The trained parameters are those that require a gradient; they start from torch's global random state. The encoder
    is never changed.

    Attributes:
        kind: name of the method.
        takes: what `forward` is given: normalised "pixels" (n, 1, 3, height, width) or unit "features" (n, 1, d).
        encoder: the encoder that is tuned.
    """

    kind: ClassVar[str]
    takes: ClassVar[Literal["pixels", "features"]]

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the loss needs of each sample, by name, each (n, ...); there is no loss apart from the batch's.

        Raises:
            ShapeError: not one view a sample.
        """
        del progress  # nothing here changes with time
        if inputs.ndim != (5 if self.takes == "pixels" else 3) or inputs.shape[1] != 1:
            expected = "(n, 1, 3, height, width)" if self.takes == "pixels" else "(n, 1, d)"
            raise ShapeError(f"expected {self.takes} {expected}, one view a sample, got {tuple(inputs.shape)}")
        return self.outputs(inputs[:, 0]), None

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of `forward`'s outputs and the labels (n,), and its parts."""
        del progress
        loss = F.cross_entropy(self.logits(outputs), labels)
        return loss, {"cross_entropy": float(loss.detach())}

    @abstractmethod
    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """`forward`'s tensors, of pixels (n, 3, height, width) or features (n, d)."""

    @abstractmethod
    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits (n, C) of `forward`'s outputs."""

    def tuned_encoder(self) -> Encoder:
        """The encoder of the tuned image features; the base encoder where they are its own."""
        return self.encoder

    def state(self) -> dict[str, NDArray[Any]]:
        """The trained tensors by name."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._trained().items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take trained tensors over from `state()`.

        Raises:
            DataError: names, shapes or types are not those of these tensors, or a value is not finite.
        """
        trained = self._trained()
        if state.keys() != trained.keys():
            odd = sorted(state.keys() ^ trained.keys())
            raise DataError(
                f"expected the {len(trained)} tensors of {self.kind} with this encoder and these settings, got "
                f"{len(state)} (not in both: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}): train it again"
            )
        for name, parameter in trained.items():
            array = np.asarray(state[name])
            if array.shape != tuple(parameter.shape) or array.dtype.kind != "f" or not np.isfinite(array).all():
                raise DataError(
                    f"expected {name} of {self.kind} to be finite floats {tuple(parameter.shape)}, got {array.dtype} "
                    f"{array.shape}{'' if array.shape != tuple(parameter.shape) else ' or NaN'}: train it again"
                )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.from_numpy(np.asarray(state[name])))

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._trained().values())

    def digest(self, **settings: float) -> str:
        """Identity of the tuned features: sha256 over the base encoder's, the method, its settings, its state."""
        tensors = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in self._trained().items()})
        return weights_digest(tensors, {"encoder": self.encoder.digest, "kind": self.kind, **settings})

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class SharedTextSource(FeatureSource):
    """A source whose images all meet the same class embeddings; its output is `features`, (n, d), of unit length."""

    @abstractmethod
    def text_features(self) -> Tensor:
        """Unit class embeddings (C, d), with their gradient."""

    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """logit_scale · cosines, (n, C); products in the features' own precision, autocast or not."""
        features, texts = outputs["features"], self.text_features()
        with torch.autocast(features.device.type, enabled=False):
            return self.encoder.logit_scale * features @ texts.T

    def class_embeddings(self) -> NDArray[np.float32]:
        """Unit class embeddings (C, d), float32, as trained so far."""
        training = self.training
        self.eval()
        with torch.no_grad():
            embeddings: NDArray[np.float32] = self.text_features().float().cpu().numpy()
        self.train(training)
        return embeddings


def unit(features: Tensor) -> Tensor:
    """Vectors along the last axis at unit length, in float32 (float64 stays)."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def unit_rows(values: ArrayLike, encoder: Encoder) -> Tensor:
    """Rows (n, d) at unit length, float32, on the encoder's device.

    Raises:
        ShapeError: not rows of the encoder's width.
    """
    rows = torch.from_numpy(np.array(values, dtype=np.float32))
    if rows.ndim != 2 or rows.shape[1] != encoder.embed_dim:
        raise ShapeError(f"expected rows (n, {encoder.embed_dim}) of {encoder.backbone}'s, got {tuple(rows.shape)}")
    return unit(rows).to(encoder.device)
