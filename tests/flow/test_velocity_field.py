import math

import pytest
import torch

from fastfsl.errors import ShapeError
from fastfsl.flow import VelocityField
from fastfsl.flow.velocity_field import time_features


@pytest.mark.parametrize(
    ("dim", "num_blocks", "millions"), [(512, 6, 9.33), (512, 12, 17.22), (1024, 6, 37.0), (1024, 12, 68.5)]
)
def test_parameter_counts_are_the_published_ones(dim, num_blocks, millions):
    with torch.device("meta"):
        field = VelocityField(dim, num_blocks)
    count = sum(parameter.numel() for parameter in field.parameters())
    assert round(count / 1e6, 2 if dim == 512 else 1) == millions


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    field = VelocityField(256, 2)
    for name, parameter in field.state_dict().items():
        if name.endswith("bias") or "modulation" in name or name == "final.output.weight":
            assert parameter.abs().max() == 0, name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.startswith("time_embedding"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / (2 * 256))  # Xavier-uniform of a square layer
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert field(torch.randn(3, 256), torch.rand(3)).abs().max() == 0


def test_field_equals_the_formula(field):
    # METHODS of the paper, written out with functional calls and one sample at a time.
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    velocity = field(x, t)
    state = field.state_dict()
    for row in range(5):
        expected = _written_out(state, x[row], float(t[row]))
        torch.testing.assert_close(velocity[row], expected, rtol=1e-10, atol=1e-10)
    assert velocity.abs().mean() > 0.1


def _written_out(state, x, t):
    def linear(name, value):
        return state[f"{name}.weight"] @ value + state[f"{name}.bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def norm(value):
        centred = value - value.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-6)

    angles = torch.tensor([1000 * t / 10_000 ** (k / 128) for k in range(128)], dtype=torch.float64)
    y = linear("time_embedding.second", silu(linear("time_embedding.first", torch.cat([angles.cos(), angles.sin()]))))
    h = linear("input", x)
    for block in range(3):
        shift, scale, gate = linear(f"blocks.{block}.modulation", silu(y)).chunk(3)
        affine = norm(h) * state[f"blocks.{block}.norm.weight"] + state[f"blocks.{block}.norm.bias"]
        hidden = silu(linear(f"blocks.{block}.first", affine * (1 + scale) + shift))
        h = h + gate * linear(f"blocks.{block}.second", hidden)
    shift, scale = linear("final.modulation", silu(y)).chunk(2)
    return linear("final.output", norm(h) * (1 + scale) + shift)


def test_time_features_start_at_one_and_zero():
    features = time_features(torch.zeros(1))
    assert features.shape == (1, 256)
    assert (features[0, :128] == 1).all()
    assert (features[0, 128:] == 0).all()


def test_shared_times_are_the_same_field(field):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 48, generator=generator, dtype=torch.float64)
    times = torch.tensor([0.1, 0.7], dtype=torch.float64)
    rows = torch.tensor([0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(field(x, times, rows), field(x, times[rows]))


def test_wrong_width_is_named(field):
    with pytest.raises(ShapeError, match="48"):
        field(torch.zeros(2, 47, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
