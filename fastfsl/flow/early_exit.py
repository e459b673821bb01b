"""Euler steps that each sample leaves when it has gone far enough: an option of inference in torch."""

import torch
from torch import Tensor

from fastfsl.errors import ConfigError, ShapeError
from fastfsl.flow.readout import class_logits
from fastfsl.flow.solver import VelocityFunction, check_steps, velocity_at


def euler_early_exit(
    velocity_field: VelocityFunction,
    x_0: Tensor,
    num_steps: int,
    step_size: float,
    class_embeddings: Tensor,
    logit_scale: float,
    *,
    margin: float | None = None,
    velocity_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Euler steps that stop sample by sample: when the answer is clear, when it hardly moves, or after M steps.

    A sample stops at x_k, k < M, if p_1 - p_2 >= `margin` for its two largest probabilities, p = softmax(logit_scale
    cos(x_k, class_embeddings)), or if ||v(x_k, t_k)|| < `velocity_norm`; that velocity is no longer followed. Samples
    that have stopped are taken out of the batch. An exported plan always takes its fixed number of steps: a graph has
    no batch that shrinks.

    Args:
        velocity_field: v(x, t) with x (n, d) and t (1,).
        x_0: source features, (n, d).
        num_steps: M >= 0, the steps taken at most.
        step_size: h in (0, 1], with M h <= 1.
        class_embeddings: L2-normalised, (C, d) or (C, K, d), C >= 2.
        logit_scale: factor on the cosine similarities.
        margin: difference of probabilities in (0, 1]; None: no such criterion.
        velocity_norm: length of the velocity, > 0; None: no such criterion.

    Returns:
        The states where the samples stopped, (n, d), not normalised, and the steps each took, (n,) int64.

    Raises:
        ConfigError: if the steps leave [0, 1] or a criterion is out of its range.
        ShapeError: if the features or the class embeddings do not fit.

    Source: asked for by reviewers of FMA (arXiv 2510.14543), whose step count is one for the whole data set.
    """
    check_steps(num_steps, step_size)
    check_exits(margin, velocity_norm)
    if x_0.ndim != 2 or class_embeddings.ndim not in (2, 3) or len(class_embeddings) < 2:
        raise ShapeError(
            f"expected features (n, d) and class embeddings (C, d) or (C, K, d) of two classes or more, got "
            f"{tuple(x_0.shape)} and {tuple(class_embeddings.shape)}"
        )
    stopped_at = x_0.clone()
    steps = torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device)
    rows = torch.arange(len(x_0), device=x_0.device)
    x = x_0
    for step in range(num_steps):
        if margin is not None:
            best = class_logits(x, class_embeddings, logit_scale).softmax(dim=-1).topk(2, dim=-1).values
            unclear = best[:, 0] - best[:, 1] < margin
            rows, x = rows[unclear], x[unclear]
        if len(rows) == 0:
            break
        velocity = velocity_at(velocity_field, x, step * step_size)
        if velocity_norm is not None:
            moving = velocity.norm(dim=-1) >= velocity_norm
            rows, x, velocity = rows[moving], x[moving], velocity[moving]
        x = x + step_size * velocity
        stopped_at[rows] = x
        steps[rows] = step + 1
    return stopped_at, steps


def check_exits(margin: float | None, velocity_norm: float | None) -> None:
    """Refuse criteria that are out of their range.

    Raises:
        ConfigError: naming both.
    """
    if (margin is not None and not 0 < margin <= 1) or (velocity_norm is not None and not velocity_norm > 0):
        raise ConfigError(f"expected margin in (0, 1] and velocity_norm > 0, got {margin} and {velocity_norm}")
