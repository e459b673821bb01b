"""Solvers of dx/dt = v(x, t): Euler, which is what is deployed, and Heun and RK4 for comparison.

All stop early: they take M of the 1/h steps and no more. Features are not renormalised between steps (the read-out
normalises).
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fastfsl.errors import ConfigError

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "heun", "rk4"]

_Step = Callable[[VelocityFunction, Tensor, float, float], Tensor]


def solver_states(
    velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float, solver: Solver = "euler"
) -> Iterator[Tensor]:
    """The states x_0, x_h, ..., x_Mh at t = 0, h, 2h, ..., Mh.

    With k_1 = v(x, t), a step x <- x + h k is

    - `euler`, order 1, one evaluation: k = k_1;
    - `heun` (explicit trapezoid), order 2, two: k = (k_1 + v(x + h k_1, t + h)) / 2;
    - `rk4`, order 4, four: k = (k_1 + 2 k_2 + 2 k_3 + k_4) / 6 with k_2 = v(x + h/2 k_1, t + h/2),
      k_3 = v(x + h/2 k_2, t + h/2), k_4 = v(x + h k_3, t + h).

    Args:
        velocity_field: v(x, t) with x (n, d) and t (1,).
        x_0: source features, (n, d).
        num_steps: M >= 0.
        step_size: h in (0, 1], with M h <= 1.
        solver: which.

    Yields:
        M + 1 states, (n, d).

    Raises:
        ConfigError: if the steps leave [0, 1] or the solver is unknown.

    Source: FMA (arXiv 2510.14543), early-stopping solver (Euler); Hairer, Norsett and Wanner, "Solving Ordinary
        Differential Equations I", II.1.
    """
    check_steps(num_steps, step_size)
    check_solver(solver)
    x = x_0
    yield x
    for step in range(num_steps):
        x = _STEPS[solver](velocity_field, x, step * step_size, step_size)
        yield x


def solve(
    velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float, solver: Solver = "euler"
) -> Tensor:
    """The last of `solver_states`: x after `num_steps` steps, (n, d)."""
    x = x_0
    for state in solver_states(velocity_field, x_0, num_steps, step_size, solver):
        x = state
    return x


def euler_states(velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float) -> Iterator[Tensor]:
    """`solver_states` of the solver that is deployed."""
    return solver_states(velocity_field, x_0, num_steps, step_size, "euler")


def euler(velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float) -> Tensor:
    """`solve` by the solver that is deployed."""
    return solve(velocity_field, x_0, num_steps, step_size, "euler")


def check_steps(num_steps: int, step_size: float) -> None:
    """Refuse steps that leave t in [0, 1].

    Raises:
        ConfigError: if num_steps < 0, or step_size is not in (0, 1], or their product exceeds 1.
    """
    if num_steps < 0 or not 0.0 < step_size <= 1.0 or num_steps * step_size > 1.0 + 1e-9:
        raise ConfigError(
            f"expected num_steps >= 0 and step_size in (0, 1] with num_steps * step_size <= 1, got {num_steps} and "
            f"{step_size}: lower one of them"
        )


def check_solver(solver: str) -> None:
    """Refuse a solver that there is not.

    Raises:
        ConfigError: naming those that there are.
    """
    if solver not in _STEPS:
        raise ConfigError(f"expected solver {', '.join(map(repr, _STEPS))}, got {solver!r}")


def velocity_at(velocity_field: VelocityFunction, x: Tensor, t: float) -> Tensor:
    """v(x, t) of states (n, d) at one time, (n, d)."""
    return velocity_field(x, torch.full((1,), t, dtype=x.dtype, device=x.device))


def _euler_step(velocity_field: VelocityFunction, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * velocity_at(velocity_field, x, t)


def _heun_step(velocity_field: VelocityFunction, x: Tensor, t: float, h: float) -> Tensor:
    k_1 = velocity_at(velocity_field, x, t)
    k_2 = velocity_at(velocity_field, x + h * k_1, t + h)
    return x + h / 2 * (k_1 + k_2)


def _rk4_step(velocity_field: VelocityFunction, x: Tensor, t: float, h: float) -> Tensor:
    k_1 = velocity_at(velocity_field, x, t)
    k_2 = velocity_at(velocity_field, x + h / 2 * k_1, t + h / 2)
    k_3 = velocity_at(velocity_field, x + h / 2 * k_2, t + h / 2)
    k_4 = velocity_at(velocity_field, x + h * k_3, t + h)
    return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


_STEPS: dict[str, _Step] = {"euler": _euler_step, "heun": _heun_step, "rk4": _rk4_step}
