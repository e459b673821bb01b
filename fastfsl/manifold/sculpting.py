"""Hierarchical manifold sculpting: a supervised contrastive loss over image features and class texts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfsl.errors import ConfigError, DataError, ShapeError

# Of the value stream of the last block but one: its weight, and what its temperature is multiplied by.
PREVIOUS_WEIGHT = 0.5
PREVIOUS_TEMPERATURE = 2.0


def sculpting_loss(
    queries: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    temperature: float,
    *,
    normalize_text: bool = True,
) -> Tensor:
    """Mean over the queries of -(1/|P_q|) sum_{p in P_q} log( exp(<q,p>/tau) / sum_{s != q} exp(<q,s>/tau) ).

    The support s is all queries and the texts of all classes; P_q is the support of q's class without q, so the text
    of its class at least. Queries are L2-normalised. Computed in float64 whatever the dtype of the features, under
    autocast too: similarities are divided by a small tau, and of a loss near 0 float32 keeps no digit. The result is
    float32 (of float64 features float64). The matrix is small beside an encoder's.

    Args:
        queries: image features of all views of the batch, (n, d).
        labels: class of each query, (n,), integer.
        class_embeddings: text features, (C, d).
        temperature: tau > 0.
        normalize_text: L2-normalise the texts; the released code of the paper does not.

    Raises:
        ShapeError: if the shapes disagree or there is no query.
        DataError: if a label names no row of `class_embeddings`.
        ConfigError: if the temperature is not positive.

    Source: MPS-Tuning (arXiv 2508.12877), hierarchical manifold sculpting.
    """
    num_classes = len(class_embeddings)
    if (
        queries.ndim != 2
        or not queries.numel()
        or labels.shape != queries.shape[:1]
        or class_embeddings.ndim != 2
        or class_embeddings.shape[1] != queries.shape[1]
    ):
        raise ShapeError(
            f"expected queries (n, d), labels (n,) and class embeddings (C, d), got {tuple(queries.shape)}, "
            f"{tuple(labels.shape)} and {tuple(class_embeddings.shape)}: pass one label a query, repeated for each view"
        )
    if not temperature > 0:
        raise ConfigError(f"expected a temperature > 0, got {temperature}")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise DataError(
            f"expected labels in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}: "
            "labels index the rows of the class embeddings"
        )
    dtype = torch.promote_types(torch.promote_types(queries.dtype, class_embeddings.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        rows = F.normalize(queries.double(), dim=1)
        texts = class_embeddings.double()
        texts = F.normalize(texts, dim=1) if normalize_text else texts
        similarities = rows @ torch.cat((rows, texts)).mT / temperature
        others = torch.cat((labels, torch.arange(num_classes, device=labels.device)))
        same_class = labels[:, None] == others
        positive = same_class.clone().fill_diagonal_(False)
        attraction = similarities.where(positive, 0).sum(dim=1) / positive.sum(dim=1)
        # Taken from the others before they are summed, and the two kinds summed apart: a loss near 0 keeps its digits.
        relative = similarities - attraction[:, None]
        near, far = (relative.where(mask, -torch.inf).logsumexp(dim=1) for mask in (positive, ~same_class))
        return torch.logaddexp(near, far).mean().to(dtype)


def hierarchical_sculpting_loss(
    final: Tensor,
    last_stream: Tensor,
    previous_stream: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    temperature: float,
    *,
    normalize_text: bool = True,
) -> Tensor:
    """L_HMS = L(final; tau) + L(last stream; tau) + L(previous stream; 2 tau) / 2, L the sculpting loss.

    Args:
        final: embeddings of the tuned encoder, all views of the batch, (n, d).
        last_stream: value stream of the last block, [CLS] normed and projected, (n, d).
        previous_stream: that of the block before, (n, d).
        labels: class of each query, (n,), integer.
        class_embeddings: text features, (C, d).
        temperature: tau > 0.
        normalize_text: see `sculpting_loss`.

    Raises:
        ShapeError, DataError, ConfigError: see `sculpting_loss`.

    Source: MPS-Tuning (arXiv 2508.12877), hierarchical manifold sculpting.
    """

    def loss(queries: Tensor, tau: float) -> Tensor:
        return sculpting_loss(queries, labels, class_embeddings, tau, normalize_text=normalize_text)

    previous = loss(previous_stream, PREVIOUS_TEMPERATURE * temperature)
    return loss(final, temperature) + loss(last_stream, temperature) + PREVIOUS_WEIGHT * previous
