import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfsl.errors import ConfigError, DeviceError
from fastfsl.fit.batches import FeatureBatches, derived_seed
from fastfsl.fit.objective import take_gradient
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
        self.unused = nn.Parameter(torch.empty(DIM))
        self.frozen = nn.Parameter(torch.empty(DIM), requires_grad=False)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.dropout = nn.Dropout(dropout)
        self.progress: list[float] = []
        self.modes: set[bool] = set()

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        self.progress.append(progress)
        self.modes.add(self.training)
        hidden = self.dropout(self.layer(inputs)) + self.frozen
        return {"hidden": hidden, "plain": inputs}, (1 + progress) * hidden.square().mean()

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        rows = torch.cat([outputs["hidden"], outputs["plain"]], dim=1).flatten(0, 1).tanh()
        gram = (rows @ rows.T).square().mean()
        logits = self.dropout(outputs["hidden"].mean(dim=1)) @ self.texts.T
        cross_entropy = (1 + progress) * nn.functional.cross_entropy(logits, labels)
        return gram + cross_entropy, {"gram": gram.item(), "cross_entropy": cross_entropy.item()}


class OwnOnly(Toy):
    """No loss over the batch."""

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        outputs, own = super().forward(inputs, progress)
        return {"plain": outputs["plain"]}, own

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        return torch.zeros(()), {}


def batches(num_samples: int = 11, **options: Any) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_samples, 4, DIM, generator=generator)
    labels = torch.arange(num_samples) % NUM_CLASSES
    return FeatureBatches(features, labels, **{"num_views": 2, "batch_size": 4, "seed": 0, **options})


def run(toy: Toy, recipe: TuningRecipe | None = None, **options: Any) -> list[dict[str, Any]]:
    recipe = recipe or TuningRecipe(epochs=3, learning_rate=0.05)
    return tune(toy, options.pop("batches", batches()), recipe, **{"seed": 0, "device": CPU, **options})


def weights(toy: Toy) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in toy.parameters()])


def gradients(toy: Toy) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in toy.named_parameters()}


def assert_same_gradients(toy: Toy, expected: Toy) -> None:
    for (name, gradient), other in zip(gradients(toy).items(), gradients(expected).values(), strict=True):
        if other is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [Toy, OwnOnly])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100, None])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(kind, micro_batch):
    inputs = torch.randn(7, 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7) % NUM_CLASSES
    plain = kind().double()
    outputs, own = plain.forward(inputs, 0.25)
    loss = own + plain.batch_loss(outputs, labels, 0.25)[0]
    loss.backward()

    toy = kind().double()
    report = take_gradient(toy, inputs, labels, 0.25, seed=0, micro_batch=micro_batch)
    assert_same_gradients(toy, plain)
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert report["own"] == pytest.approx(own.item(), rel=1e-12)


def test_dropout_is_the_same_when_the_outputs_are_computed_again():
    inputs = torch.randn(7, 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7) % NUM_CLASSES
    plain = Toy(dropout=0.5).double()
    parts = []
    for start in (0, 3, 6):
        torch.manual_seed(derived_seed(5, "part", start))
        parts.append(plain.forward(inputs[start : start + 3], 0.0))
    outputs = {name: torch.cat([part[name] for part, _ in parts]) for name in ("hidden", "plain")}
    torch.manual_seed(derived_seed(5, "batch"))
    loss, _ = plain.batch_loss(outputs, labels, 0.0)
    for (_, own), size in zip(parts, (3, 3, 1), strict=True):
        assert own is not None
        loss = loss + own * size / 7
    loss.backward()

    toy = Toy(dropout=0.5).double()
    take_gradient(toy, inputs, labels, 0.0, seed=5, micro_batch=3)
    assert_same_gradients(toy, plain)


@pytest.mark.parametrize("schedule", ["epoch", "update"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_the_plain_loop(optimizer, schedule):
    recipe = TuningRecipe(
        epochs=3, optimizer=optimizer, learning_rate=0.05, weight_decay=0.1, warmup_rate=1e-3, schedule=schedule
    )
    plain = Toy()
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    steps: torch.optim.Optimizer
    if optimizer == "sgd":
        steps = torch.optim.SGD(trained, momentum=0.9, weight_decay=0.1)
    else:
        steps = torch.optim.AdamW(trained, weight_decay=0.1)
    for epoch in range(3):
        for number, (inputs, labels) in enumerate(batches().epoch(epoch)):
            # one epoch of three updates at the constant rate, then half a cosine: over the six that are left, or an
            # epoch each over as many as there are, of which one is missing
            done = ((epoch - 1) * 3 + number) / 6 if schedule == "update" else (epoch - 1) / 3
            progress = (epoch * 3 + number) / 9 if schedule == "update" else epoch / 3
            rate = 1e-3 if epoch == 0 else 0.05 * (1 + math.cos(math.pi * done)) / 2
            for group in steps.param_groups:
                group["lr"] = rate
            steps.zero_grad()
            outputs, own = plain.forward(inputs, progress)
            assert own is not None
            (own + plain.batch_loss(outputs, labels, progress)[0]).backward()
            steps.step()

    toy = Toy()
    history = run(toy, recipe)
    torch.testing.assert_close(weights(toy), weights(plain), rtol=1e-5, atol=1e-6)
    by_update = schedule == "update"
    assert toy.progress == pytest.approx([update / 9 if by_update else update // 3 / 3 for update in range(9)])
    last = (1 / 3, 5 / 6) if by_update else (0, 1 / 3)
    assert [entry["learning_rate"] for entry in history] == pytest.approx(
        [1e-3, *(0.05 * (1 + math.cos(math.pi * done)) / 2 for done in last)]
    )


def test_rates_by_epoch_are_those_of_the_scheduler_that_the_released_trainers_step():
    """Half a cosine over all epochs, stepped once an epoch from the end of the warm-up on: it never comes near 0."""
    recipe = TuningRecipe(epochs=10, learning_rate=0.002)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = [1e-5]
    for _ in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [recipe.rate_at(5 * epoch, 5) for epoch in range(10)] == pytest.approx(expected)
    assert all(recipe.rate_at(u, 5) == recipe.rate_at(u - u % 5, 5) for u in range(50))
    assert expected[-1] > 0.09 * recipe.learning_rate


def test_rates_by_update_end_at_the_final_rate_as_clip_loras():
    recipe = TuningRecipe(epochs=4, learning_rate=2e-4, warmup_epochs=0, schedule="update", final_rate=1e-6)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=1e-6)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [recipe.rate_at(update, 3) for update in range(12)] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_history_holds_the_means_of_all_losses_and_what_evaluate_says():
    epochs: list[tuple[int, int]] = []
    toy = Toy()
    toy.eval()

    def evaluate(done: int) -> dict[str, float] | None:
        assert not toy.training
        return {"accuracy": 0.5} if done == 2 else None

    history = run(
        toy,
        TuningRecipe(epochs=20, learning_rate=0.05),
        evaluate=evaluate,
        on_epoch=lambda done, total: epochs.append((done, total)),
    )
    assert epochs == [(done, 20) for done in range(1, 21)]
    assert [entry["epoch"] for entry in history] == list(range(1, 21))
    assert [entry.get("accuracy") for entry in history[:3]] == [None, 0.5, None]
    assert history[-1]["loss"] < history[0]["loss"]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["own"] + entry["gram"] + entry["cross_entropy"])
        assert entry["seconds"] >= 0
    assert torch.equal(toy.frozen, Toy().frozen)
    assert torch.equal(toy.unused, Toy().unused)
    assert toy.modes == {True}
    assert not toy.training


def test_history_weighs_batches_by_their_samples():
    recipe = TuningRecipe(epochs=1, warmup_rate=1e-12, schedule="update")  # too small a rate to change the weights
    history = run(OwnOnly(), recipe)
    owns = [(len(labels), OwnOnly().forward(inputs, k / 3)[1]) for k, (inputs, labels) in enumerate(batches().epoch(0))]
    assert [size for size, _ in owns] == [4, 4, 3]
    assert history[0]["loss"] == pytest.approx(sum(size * own.item() for size, own in owns if own is not None) / 11)


def test_randomness_comes_from_the_seed_alone():
    first, again, other = (Toy(dropout=0.5) for _ in range(3))
    run(first)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    run(again)
    assert torch.equal(torch.get_rng_state(), before)
    run(other, seed=1)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_bf16_keeps_the_weights_in_float32():
    toy, exact = Toy(), Toy()
    run(toy, TuningRecipe(epochs=3, learning_rate=0.05, precision="bf16"))
    run(exact)
    assert toy.layer.weight.dtype == torch.float32
    assert not torch.equal(weights(toy), weights(exact))
    torch.testing.assert_close(weights(toy), weights(exact), rtol=0.05, atol=0.05)


def test_a_scaled_loss_gives_the_same_weights(monkeypatch):
    # what fp16 does on CUDA; powers of two leave no rounding behind
    toy, exact = Toy(), Toy()
    run(exact, TuningRecipe(epochs=3, learning_rate=0.05, micro_batch=3))
    plain = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: plain(device, init_scale=2.0**10))
    run(toy, TuningRecipe(epochs=3, learning_rate=0.05, micro_batch=3))
    torch.testing.assert_close(weights(toy), weights(exact), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_updates_whose_scaled_gradients_overflow_leave_no_trace(monkeypatch, optimizer):
    scales: list[torch.amp.GradScaler] = []

    def scaler(device, enabled):
        del enabled
        scales.append(torch.amp.grad_scaler.GradScaler(device, init_scale=2.0**22))
        return scales[-1]

    monkeypatch.setattr(TuningRecipe, "autocast_dtype", lambda _recipe, _device: torch.float16)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, torch.nan))
    toy = Toy()
    run(toy, TuningRecipe(epochs=4, warmup_epochs=0, optimizer=optimizer))
    assert scales[0].get_scale() < 2.0**22  # the first was left out
    assert weights(toy).isfinite().all()
    assert not torch.equal(weights(toy), weights(Toy()))


@pytest.mark.parametrize("recipe", [{"learning_rate": 1e30}, {"warmup_rate": 1e38, "epochs": 1}])
def test_divergence_is_told(recipe):
    with pytest.raises(ConfigError, match=r"diverged.*lower learning_rate"):
        run(Toy(), TuningRecipe(**{"epochs": 3, **recipe}))


def test_weights_that_end_up_infinite_are_told():
    class Steep(OwnOnly):
        def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
            return {}, (0 * self.layer(inputs)).square().mean().sqrt()  # 0, but with no finite gradient

    with pytest.raises(ConfigError, match="expected finite weights"):
        run(Steep(), TuningRecipe(epochs=1), batches=batches(batch_size=11))


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="got none with requires_grad"):
        run(Toy().requires_grad_(requires_grad=False))


def test_an_objective_elsewhere_is_told():
    with pytest.raises(DeviceError, match="expected the objective on cpu, got parameters on meta"):
        run(Toy().to("meta"))


def test_a_card_that_is_too_small_is_told(monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError

    toy = Toy()
    monkeypatch.setattr(toy, "forward", forward)
    with pytest.raises(DeviceError, match="too small for 3 samples at once: set micro_batch"):
        run(toy, TuningRecipe(micro_batch=3))


def test_fp16_needs_cuda():
    with pytest.raises(ConfigError, match="got fp16"):
        run(Toy(), TuningRecipe(precision="fp16"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"num_views": 0},
        {"micro_batch": 0},
        {"epochs": 2, "warmup_epochs": 3},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup_rate": -1e-5},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"optimizer": "adam"},
        {"schedule": "batch"},
        {"final_rate": 0.1},
        {"precision": "fp8"},
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        TuningRecipe(**wrong)
