"""The tuned tower against two full branches over all tokens, block by block, in float64."""

from functools import partial
from types import SimpleNamespace
from typing import cast

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfsl.encoders import load_encoder
from fastfsl.errors import ConfigError, DataError
from fastfsl.manifold import TowerOutput, TunedTower

OUTPUTS = ("tuned", "frozen", "tuned_tokens", "frozen_tokens", "last_stream", "previous_stream")

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def _loss(output: TowerOutput | SimpleNamespace, names: list[str]) -> Tensor:
    """A sum in which every number of the outputs has a weight of its own."""
    generator = torch.Generator().manual_seed(9)
    values = torch.cat([getattr(output, name).flatten() for name in names])
    return (torch.randn(values.shape, generator=generator, dtype=torch.float64) * values.sin()).sum()


def _trained(tower: TunedTower) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}


def _gradients(tower: TunedTower) -> dict[str, Tensor]:
    return {name: cast("Tensor", parameter.grad).clone() for name, parameter in _trained(tower).items()}


def test_inference_is_two_full_branches(pair, pixels):
    tower, straightforward = pair
    images = pixels(straightforward.frozen, 3)
    expected = straightforward(images)
    for branch, wanted in zip(tower(images), (expected.tuned, expected.frozen), strict=True):
        assert_equal(branch, wanted)
    assert (expected.tuned - expected.frozen).abs().max() > 1e-2  # the two branches differ, so neither stands for both


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("streams", [True, False])
def test_training_is_two_full_branches_in_values_and_gradients(pair, pixels, local, streams):
    tower, straightforward = pair
    images = pixels(straightforward.frozen, 3)
    into = images.clone().requires_grad_()  # no gradient passes the trunk
    output = tower.training_output(into, local=local, streams=streams)
    expected = straightforward(images)
    wanted = {"tuned", "frozen"} | ({"tuned_tokens", "frozen_tokens"} if local else set())
    wanted |= {"last_stream", "previous_stream"} if streams else set()
    for name in OUTPUTS:
        if name in wanted:
            assert_equal(getattr(output, name), getattr(expected, name))
            assert getattr(output, name).requires_grad == (not name.startswith("frozen"))
        else:
            assert getattr(output, name) is None

    for side in (output, expected):
        _loss(side, sorted(name for name in wanted if not name.startswith("frozen"))).backward()
    expected_gradients = straightforward.gradients()
    for name, gradient in _gradients(tower).items():
        assert_equal(gradient, expected_gradients[name], msg=f"the gradient of {name} differs")
    assert all(parameter.grad is None for parameter in tower.parameters() if not parameter.requires_grad)


def test_before_the_first_step_both_branches_are_the_frozen_encoder(visual, pixels):
    images = pixels(visual, 3).float()
    tower = TunedTower(visual.float())
    expected = F.normalize(visual(images), dim=-1)
    output = tower.training_output(images, local=True, streams=False)
    for features in (*tower(images), output.tuned, output.frozen):
        torch.testing.assert_close(F.normalize(features, dim=-1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.tuned_tokens, output.frozen_tokens, rtol=0, atol=1e-5)


def test_the_embedded_encoder_is_reproduced(pixels):
    encoder = load_encoder("tiny-clip")
    visual = encoder.model.get_submodule("visual")
    images = pixels(visual, 4).float()
    expected = encoder.encode_images(images)
    tower = TunedTower(visual)
    assert (len(tower.lower), len(tower.middle), len(tower.upper)) == (2, 2, 2)
    with torch.inference_mode():
        for features in tower(images):
            torch.testing.assert_close(F.normalize(features, dim=-1), expected, rtol=0, atol=1e-6)


def test_vit_b_16_trains_the_published_number_of_parameters():
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
        before = sum(parameter.numel() for parameter in model.visual.parameters())
        tower = TunedTower(model.visual)
    assert sum(parameter.numel() for parameter in _trained(tower).values()) == 31_105_536
    assert sum(parameter.numel() for parameter in tower.parameters()) == before + 31_105_536


@pytest.mark.parametrize(
    ("depth", "thirds"),
    [(5, (2, 1, 2)), (6, (2, 2, 2)), (7, (2, 3, 2)), (8, (3, 2, 3)), (12, (4, 4, 4)), (24, (8, 8, 8))],
)
def test_any_depth_is_cut_in_thirds(make_tower, depth, thirds):
    tower = TunedTower(make_tower(layers=depth, width=8))
    assert (len(tower.lower), len(tower.middle), len(tower.upper)) == thirds
    assert len(tower.parallel) == thirds[1]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_too_shallow_a_tower_is_refused(make_tower, depth):
    with pytest.raises(ConfigError, match=rf"has {depth} blocks.*at least 2.*at least 5 blocks"):
        TunedTower(make_tower(layers=depth, width=8))


def test_only_the_trained_parameters_are_copies(visual):
    own = set(visual.parameters())
    tower = TunedTower(visual)
    assert own <= set(tower.parameters())
    assert set(tower.parameters()) - own == set(_trained(tower).values())
    assert not any(parameter.requires_grad for parameter in own)


@pytest.mark.parametrize(
    ("run", "frozen_last", "tuned_last"),
    [
        (lambda tower, images: tower.training_output(images, local=True, streams=True), [85, 85], [85 + 5, 85 + 10]),
        (lambda tower, images: tower.training_output(images, local=False, streams=True), [85, 5], [85 + 5, 5 + 10]),
        (lambda tower, images: tower.training_output(images, local=False, streams=False), [85, 5], [85, 5]),
        (lambda tower, images: tower(images), [85, 5], [85, 5]),
    ],
)
def test_nothing_is_computed_twice_or_in_vain(make_tower, pixels, run, frozen_last, tuned_last):
    visual = make_tower()
    tower = TunedTower(visual)
    tokens: dict[nn.Module, int] = {}

    def count(module, arguments, result):
        tokens[module] = tokens.get(module, 0) + result[..., 0].numel()

    for block in (*tower.lower, *tower.middle, *tower.frozen_upper, *tower.upper):
        tokens[block.mlp] = 0
        block.mlp.register_forward_hook(count)
    run(tower, pixels(visual, 5))  # 5 images of 16 patches and a class token
    assert list(tokens.values()) == [85, 85, 85, 85 * 2, *frozen_last, *tuned_last]


def _backward(tower: TunedTower, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and how many numbers the graph kept for them."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    tower.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower.training_output(images, local=True, streams=True)
    _loss(output, ["last_stream", "previous_stream", "tuned", "tuned_tokens"]).backward()
    return _gradients(tower), kept


def test_checkpointing_keeps_less_and_gives_the_same_gradients(make_tower, pixels, randomise):
    tower = TunedTower(make_tower(layers=12))
    randomise(tower.parallel, 1)
    images = pixels(make_tower(), 3)
    gradients, kept = _backward(tower, images)
    tower.checkpointing = True
    again, kept_with_checkpointing = _backward(tower, images)
    assert kept_with_checkpointing < kept / 3
    for name, gradient in gradients.items():
        assert_equal(again[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_nearly_the_same(visual, pixels, randomise, dtype):
    images = pixels(visual, 2).float()
    tower = TunedTower(visual.float())
    randomise(tower.parallel, 1)
    exact = tower.training_output(images, local=True, streams=True)
    with torch.autocast("cpu", dtype):
        output = tower.training_output(images, local=True, streams=True)
    _loss(output, ["last_stream", "previous_stream", "tuned", "tuned_tokens"]).backward()
    for name in OUTPUTS:
        cosine = F.cosine_similarity(getattr(output, name).float(), getattr(exact, name), dim=-1)
        assert cosine.min() > (0.9999 if dtype == torch.float16 else 0.995)
    for gradient in _gradients(tower).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_training_mode_brings_no_dropout(make_tower, pixels):
    tower = TunedTower(make_tower(patch_dropout=0.5)).train()
    images = pixels(make_tower(), 2)
    torch.testing.assert_close(tower(images), tower(images), rtol=0, atol=0)
    assert not any(module.training for module in tower.modules())


def test_the_trained_tensors_go_and_come_back_by_name(make_tower, pixels, randomise):
    tower, other = TunedTower(make_tower()), TunedTower(make_tower())
    randomise(tower.parallel, 1)
    randomise(tower.upper, 2)
    randomise(tower.head, 3)
    state = tower.state()
    assert set(state) == set(_trained(tower))
    assert {"parallel.0.weight", "upper.1.in_weight", "head.norm.bias", "head.projection.weight"} <= set(state)
    images = pixels(make_tower(), 2)
    expected = tower(images)
    with torch.no_grad():
        for parameter in _trained(tower).values():
            parameter.zero_()  # the state is a copy
    other.load_state(state)
    torch.testing.assert_close(other(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.norm.weight"), "head.norm.weight is missing"),
        (lambda state: state.update(extra=np.zeros(1)), "extra is unknown"),
        (
            lambda state: state.update({"parallel.1.weight": np.zeros((3, 32))}),
            r"parallel.1.weight is \(3, 32\), expected \(32, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(make_tower, change, message):
    tower = TunedTower(make_tower())
    state = tower.state()
    change(state)
    with pytest.raises(DataError, match=message):
        tower.load_state(state)
