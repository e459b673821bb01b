"""Fixed coupling: every image feature is paired with the text feature of its own class."""

from torch import Tensor

from fastfsl.errors import DataError, ShapeError


def pair_with_class(labels: Tensor, class_embeddings: Tensor, prototypes: Tensor | None = None) -> Tensor:
    """Target x_1 of each sample: the embedding of its own class, never a random or an optimal-transport partner.

    Args:
        labels: class indices, (n,), integer.
        class_embeddings: L2-normalised text features, (C, d), or (C, K, d) where a class has K prototypes.
        prototypes: of which prototype of its class each sample is, (n,), with K of them.

    Returns:
        x_1, (n, d).

    Raises:
        ShapeError: if the arguments have the wrong rank.
        DataError: if a label names no row of `class_embeddings`.

    Source: FMA (arXiv 2510.14543), fixed coupling.
    """
    if labels.ndim != 1 or class_embeddings.ndim != (2 if prototypes is None else 3):
        raise ShapeError(
            f"expected labels (n,) and class embeddings (C, d), or (C, K, d) with prototypes, got "
            f"{tuple(labels.shape)} and {tuple(class_embeddings.shape)}: pass one label a sample and one row a class"
        )
    num_classes = class_embeddings.shape[0]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(
            f"expected labels in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}: "
            "labels index the rows of the class embeddings"
        )
    return class_embeddings[labels] if prototypes is None else class_embeddings[labels, prototypes]
