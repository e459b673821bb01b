"""From features to class logits."""

from torch import Tensor
from torch.nn import functional


def normalize(features: Tensor) -> Tensor:
    """Features of unit length, x / ||x||_2, (n, d)."""
    return functional.normalize(features, dim=-1)


def class_logits(features: Tensor, class_embeddings: Tensor, logit_scale: float) -> Tensor:
    """Cosine similarity with every class embedding, times the logit scale.

    Args:
        features: (n, d), of any length.
        class_embeddings: L2-normalised, (C, d).
        logit_scale: exp of CLIP's learned temperature, 100 for OpenAI CLIP.

    Returns:
        Logits, (n, C).

    Source: FMA (arXiv 2510.14543), read-out.
    """
    return logit_scale * normalize(features) @ class_embeddings.T
