"""The flow matching loss, and a discriminative term on the end points that a velocity predicts."""

from torch import Tensor
from torch.nn import functional

from fastfsl.errors import ConfigError
from fastfsl.flow.path import PathSample
from fastfsl.flow.readout import class_logits
from fastfsl.flow.solver import VelocityFunction


def velocity_loss(velocity: Tensor, sample: PathSample) -> Tensor:
    """Mean over samples of sum_dims (v - u)^2, v (n, d) being the field's velocity at the sample; a scalar.

    Source: FMA (arXiv 2510.14543), training objective.
    """
    return (velocity - sample.target_velocity).square().sum(dim=-1).mean()


def endpoint_cross_entropy(
    velocity: Tensor, sample: PathSample, labels: Tensor, class_embeddings: Tensor, logit_scale: float
) -> Tensor:
    """Cross-entropy of the end point that a velocity predicts, x_t + (1 - t) v, read out as a feature.

    The end point of the true velocity is x_1: exactly on the path and on the noised bridge, and up to the noise on
    the interpolant. The squared error treats all directions alike; this one counts those that tell classes apart.

    Args:
        velocity: v(x_t, t), (n, d).
        sample: the point of the path where it was taken.
        labels: class indices, (n,).
        class_embeddings: L2-normalised, (C, d), or (C, K, d) where a class has K prototypes.
        logit_scale: factor on the cosine similarities.

    Returns:
        The mean over samples, a scalar tensor.

    Source: asked for by reviewers of FMA (arXiv 2510.14543): a discriminative loss on intermediate states.
    """
    endpoint = sample.x_t + (1.0 - sample.t)[:, None] * velocity
    return functional.cross_entropy(class_logits(endpoint, class_embeddings, logit_scale), labels)


def flow_matching_loss(
    velocity_field: VelocityFunction,
    sample: PathSample,
    *,
    weight: float = 0.0,
    labels: Tensor | None = None,
    class_embeddings: Tensor | None = None,
    logit_scale: float = 100.0,
) -> Tensor:
    """`velocity_loss` + weight * `endpoint_cross_entropy`, with one evaluation of the field.

    Args:
        velocity_field: v(x, t), (n, d) and (n,) to (n, d).
        sample: points of the path with their target velocities.
        weight: of the discriminative term, >= 0; at 0 it is not computed and needs nothing of what follows.
        labels: class indices, (n,).
        class_embeddings: L2-normalised, (C, d), or (C, K, d) where a class has K prototypes.
        logit_scale: factor on the cosine similarities.

    Returns:
        The loss, a scalar tensor.

    Raises:
        ConfigError: if the weight is negative, or positive without labels and class embeddings.

    Source: FMA (arXiv 2510.14543), training objective.
    """
    if not weight >= 0:
        raise ConfigError(f"expected a weight of the discriminative term >= 0, got {weight}")
    velocity = velocity_field(sample.x_t, sample.t)
    loss = velocity_loss(velocity, sample)
    if weight == 0:
        return loss
    if labels is None or class_embeddings is None:
        raise ConfigError("the discriminative term needs labels and class embeddings: pass both, or weight 0")
    return loss + weight * endpoint_cross_entropy(velocity, sample, labels, class_embeddings, logit_scale)
