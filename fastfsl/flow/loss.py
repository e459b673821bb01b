"""The flow matching loss."""

from torch import Tensor

from fastfsl.flow.path import PathSample
from fastfsl.flow.solver import VelocityFunction


def flow_matching_loss(velocity_field: VelocityFunction, sample: PathSample) -> Tensor:
    """Mean over samples of sum_dims (v(x_t, t) - u)^2.

    Args:
        velocity_field: v(x, t), (n, d) and (n,) to (n, d).
        sample: a point of the path with its target velocity u.

    Returns:
        The loss, a scalar tensor.

    Source: FMA (arXiv 2510.14543), training objective.
    """
    return (velocity_field(sample.x_t, sample.t) - sample.target_velocity).square().sum(dim=-1).mean()
