"""Where a class's features are sent: its text alone, or its text and its support samples together."""

import torch
from torch import Tensor
from torch.nn import functional


def blended_targets(
    features: Tensor, labels: Tensor, class_embeddings: Tensor, text_samples: float, prototypes: Tensor | None = None
) -> Tensor:
    """Class text and class mean as one direction about the images' mean, the text counting as some samples.

        target_c = unit(m + (k (t_c - t) + n_c (mu_c - m)) / (k + n_c)),

    t the mean of the class texts t_c, mu_c the mean of the class's n_c features, m the mean of the mu_c, k =
    `text_samples`. Taking t out closes the gap between where CLIP puts texts and where it puts images: the flow need
    not cross it. k = inf leaves the texts alone, only moved; k = 0 takes the classes' means (support prototypes), for
    where there is no text. Of a class with several prototypes each has its own target, with n and mu of its samples.

    Args:
        features: L2-normalised, (n, d).
        labels: class indices, (n,); a class may have no sample, its text then stands alone.
        class_embeddings: L2-normalised, (C, d).
        text_samples: k >= 0.
        prototypes: of which prototype of its class each sample is, 0 to K - 1, from 0 on in every class, (n,); None:
            a class has one.

    Returns:
        L2-normalised targets, (C, d), or (C, K, d); a class of fewer prototypes repeats its first.

    Source: asked for by reviewers of FMA (arXiv 2510.14543): prototypes from the support; the shrinkage is ours.
    """
    means, counts = _class_means(features, labels, len(class_embeddings))
    centre = means[counts[:, 0] > 0].mean(dim=0)
    texts = class_embeddings - class_embeddings.mean(dim=0)
    if prototypes is None:
        return _blend(centre, texts, means, counts, text_samples)
    num_prototypes = int(prototypes.max()) + 1
    own = _class_means(features, labels * num_prototypes + prototypes, len(texts) * num_prototypes)
    means, counts = (values.unflatten(0, (len(texts), num_prototypes)) for values in own)
    targets = _blend(centre, texts[:, None], means, counts, text_samples)
    return torch.where(counts > 0, targets, targets[:, :1])


def _blend(centre: Tensor, texts: Tensor, means: Tensor, counts: Tensor, text_samples: float) -> Tensor:
    weight = torch.where(counts > 0, counts / (counts + text_samples), 0.0)  # inf: 0
    return functional.normalize(centre + (1 - weight) * texts + weight * (means - centre), dim=-1)


def target_shift(features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """m - t of `blended_targets`, (d,): the target of a class without samples is unit(t_c + m - t).

    Args:
        features: L2-normalised, (n, d).
        labels: class indices, (n,).
        class_embeddings: L2-normalised, (C, d).
    """
    means, counts = _class_means(features, labels, len(class_embeddings))
    return means[counts[:, 0] > 0].mean(dim=0) - class_embeddings.mean(dim=0)


def _class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means (C, d), zero where a class has no sample, and counts (C, 1)."""
    counts = torch.bincount(labels, minlength=num_classes).to(features.dtype)[:, None]
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.clamp(min=1), counts
