"""Where a class's features are sent: its text alone, or its text and its support samples together."""

import torch
from torch import Tensor
from torch.nn import functional

# The distance of the targets from the images' mean, as a fraction of the images' own: most of an image's distance from
# the mean is not shared by its class. Chosen on images that episodes leave over (benchmarks/text_frames.py).
RADIUS = 0.5


def blended_targets(
    features: Tensor, labels: Tensor, class_embeddings: Tensor, text_samples: float, prototypes: Tensor | None = None
) -> Tensor:
    """Class text and class mean as one direction about the images' mean, the text counting as some samples.

        target_c = unit(c + unit(k unit(P (t_c - t)) + n_c P (mu_c - m))),    c = m / (r sqrt(1 - |m|^2)),

    t the mean of the class texts t_c, mu_c the mean of the class's n_c features, m the mean of the mu_c, P what lies
    across m, k = `text_samples`, r = `RADIUS`. CLIP's images lie about m; the targets lie on a circle about it, each
    where text and support together point. Taking t out closes the gap between where CLIP puts texts and where it puts
    images: the flow need not cross it. All targets are equally far from m: texts that are only moved, unit(t_c + m -
    t), favour the classes whose texts lie near t, which costs eight points of zero-shot accuracy with real texts
    (benchmarks/text_frames.py). k = inf takes the texts alone; k = 0, for where there is no text, unit(mu_c). Of a
    class with several prototypes each has its own target, with n and mu of its samples.

    Args:
        features: L2-normalised, (n, d).
        labels: class indices, (n,); a class may have no sample, its text then stands alone.
        class_embeddings: L2-normalised, (C, d).
        text_samples: k >= 0.
        prototypes: of which prototype of its class each sample is, 0 to K - 1, from 0 on in every class, (n,); None:
            a class has one.

    Returns:
        L2-normalised targets, (C, d), or (C, K, d); a class of fewer prototypes repeats its first.

    Source: asked for by reviewers of FMA (arXiv 2510.14543): prototypes from the support; the geometry is ours.
    """
    means, counts = _class_means(features, labels, len(class_embeddings))
    mean = means[counts[:, 0] > 0].mean(dim=0)
    texts = functional.normalize(_across(class_embeddings - class_embeddings.mean(dim=0), mean), dim=-1)
    if prototypes is None:
        return _blend(mean, texts, means, counts, text_samples)
    num_prototypes = int(prototypes.max()) + 1
    own = _class_means(features, labels * num_prototypes + prototypes, len(texts) * num_prototypes)
    means, counts = (values.unflatten(0, (len(texts), num_prototypes)) for values in own)
    targets = _blend(mean, texts[:, None], means, counts, text_samples)
    return torch.where(counts > 0, targets, targets[:, :1])


def text_target_frame(features: Tensor, labels: Tensor, class_embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """m - t and c of `blended_targets`, (d,) each: what `text_targets` needs.

    Args:
        features: L2-normalised, (n, d).
        labels: class indices, (n,).
        class_embeddings: L2-normalised, (C, d).
    """
    means, counts = _class_means(features, labels, len(class_embeddings))
    mean = means[counts[:, 0] > 0].mean(dim=0)
    return mean - class_embeddings.mean(dim=0), _centre(mean)


def text_targets(class_embeddings: Tensor, shift: Tensor, centre: Tensor | None) -> Tensor:
    """Targets of classes without samples, (C, d): where `blended_targets` sends their texts alone.

    Args:
        class_embeddings: L2-normalised, (C, d).
        shift: m - t, (d,); 0, as `centre`, where the texts themselves are the targets.
        centre: c, (d,); None, of flows trained before it was kept: unit(t_c + shift).
    """
    moved = class_embeddings + shift
    if centre is None:
        return functional.normalize(moved, dim=-1)
    return _about(centre, _across(moved, centre))


def _blend(mean: Tensor, texts: Tensor, means: Tensor, counts: Tensor, text_samples: float) -> Tensor:
    weight = torch.where(counts > 0, counts / (counts + text_samples), 0.0)  # inf: 0
    targets = _about(_centre(mean), (1 - weight) * texts + weight * _across(means - mean, mean))
    return torch.where(counts > 0, functional.normalize(means, dim=-1), targets) if text_samples == 0 else targets


def _across(vectors: Tensor, centre: Tensor) -> Tensor:
    """The part of each vector that is perpendicular to the centre."""
    axis = functional.normalize(centre, dim=0)
    return vectors - (vectors @ axis)[..., None] * axis


def _centre(mean: Tensor) -> Tensor:
    radius = RADIUS * (1 - mean.square().sum()).clamp(min=1e-12).sqrt()
    return mean / radius


def _about(centre: Tensor, directions: Tensor) -> Tensor:
    return functional.normalize(centre + functional.normalize(directions, dim=-1), dim=-1)


def _class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means (C, d), zero where a class has no sample, and counts (C, 1)."""
    counts = torch.bincount(labels, minlength=num_classes).to(features.dtype)[:, None]
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.clamp(min=1), counts
