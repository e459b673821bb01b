"""CLIP's zero-shot classifier."""

import numpy as np

from fastfsl.heads.base import Head
from fastfsl.heads.blending import Selection
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.form import LinearForm
from fastfsl.heads.nearest_mean import unit_class_means
from fastfsl.heads.support import Support


class ZeroShot(Head):
    """logits = s · x Tᵀ: cosine similarity with the class embeddings T (C, d), the support is not used.

    Without class embeddings T is the renormalised means of the classes' support vectors.

    Args:
        logit_scale: s, exp of CLIP's learned temperature; None means 100.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Source: CLIP (arXiv 2103.00020).
    """

    def __init__(
        self,
        *,
        logit_scale: float | None = None,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.logit_scale = logit_scale
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        texts = support.class_embeddings
        if not texts.any():
            texts = unit_class_means(support.features, support.labels, support.num_classes)
        form = LinearForm(self._scale() * texts, np.zeros(support.num_classes))
        return form, Selection("fixed", prior_weight=self._scale())
