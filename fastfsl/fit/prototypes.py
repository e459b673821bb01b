"""Which samples of a class share a prototype: clusters of the support."""

import numpy as np
import torch
from torch import Tensor

from fastfsl.flow.readout import normalize


def assign_prototypes(views: Tensor, labels: Tensor, num_prototypes: int, seed: int) -> Tensor | None:
    """Cluster each class's samples, by k-means on the mean of their views.

    Args:
        views: L2-normalised image features, (n, V, d).
        labels: class indices, (n,).
        num_prototypes: K, clusters a class; a class of fewer distinct samples has as many as those.
        seed: of k-means.

    Returns:
        The cluster of each sample, 0 to K - 1, from 0 on in every class, (n,) int64; None for K = 1: there is nothing
        to assign.
    """
    if num_prototypes == 1:
        return None
    from sklearn.cluster import KMeans

    features = normalize(views.mean(dim=1)).cpu().numpy()
    of_class = labels.cpu().numpy()
    prototypes = np.zeros(len(features), np.int64)
    for label in np.unique(of_class):
        rows = features[of_class == label]
        count = min(num_prototypes, len(np.unique(rows, axis=0)))
        prototypes[of_class == label] = KMeans(count, n_init=10, random_state=seed).fit_predict(rows)
    return torch.from_numpy(prototypes).to(labels.device)
