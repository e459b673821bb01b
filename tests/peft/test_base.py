"""What holds for every source: its contract with the training loop, its state, and that it leaves its encoder alone."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastfsl.encoders import class_embeddings, weights_digest
from fastfsl.errors import DataError, ShapeError
from fastfsl.peft import CLIPAdapter, CLIPLoRA, CoCoOp, CoOp, FeatureSource

TEMPLATE = "a photo of the digit {}."
SOURCES: dict[str, Callable[..., FeatureSource]] = {
    "lora": lambda encoder, names: CLIPLoRA(encoder, names, TEMPLATE),
    "adapter": lambda encoder, names: CLIPAdapter(encoder, class_embeddings(encoder, names, TEMPLATE)),
    "coop": lambda encoder, names: CoOp(encoder, names, num_contexts=3),
    "cocoop": CoCoOp,
}


@pytest.fixture(params=SOURCES)
def make(request):
    def build(encoder, names=("cat", "dog", "bird")):
        torch.manual_seed(0)
        return SOURCES[request.param](encoder, names)

    return build


def inputs_of(source, pixels):
    return (pixels if source.takes == "pixels" else source.encoder.encode_images(pixels).clone())[:, None]


def test_loss_is_the_cross_entropy_of_the_logits(toy, make, pixels, randomised):
    source = randomised(make(toy)).eval()
    labels = torch.tensor([2, 0, 1])
    outputs, own = source(inputs_of(source, pixels), 0.5)
    assert own is None
    assert all(len(tensor) == len(pixels) for tensor in outputs.values())
    loss, parts = source.batch_loss(outputs, labels, 0.5)
    logits = source.logits(outputs).detach().double()
    expected = -(logits[torch.arange(3), labels] - logits.exp().sum(1).log()).mean()
    assert parts == {"cross_entropy": pytest.approx(float(expected), rel=1e-5)}
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_reach_exactly_the_state(toy, make, pixels, randomised):
    source = randomised(make(toy), std=0.1)
    outputs, _ = source(inputs_of(source, pixels), 0.0)
    source.batch_loss(outputs, torch.tensor([2, 0, 1]), 0.0)[0].backward()
    reached = {name for name, p in source.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(source.state())
    assert source.num_parameters == sum(array.size for array in source.state().values())


def test_encoder_is_left_as_it_was(toy, make, pixels, randomised):
    before = weights_digest(toy.model, {})
    source = randomised(make(toy))
    tuned = source.train().tuned_encoder()
    assert weights_digest(toy.model, {}) == before
    assert not any(module.training for module in toy.model.modules())
    assert not any(parameter.requires_grad for parameter in [*toy.model.parameters(), *tuned.model.parameters()])
    assert tuned.encode_images(pixels).shape == (3, 32)


def test_state_goes_into_another_source(toy, make, pixels, randomised):
    source, other = randomised(make(toy)).eval(), make(toy).eval()
    inputs = inputs_of(source, pixels)
    assert not torch.equal(other.logits(other(inputs, 0.0)[0]), source.logits(source(inputs, 0.0)[0]))
    state = source.state()
    other.load_state(state)
    assert torch.equal(other.logits(other(inputs, 0.0)[0]), source.logits(source(inputs, 0.0)[0]))
    assert other.tuned_encoder().digest == source.tuned_encoder().digest
    other.encoder = dataclasses.replace(toy, digest="another")
    assert other.digest() != source.digest()
    for array in state.values():
        array[:] = 0  # a copy
    assert other.state().keys() == state.keys()
    assert all(array.any() for array in source.state().values())


def test_state_that_does_not_fit_is_refused_whole(toy, make):
    source = make(toy)
    good = source.state()
    name = min(good)
    for bad, message in (
        ({key: array for key, array in good.items() if key != name}, rf"not in both: {name}\)"),
        (good | {"more": np.zeros(1, np.float32)}, r"not in both: more\)"),
        (good | {name: good[name][None]}, f"expected {name} .* got float32"),
        (good | {name: np.zeros(good[name].shape, np.int64)}, "int64"),
        (good | {name: np.full_like(good[name], np.nan)}, "NaN"),
    ):
        with pytest.raises(DataError, match=message):
            source.load_state({key: array + (key != name) for key, array in bad.items()})
        assert all(np.array_equal(array, good[key]) for key, array in source.state().items())


def test_takes_one_view(toy, make, pixels):
    source = make(toy)
    inputs = inputs_of(source, pixels)
    for wrong in (inputs[:, 0], inputs.expand(-1, 2, *inputs.shape[2:])):
        with pytest.raises(ShapeError, match="one view a sample"):
            source(wrong, 0.0)


def test_steps_lower_the_training_loss(tiny, make, digits):
    images, labels, names = digits
    source = make(tiny, names)
    inputs = inputs_of(source, images)
    optimizer = torch.optim.AdamW([p for p in source.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss, _ = source.batch_loss(source(inputs, 0.0)[0], labels, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_leaves_logits_and_loss_in_float32(toy, make, pixels, randomised):
    source = randomised(make(toy), std=0.1).eval()
    inputs, labels = inputs_of(source, pixels), torch.tensor([2, 0, 1])
    exact = source.logits(source(inputs, 0.0)[0])
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = source(inputs, 0.0)
        logits, (loss, _) = source.logits(outputs), source.batch_loss(outputs, labels, 0.0)
    assert {tensor.dtype for tensor in (*outputs.values(), logits, loss)} == {torch.float32}
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
