"""Tip-Adapter-F: the cache's keys are trained."""

from collections.abc import Iterator

import numpy as np

from fastfsl.errors import ConfigError
from fastfsl.heads.base import Head, check_grid
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import KernelForm, LinearForm, affinity
from fastfsl.heads.support import Array, Labels, Support
from fastfsl.heads.tip_adapter import ONE_SHOT_BETA, cache_candidates, cache_values

# AdamW's, as published: what divides the update of a key that hardly has a gradient.
_EPSILON = 1e-4


class TipAdapterF(Head):
    """Tip-Adapter whose keys, from the support vectors on, are trained by cross-entropy (AdamW, cosine schedule).

        logits = a · x Tᵀ + alpha · exp(-beta (1 - x keysᵀ)) Y

    They are trained under plain Tip-Adapter's a, alpha and beta. Where augmentation is published to keep a sample from
    meeting its own key, here its own key is left out of the mean over its class while it is a training sample (unless
    it is its class's only one). Keys are trained for every fold; a, alpha, beta and whether training pays (`epochs` or
    0) are then chosen as `blending` tells.

    Args:
        betas: sharpnesses to choose among.
        epochs: passes over the support.
        batch_size: samples an update.
        learning_rate: AdamW's first learning rate.
        logit_scale: scale of the zero-shot cosines that a is drawn to; None means 100.
        num_folds: cross-validation folds at most.
        seed: seed of the folds and of the batches.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        alpha_: the chosen alpha.
        beta_: the chosen beta.

    Source: Tip-Adapter (arXiv 2207.09519).
    """

    def __init__(
        self,
        *,
        betas: tuple[float, ...] = (1.0, 2.0, 4.0, 5.5, 8.0, 12.0, 16.0, 24.0),
        epochs: int = 20,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        logit_scale: float | None = None,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.betas = betas
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.logit_scale = logit_scale
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[KernelForm, Selection]:
        folds = self._folds(support)
        if folds.rule == "folds":
            untrained = list(cache_candidates(support, folds, self.betas))
            plain = select(untrained, folds, self._scale())
            candidates = [
                *(
                    Candidate({**candidate.settings, "epochs": 0}, candidate.scores, candidate.prior)
                    for candidate in untrained
                ),
                *self._trained_candidates(support, folds, plain),
            ]
            selection = select(candidates, folds, self._scale())
        else:
            plain = select(cache_candidates(support, folds, (ONE_SHOT_BETA,)), folds, self._scale())
            selection = Selection(
                "one-shot", {**plain.settings, "epochs": self.epochs}, plain.prior_weight, plain.score_weight
            )
        keys = support.features
        if selection.settings["epochs"]:
            keys = self._train_keys(keys, support.labels, support.class_embeddings, plain)
        self.alpha_, self.beta_ = selection.score_weight, selection.settings["beta"]
        prior = LinearForm(selection.prior_weight * support.class_embeddings, np.zeros(support.num_classes))
        values = self.alpha_ * cache_values(support.labels, support.num_classes)
        return KernelForm(prior, keys, values, self.beta_), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        check_grid("betas", self.betas)
        check_grid("learning_rate", (self.learning_rate,))
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, got {getattr(self, name)}")

    def _trained_candidates(self, support: Support, folds: Folds, plain: Selection) -> Iterator[Candidate]:
        prior = support.plain @ support.class_embeddings.T
        scores = np.zeros((len(self.betas), *prior.shape))
        for train, held_out in folds:
            labels = support.labels[train]
            keys = self._train_keys(support.features[train], labels, support.class_embeddings, plain)
            values = cache_values(labels, support.num_classes)
            for position, beta in enumerate(self.betas):
                scores[position, held_out] = affinity(support.plain[held_out], keys, beta) @ values
        for beta, held_out_scores in zip(self.betas, scores, strict=True):
            yield Candidate({"beta": beta, "epochs": self.epochs}, held_out_scores, prior)

    def _train_keys(self, features: Array, labels: Labels, class_embeddings: Array, plain: Selection) -> Array:
        """Trained keys (n, d) for support vectors (n, d)."""
        import torch

        beta, alpha = plain.settings["beta"], plain.score_weight
        x = torch.from_numpy(features).float()
        y = torch.from_numpy(labels)
        counts = torch.bincount(y, minlength=len(class_embeddings))
        prior = plain.prior_weight * x @ torch.from_numpy(class_embeddings).float().T
        values = alpha * torch.from_numpy(cache_values(labels, len(class_embeddings))).float()
        shared = counts[y] > 1
        rest = torch.where(shared, counts[y] / (counts[y] - 1).clamp(min=1), 1.0)  # a mean over one key fewer

        keys = x.clone().requires_grad_()
        optimizer = torch.optim.AdamW([keys], lr=self.learning_rate, eps=_EPSILON)
        batches = -(-len(x) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(x), generator=generator).split(self.batch_size):
                rows = torch.arange(len(batch))
                kernel = torch.exp(beta * (x[batch] @ keys.T - 1))
                own = torch.zeros_like(kernel).index_put((rows, batch), shared[batch].float())
                scores = (kernel * (1 - own)) @ values
                scaled = torch.ones_like(scores).index_put((rows, y[batch]), rest[batch])
                loss = torch.nn.functional.cross_entropy(prior[batch] + scores * scaled, y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        trained: Array = keys.detach().double().numpy()
        return trained
