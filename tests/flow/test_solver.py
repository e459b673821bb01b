import itertools
import math

import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.flow import euler, euler_states, solve, solver_states


def riccati(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = -2 t x^2, not linear and not autonomous, whose solution from x_0 is x_0 / (1 + x_0 t^2)."""
    return -2 * t * x**2


def growth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = x + t."""
    return x + t


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_each_solver_converges_with_its_order(solver, order):
    x_0 = torch.tensor([[1.0, 0.5, -0.4]], dtype=torch.float64)
    exact = x_0 / (1 + x_0)
    errors = [(solve(riccati, x_0, steps, 1 / steps, solver) - exact).norm().item() for steps in (40, 80, 160, 320)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.15 for value in measured), measured


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_states_are_the_steps_and_each_costs_what_is_said(solver, evaluations):
    times = []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.item())
        return growth(x, t)

    x_0 = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    states = list(solver_states(counted, x_0, 3, 0.1, solver))
    assert len(states) == 4
    assert len(times) == 3 * evaluations
    assert 0 <= min(times) <= max(times) <= 0.3 + 1e-12
    assert states[0] is x_0
    for step in range(3):  # every state is where solving from the start with fewer steps ends
        torch.testing.assert_close(states[step + 1], solve(growth, x_0, step + 1, 0.1, solver))


def test_euler_states_are_the_steps_written_out():
    x_0 = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    states = list(euler_states(growth, x_0, 3, 0.1))
    expected = [x_0]
    for step in range(3):
        expected.append(expected[-1] + 0.1 * (expected[-1] + 0.1 * step))
    assert len(states) == 4
    for state, value in zip(states, expected, strict=True):
        torch.testing.assert_close(state, value)


def test_zero_steps_leave_the_features():
    x_0 = torch.randn(2, 3)
    assert euler(growth, x_0, 0, 0.1) is x_0


@pytest.mark.parametrize(("num_steps", "step_size"), [(-1, 0.1), (11, 0.1), (1, 0.0), (1, 1.5), (3, float("nan"))])
def test_steps_beyond_the_path_are_refused(num_steps, step_size):
    with pytest.raises(ConfigError, match="num_steps"):
        euler(growth, torch.zeros(1, 1), num_steps, step_size)


def test_unknown_solvers_are_refused():
    with pytest.raises(ConfigError, match=r"'heun'.*got 'midpoint'"):
        solve(growth, torch.zeros(1, 1), 1, 0.1, "midpoint")  # type: ignore[arg-type]  # what an untyped caller passes
