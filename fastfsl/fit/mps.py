"""MPS-Tuning: the upper half of the image tower is tuned while its manifold is preserved and sculpted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfsl.data import PRESETS, class_prompts
from fastfsl.encoders import Encoder
from fastfsl.errors import ConfigError
from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.kernel_choice import GramKind
from fastfsl.fit.mps_objective import PUBLISHED_ALPHA, MPSObjective
from fastfsl.fit.source import ClassTexts, Source, SourceSupport, Tuned, check_weight
from fastfsl.images import open_image
from fastfsl.manifold import BlendedCLIP, gram_alignment_loss

Choose = Literal["choose"]

# Candidates where the weights are to be chosen on the support. The published ones are among them.
ALIGNMENT_WEIGHTS = (0.5, 2.0)
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# What a run records the drift as.
DRIFT = "gromov_wasserstein_bound"

# A quarter of every class is held out; the accuracy on it is taken this often while it trains.
_HELD_OUT = 4
_READINGS = 10
_BATCH = 64
# Images whose Gram matrices tell the drift: those of the support, spread over it where it has more.
_DRIFT_IMAGES = 1024


@dataclass(frozen=True)
class _Recipe:
    """What the paper sets by data set; the default is for sets that it does not name."""

    alignment_weight: float = 0.5
    temperature: tuple[float, float] = (0.1, 0.05)
    epochs: int = 50
    batch_size: int = 32


_SOFT = (0.5, 0.07)
RECIPES: Mapping[str, _Recipe] = {
    "imagenet": _Recipe(2.0, batch_size=64),
    "food101": _Recipe(2.0, _SOFT),
    "sun397": _Recipe(2.0),
    "caltech101": _Recipe(epochs=100),
    "dtd": _Recipe(0.5, _SOFT, 100),
    "oxford-pets": _Recipe(2.0, _SOFT, 100),
    "ucf101": _Recipe(0.5, _SOFT, 100),
    "eurosat": _Recipe(0.5, _SOFT, 200),
    "fgvc-aircraft": _Recipe(epochs=200),
    "flowers102": _Recipe(epochs=200),
    "stanford-cars": _Recipe(epochs=200),
}


@dataclass(kw_only=True)
class MPS(Source):
    """MPS-Tuning of the image tower.

    Attributes:
        data_set: one of the eleven standard sets, whose published λ1, τ, epochs and batch hold where none are given.
        alpha: weight of the tuned branch in the logits; `choose`: the published one in training, and after it by
            held-out support.
        alignment_weight: λ1; None: the data set's, else 0.5; `choose`: by held-out support.
        sculpting_weight: λ2.
        align: which Gram matrices are aligned, `both`, `global` or `local`.
        gram: `l1`, as published, or `squared`.
        text_norm: whether the sculpting loss normalises the texts; the released code does not.
        temperature: τ at the start and at the end of the training; None: the data set's, else (0.1, 0.05).
        checkpointing: recompute activations in the backward pass instead of keeping them.
        alpha_: the α in use after the training.
        alignment_weight_: the λ1 in use.
        selection_: on what evidence they were chosen; empty where they were given.
        drift_: mean |S - S'| of the Gram matrices of the tuned branch's and the frozen features of the support, an
            upper bound of their Gromov-Wasserstein distance; None where a run does not record it.

    Source: MPS-Tuning (arXiv 2508.12877).
    """

    data_set: str | None = None
    alpha: float | Choose = PUBLISHED_ALPHA
    alignment_weight: float | Choose | None = None
    sculpting_weight: float = 0.1
    align: Literal["both", "global", "local"] = "both"
    gram: GramKind = "l1"
    text_norm: bool = True
    temperature: tuple[float, float] | None = None
    checkpointing: bool = False
    alpha_: float = field(init=False, repr=False)
    alignment_weight_: float = field(init=False, repr=False)
    selection_: dict[str, Any] = field(init=False, repr=False)
    drift_: float | None = field(init=False, repr=False)

    takes: ClassVar[Literal["pixels", "features"]] = "pixels"
    blended: ClassVar[bool] = True
    num_views: ClassVar[int] = 2
    view_scale: ClassVar[tuple[float, float] | None] = (0.3, 1.0)

    def __post_init__(self) -> None:
        """Refuse values no training can be done with."""
        if self.data_set is not None and self.data_set not in PRESETS:
            raise ConfigError(f"unknown data_set {self.data_set!r}: expected one of {', '.join(PRESETS)}")
        if self.alpha != "choose" and not 0 < self.alpha <= 1:
            raise ConfigError(f"expected alpha above 0 and at most 1, or 'choose', got {self.alpha}")
        if isinstance(self.alignment_weight, float | int):
            check_weight("alignment_weight", self.alignment_weight)
        check_weight("sculpting_weight", self.sculpting_weight)
        start, end = self._published().temperature if self.temperature is None else self.temperature
        if not (start > 0 and end > 0):
            raise ConfigError(f"expected temperature to be two positive numbers, got {self.temperature}")
        self.alpha_ = PUBLISHED_ALPHA if self.alpha == "choose" else float(self.alpha)
        weight = self.alignment_weight
        self.alignment_weight_ = (
            float(weight) if isinstance(weight, float | int) else self._published().alignment_weight
        )
        self.selection_ = {}
        self.drift_ = None
        super().__post_init__()

    def num_epochs(self, num_samples: int, num_classes: int) -> int:  # noqa: ARG002  # the paper's depend on the set
        """The data set's epochs, else 50."""
        return self._published().epochs

    @property
    def images_at_once(self) -> int:
        """Images an update: the data set's, else 32."""
        return self._published().batch_size if self.batch_size is None else self.batch_size

    def objective(self, encoder: Encoder, texts: ClassTexts) -> MPSObjective:
        """The objective with the weights in use."""
        sculpting_texts = texts.embeddings if self.text_norm else raw_texts(encoder, texts)
        return MPSObjective(
            encoder,
            texts.embeddings,
            sculpting_texts,
            # A chosen one is chosen for what was trained with the published one.
            alpha=PUBLISHED_ALPHA if self.alpha == "choose" else self.alpha_,
            alignment_weight=self.alignment_weight_,
            sculpting_weight=self.sculpting_weight,
            align=("global", "local") if self.align == "both" else (self.align,),
            gram=self.gram,
            temperature=self._published().temperature if self.temperature is None else self.temperature,
            checkpointing=self.checkpointing,
        )

    def tuned(self, encoder: Encoder, texts: ClassTexts, alpha: float | None = None) -> Encoder:
        """The blended encoder, with another α if one is given."""
        objective = _mps(self.restored_objective(encoder, texts))
        return objective.blended(self.alpha_ if alpha is None else alpha)

    def selection_record(self) -> dict[str, Any]:
        """α and λ1, the evidence for them, the drift, and the losses by epoch."""
        return {
            **super().selection_record(),
            "alpha": self.alpha_,
            "alignment_weight": self.alignment_weight_,
            **({} if self.drift_ is None else {DRIFT: self.drift_}),
            **({"held_out": self.selection_} if self.selection_ else {}),
        }

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the source fitted again.

        Raises:
            DataError: an array is missing.
        """
        self.alpha_ = float(record["alpha"])
        self.alignment_weight_ = float(record["alignment_weight"])
        self.selection_ = dict(record.get("held_out", {}))
        self.drift_ = None if record.get(DRIFT) is None else float(record[DRIFT])
        return super().restore(state, record)

    def _published(self) -> _Recipe:
        return _Recipe() if self.data_set is None else RECIPES[self.data_set]

    def _fit(
        self,
        support: SourceSupport,
        on_stage: StageCallback,
        on_warning: Callable[[str], None],
        checkpoints: Path | None,
    ) -> Tuned:
        if "choose" in (self.alpha, self.alignment_weight):
            self._choose(support, on_stage, on_warning, checkpoints)
        objective = super()._fit(support, on_stage, on_warning, checkpoints)
        self.drift_ = _drift(_mps(objective), support)
        return objective

    def _choose(
        self,
        support: SourceSupport,
        on_stage: StageCallback,
        on_warning: Callable[[str], None],
        checkpoints: Path | None,
    ) -> None:
        """Set `alignment_weight_` and `alpha_` by the accuracy on a held-out quarter of the support."""
        kept, held_out = hold_out(support.labels, self.seed)
        if len(held_out) == 0:
            on_warning("one image a class leaves none to choose by: taking the published weights")
            return
        judged = support.part(held_out)
        weights = ALIGNMENT_WEIGHTS if self.alignment_weight == "choose" else (self.alignment_weight_,)
        alphas = ALPHAS if self.alpha == "choose" else (self.alpha_,)
        epochs = self.recipe(len(kept), len(support.texts.names)).epochs
        readings = {round(epochs * (number + 1) / _READINGS) for number in range(_READINGS)}

        def read(objective: Tuned, epoch: int) -> dict[str, Any] | None:
            if epoch not in readings:
                return None
            return {"held_out_accuracy": _accuracies(_mps(objective), judged, (self.alpha_,))[0]}

        found: dict[tuple[float, float], float] = {}
        curves: dict[str, list[dict[str, Any]]] = {}
        for weight in weights:
            self.alignment_weight_ = weight
            objective, history = self.trained(
                support.part(kept), on_stage, on_warning, checkpoints, name=f"choosing, λ1 = {weight:g}", evaluate=read
            )
            curves[f"{weight:g}"] = [
                {"epoch": epoch + 1, "accuracy": entry["held_out_accuracy"]}
                for epoch, entry in enumerate(history)
                if "held_out_accuracy" in entry
            ]
            for alpha, accuracy in zip(alphas, _accuracies(_mps(objective), judged, alphas), strict=True):
                found[weight, alpha] = accuracy
        best = max(found.values())
        # Of equally good ones those nearest to the published.
        self.alignment_weight_, self.alpha_ = min(
            (key for key, accuracy in found.items() if accuracy == best),
            key=lambda key: (abs(key[1] - PUBLISHED_ALPHA), abs(key[0] - self._published().alignment_weight)),
        )
        self.selection_ = {
            "num_held_out": len(held_out),
            "accuracy": best,
            "candidates": [
                {"alignment_weight": weight, "alpha": alpha, "accuracy": accuracy}
                for (weight, alpha), accuracy in found.items()
            ],
            "accuracy_by_epoch": curves,
        }


def hold_out(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and positions held out: a quarter of every class that has two images, one at least."""
    rng = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out += members[: max(1, len(members) // _HELD_OUT) if len(members) > 1 else 0].tolist()
    chosen = np.array(sorted(held_out), dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def raw_texts(encoder: Encoder, texts: ClassTexts) -> NDArray[np.float32]:
    """Class embeddings as the text tower gives them, averaged over the prompts and not normalised, (C, d)."""
    prompts = class_prompts(texts.names, texts.templates)
    model: Any = encoder.model
    with torch.inference_mode():
        parts = [
            model.encode_text(encoder.tokenizer(prompts[start : start + _BATCH]).to(encoder.device)).float()
            for start in range(0, len(prompts), _BATCH)
        ]
    embeddings: NDArray[np.float32] = torch.cat(parts).unflatten(0, (len(texts.names), -1)).mean(dim=1).cpu().numpy()
    return embeddings


def _mps(objective: Tuned) -> MPSObjective:
    assert isinstance(objective, MPSObjective)  # noqa: S101  # for the type checker: `MPS.objective` makes no other
    return objective


@torch.inference_mode()
def _accuracies(objective: MPSObjective, judged: SourceSupport, alphas: tuple[float, ...]) -> list[float]:
    """Accuracy of the blend on images as they are, for each α."""
    encoder = judged.encoder
    texts = torch.from_numpy(judged.texts.embeddings).to(encoder.device)
    labels = torch.from_numpy(judged.labels).to(encoder.device)
    right = torch.zeros(len(alphas))
    for number, (tuned, frozen) in enumerate(_branches(objective, encoder, judged.paths)):
        for place, alpha in enumerate(alphas):
            predicted = ((alpha * tuned + (1 - alpha) * frozen) @ texts.T).argmax(dim=1)
            right[place] += (predicted == labels[number * _BATCH : (number + 1) * _BATCH]).sum().cpu()
    return [float(count) / len(judged.paths) for count in right]


@torch.inference_mode()
def _drift(objective: MPSObjective, support: SourceSupport) -> float:
    """Mean |S - S'| of the Gram matrices of tuned and frozen features of the support."""
    every = np.linspace(0, len(support.paths) - 1, min(len(support.paths), _DRIFT_IMAGES)).round().astype(int)
    branches = list(_branches(objective, support.encoder, [support.paths[index] for index in every]))
    tuned, frozen = (torch.cat(part) for part in zip(*branches, strict=True))
    return float(gram_alignment_loss(tuned, frozen))


def _branches(objective: MPSObjective, encoder: Encoder, paths: Sequence[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tuned and frozen unit features of images as they are, float32, batch by batch."""
    model = BlendedCLIP(encoder.model, objective.tower, PUBLISHED_ALPHA)
    for start in range(0, len(paths), _BATCH):
        images = [encoder.transform(open_image(path)) for path in paths[start : start + _BATCH]]
        tuned, frozen = model.branches(torch.stack(images).to(encoder.device))
        yield tuned.float(), frozen.float()
