import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.flow import LinearPath, pair_with_class
from fastfsl.flow.path import BRIDGE_MAX_T

N, D = 4096, 3


@pytest.fixture
def ends() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, N, D, generator=generator, dtype=torch.float64))


def test_path_joins_its_ends_at_constant_velocity(ends):
    x_0, x_1 = ends
    path = LinearPath()
    for time in (0.0, 0.25, 1.0):
        sample = path.sample(x_0, x_1, torch.full((N,), time, dtype=torch.float64))
        torch.testing.assert_close(sample.x_t, (1 - time) * x_0 + time * x_1)
        torch.testing.assert_close(sample.target_velocity, x_1 - x_0)


def test_interpolant_target_is_the_time_derivative_of_its_path(ends):
    x_0, x_1 = ends
    path = LinearPath("interpolant", scale=0.3)
    eps = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, N, dtype=torch.float64).requires_grad_()
    sample = path.sample(x_0, x_1, t, eps=eps)
    for dimension in range(D):
        (derivative,) = torch.autograd.grad(sample.x_t[:, dimension].sum(), t, retain_graph=True)
        torch.testing.assert_close(sample.target_velocity[:, dimension], derivative)


def test_bridge_has_the_stated_spread_and_points_to_the_target(ends):
    x_0, x_1 = ends
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    time = 0.3
    torch.manual_seed(0)
    sample = LinearPath("bridge").sample(x_0, x_1, torch.full((N,), time, dtype=torch.float64), sigma=sigma)
    noise = sample.x_t - ((1 - time) * x_0 + time * x_1)
    torch.testing.assert_close(noise.std(dim=0), sigma * (time * (1 - time)) ** 0.5, rtol=0.05, atol=0)
    # Following the target for the remaining time arrives at x_1, from the noised point.
    torch.testing.assert_close(sample.x_t + (1 - time) * sample.target_velocity, x_1)


def test_bridge_is_the_paths_own_velocity_without_spread(ends):
    x_0, x_1 = ends
    sample = LinearPath("bridge").sample(
        x_0, x_1, torch.full((N,), 0.4, dtype=torch.float64), sigma=torch.zeros(D, dtype=torch.float64)
    )
    torch.testing.assert_close(sample.target_velocity, x_1 - x_0)


@given(st.floats(0, 1), st.sampled_from(["none", "bridge", "interpolant"]))
def test_every_target_is_finite_on_the_whole_interval(time, noise):
    x_0, x_1 = torch.ones(2, D), torch.zeros(2, D)
    sample = LinearPath(noise).sample(x_0, x_1, torch.full((2,), time), sigma=torch.ones(D))
    assert torch.isfinite(sample.target_velocity).all()
    assert torch.isfinite(sample.x_t).all()
    if noise == "bridge":
        assert sample.t.max() <= BRIDGE_MAX_T


def test_coupling_is_the_own_class():
    embeddings = torch.eye(4)
    labels = torch.tensor([2, 0, 2])
    torch.testing.assert_close(pair_with_class(labels, embeddings), embeddings[[2, 0, 2]])
    apart = torch.eye(8).unflatten(0, (4, 2))
    torch.testing.assert_close(pair_with_class(labels, apart, torch.tensor([1, 0, 0])), torch.eye(8)[[5, 0, 4]])
    with pytest.raises(ShapeError, match="with prototypes"):
        pair_with_class(labels, apart)


@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([-1])])
def test_coupling_refuses_unknown_classes(labels):
    with pytest.raises(DataError, match=r"0\.\.3"):
        pair_with_class(labels, torch.eye(4))


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="noise"):
        LinearPath("gauss")  # type: ignore[arg-type]  # what a caller without a type checker passes
    with pytest.raises(ConfigError, match="scale"):
        LinearPath("bridge", scale=float("nan"))
    with pytest.raises(ConfigError, match="sigma"):
        LinearPath("bridge").sample(torch.zeros(2, D), torch.zeros(2, D), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"\(n, d\)"):
        LinearPath().sample(torch.zeros(2, D), torch.zeros(3, D), torch.zeros(2))
