"""Euler with early stopping: the deployed solver takes M of the 1/h steps and no more."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastfsl.errors import ConfigError

VelocityFunction = Callable[[Tensor, Tensor], Tensor]


def euler_states(velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float) -> Iterator[Tensor]:
    """The states x_0, x_h, ..., x_Mh of x <- x + h v(x, t), t = 0, h, 2h, ...

    Features are not renormalised between steps (the read-out normalises the last).

    Args:
        velocity_field: v(x, t) with x (n, d) and t (1,).
        x_0: source features, (n, d).
        num_steps: M >= 0.
        step_size: h in (0, 1], with M h <= 1.

    Yields:
        M + 1 states, (n, d).

    Raises:
        ConfigError: if the steps leave [0, 1].

    Source: FMA (arXiv 2510.14543), early-stopping solver.
    """
    check_steps(num_steps, step_size)
    x = x_0
    yield x
    for step in range(num_steps):
        t = torch.full((1,), step * step_size, dtype=x.dtype, device=x.device)
        x = x + step_size * velocity_field(x, t)
        yield x


def euler(velocity_field: VelocityFunction, x_0: Tensor, num_steps: int, step_size: float) -> Tensor:
    """The last of `euler_states`: x after `num_steps` steps, (n, d)."""
    x = x_0
    for state in euler_states(velocity_field, x_0, num_steps, step_size):
        x = state
    return x


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
