import itertools
import math

import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.flow import euler, euler_states


def growth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = x + t, whose solution from x_0 is (x_0 + 1) e^t - t - 1."""
    return x + t


def test_euler_converges_with_order_one():
    x_0 = torch.tensor([[1.0]], dtype=torch.float64)
    exact = 2 * math.e - 2
    errors = [abs(euler(growth, x_0, steps, 1 / steps).item() - exact) for steps in (20, 40, 80, 160)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders), orders


def test_states_are_the_steps_written_out():
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
