"""From features to class logits: of one state, or averaged over several."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfsl.errors import ConfigError


def normalize(features: Tensor) -> Tensor:
    """Features of unit length, x / ||x||_2, (n, d)."""
    return functional.normalize(features, dim=-1)


def class_logits(features: Tensor, class_embeddings: Tensor, logit_scale: float) -> Tensor:
    """Cosine similarity with every class embedding, times the logit scale; of several prototypes the largest counts.

    Args:
        features: (n, d), of any length.
        class_embeddings: L2-normalised, (C, d), or (C, K, d) where a class has K prototypes.
        logit_scale: exp of CLIP's learned temperature, 100 for OpenAI CLIP.

    Returns:
        Logits, (n, C).

    Source: FMA (arXiv 2510.14543), read-out.
    """
    logits = logit_scale * normalize(features) @ class_embeddings.flatten(0, -2).T
    return logits if class_embeddings.ndim == 2 else logits.unflatten(1, class_embeddings.shape[:2]).amax(dim=2)


def read_out(states: Sequence[Tensor], class_embeddings: Tensor, logit_scale: float) -> Tensor:
    """Logits of a flow's states: of one state its `class_logits`, of K > 1 the log of their mean probabilities.

    log((1/K) sum_k softmax(logit_scale cos(x_k, class_embeddings))), by logsumexp, so that no probability underflows.

    Args:
        states: K >= 1 states, each (n, d), of any length.
        class_embeddings: L2-normalised, (C, d), or of several prototypes as for `class_logits`.
        logit_scale: factor on the cosine similarities.

    Returns:
        Logits, (n, C); of several states they are log-probabilities.

    Raises:
        ConfigError: if there is no state.

    Source: FMA (arXiv 2510.14543), read-out; the released code sums the softmax at steps 0, 4 and 8 of 10.
    """
    if not states:
        raise ConfigError("expected at least one state to read out, got none")
    logits = [class_logits(state, class_embeddings, logit_scale) for state in states]
    if len(logits) == 1:
        return logits[0]
    return torch.stack(logits).log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def check_read_steps(read_steps: Sequence[int], num_steps: int) -> None:
    """Refuse steps that cannot be read out.

    Args:
        read_steps: steps after which the state is read, 0 being the source.
        num_steps: M, the steps that there are.

    Raises:
        ConfigError: if they are not one or more ascending numbers in 0..M.
    """
    steps = list(read_steps)
    if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] > num_steps:
        raise ConfigError(f"expected one or more ascending read-out steps in 0..{num_steps}, got {steps}")
