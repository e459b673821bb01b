"""CLIP's zero-shot classifier."""

import numpy as np

from fastfsl.heads.base import Head
from fastfsl.heads.blending import Selection
from fastfsl.heads.form import LinearForm
from fastfsl.heads.support import Support


class ZeroShot(Head):
    """logits = s · x Tᵀ: cosine similarity with the class embeddings T (C, d), the support is not used.

    Args:
        logit_scale: s, exp of CLIP's learned temperature; None means 100.

    Source: CLIP (arXiv 2103.00020).
    """

    def __init__(self, *, logit_scale: float | None = None) -> None:
        self.logit_scale = logit_scale

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        form = LinearForm(self._scale() * support.class_embeddings, np.zeros(support.num_classes))
        return form, Selection("fixed", prior_weight=self._scale())
