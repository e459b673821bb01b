from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfsl.fit.batches import FeatureBatches
from fastfsl.fit.tuning import TuningRecipe, tune

CPU = torch.device("cpu")
NUM_CLASSES, DIM = 3, 5


class Toy(nn.Module):
    """A loss over the batch that couples all samples, with a parameter of its own, and one of each sample."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(DIM, DIM)
        self.texts = nn.Parameter(torch.empty(NUM_CLASSES, DIM))  # used in batch_loss alone
        self.frozen = nn.Parameter(torch.ones(DIM), requires_grad=False)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[float] = []

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        self.seen.append(progress)
        hidden = self.dropout(self.layer(inputs))
        own = (1 + progress) * hidden.square().mean()
        return {"hidden": hidden, "plain": inputs}, own

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        rows = torch.cat([outputs["hidden"], outputs["plain"]], dim=1).flatten(0, 1).tanh()
        gram = (rows @ rows.T).square().mean()
        logits = outputs["hidden"].mean(dim=1) @ self.texts.T
        cross_entropy = nn.functional.cross_entropy(logits, labels)
        return gram + cross_entropy, {"gram": gram.item(), "cross_entropy": cross_entropy.item()}


def batches(num_samples: int = 11, **options: Any) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_samples, 4, DIM, generator=generator)
    labels = torch.arange(num_samples) % NUM_CLASSES
    return FeatureBatches(features, labels, **{"num_views": 2, "batch_size": 4, "seed": 0, **options})


def run(toy: Toy, recipe: TuningRecipe | None = None, **options: Any) -> list[dict[str, Any]]:
    recipe = recipe or TuningRecipe(epochs=3, learning_rate=0.05)
    return tune(toy, options.pop("batches", batches()), recipe, **{"seed": 0, "device": CPU, **options})


def test_training_lowers_the_loss_and_tells_its_parts():
    toy = Toy()
    history = run(toy, TuningRecipe(epochs=20, learning_rate=0.05))
    assert [entry["epoch"] for entry in history] == list(range(1, 21))
    assert history[-1]["loss"] < history[0]["loss"]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["own"] + entry["gram"] + entry["cross_entropy"])
    assert torch.equal(toy.frozen, Toy().frozen)
    assert not toy.training
