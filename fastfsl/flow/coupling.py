"""Fixed coupling: every image feature is paired with the text feature of its own class."""

from torch import Tensor

from fastfsl.errors import DataError, ShapeError


def pair_with_class(labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """Target x_1 of each sample: the embedding of its own class, never a random or an optimal-transport partner.

    Args:
        labels: class indices, (n,), integer.
        class_embeddings: L2-normalised text features, (C, d).

    Returns:
        x_1, (n, d).

    Raises:
        ShapeError: if the arguments have the wrong rank.
        DataError: if a label names no row of `class_embeddings`.

    Source: FMA (arXiv 2510.14543), fixed coupling.
    """
    if labels.ndim != 1 or class_embeddings.ndim != 2:
        raise ShapeError(
            f"expected labels (n,) and class embeddings (C, d), got {tuple(labels.shape)} and "
            f"{tuple(class_embeddings.shape)}: pass one label a sample and one row a class"
        )
    num_classes = class_embeddings.shape[0]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(
            f"expected labels in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}: "
            "labels index the rows of the class embeddings"
        )
    return class_embeddings[labels]
