"""Manifold alignment: how far the Gram matrices of tuned features are from those of the frozen encoder."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfsl.errors import ConfigError, ShapeError

Kind = Literal["l1", "squared"]
Reduction = Literal["mean", "sum", "none"]


def gram_alignment_loss(
    features: Tensor,
    reference: Tensor,
    kind: Kind = "l1",
    reduction: Reduction = "mean",
    *,
    normalize: bool = True,
) -> Tensor:
    """Mean over the entries of |S - S'| or (S - S')^2, S and S' the Gram matrices of the rows of the two.

    S and S' are never formed: where training starts they are nearly equal, and their difference would be rounding.
    With E = F - F' and M = (F + F') / 2 it is S - S' = E M^T + M E^T, small because E is. Everything is computed in
    float32 (float64 stays float64) whatever the dtype of the features, under autocast too. One N x N matrix a Gram is
    kept, for the backward pass.

    Its `l1` form bounds the Gromov-Wasserstein distance of the two sets of features from above: that distance is the
    least mean |S_ik - S'_jl| over all couplings of their rows, this the mean under the identity coupling, row with row.
    The `squared` form bounds the square of the distance of order 2.

    Args:
        features: rows f, (B, N, d), or (N, d) for a single Gram matrix.
        reference: rows f' of the frozen encoder, of the same shape; they get no gradient.
        kind: `l1`, the published form, or `squared`.
        reduction: over the Gram matrices: `mean`, `sum`, or `none`, one value for each, (B,) or ().
        normalize: L2-normalise the rows first; the diagonal of S - S' is then exactly 0. A row of zeros stays one and
            gets no gradient.

    Raises:
        ShapeError: if the two differ in shape, are empty or have another rank.
        ConfigError: if the kind or the reduction is unknown.

    Source: MPS-Tuning (arXiv 2508.12877), manifold alignment regularisation.
    """
    if features.shape != reference.shape or features.ndim not in {2, 3} or not features.numel():
        raise ShapeError(
            f"expected features and reference of one shape, (B, N, d) or (N, d), got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}: pass the same rows of the tuned and of the frozen encoder"
        )
    if kind not in {"l1", "squared"}:
        raise ConfigError(f"expected kind 'l1' or 'squared', got {kind!r}")
    if reduction not in {"mean", "sum", "none"}:
        raise ConfigError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    dtype = torch.promote_types(torch.promote_types(features.dtype, reference.dtype), torch.float32)
    batch, others = (x.to(dtype).reshape(-1, *x.shape[-2:]) for x in (features, reference.detach()))
    values: Tensor = _GramAlignment.apply(batch, others, kind, normalize)
    if reduction == "none":
        return values.reshape(features.shape[:-2])
    return values.mean() if reduction == "mean" else values.sum()


def manifold_alignment_loss(
    embeddings: Tensor | None,
    reference_embeddings: Tensor | None,
    tokens: Tensor | None,
    reference_tokens: Tensor | None,
    *,
    kind: Kind = "l1",
    gram_loss: Callable[[Tensor, Tensor, Kind], Tensor] = gram_alignment_loss,
) -> Tensor:
    """L_MAR of one view: global + local; sum it over the views.

    - global: (1/N^2) sum_ij |S_ij - S'_ij| over the final embeddings of the batch
    - local: (1/N) sum_i (1/T^2) sum_kl |S_i,kl - S'_i,kl| over the tokens of each image

    Args:
        embeddings: of the tuned encoder, (n, d); None together with the next leaves the global part out.
        reference_embeddings: of the frozen encoder, (n, d).
        tokens: all tokens of the tuned encoder's last layer, normed and projected, (n, T, d); None together with the
            next leaves the local part out.
        reference_tokens: of the frozen encoder, (n, T, d).
        kind: see `gram_alignment_loss`.
        gram_loss: what computes one part, called with (features, reference, kind).

    Raises:
        ConfigError: if both parts are left out, or half of one.
        ShapeError: if the halves of a part do not fit.

    Source: MPS-Tuning (arXiv 2508.12877), manifold alignment regularisation.
    """
    parts = []
    for features, reference in ((embeddings, reference_embeddings), (tokens, reference_tokens)):
        if (features is None) != (reference is None):
            raise ConfigError("expected tuned and frozen features, got one without the other: pass both or neither")
        if features is not None and reference is not None:
            parts.append(gram_loss(features, reference, kind))
    if not parts:
        raise ConfigError("expected embeddings, tokens or both, got neither: there is nothing to align")
    return torch.stack(parts).sum()


class _GramAlignment(torch.autograd.Function):
    """Value (B,) of each Gram matrix; the gradient is (2 c / N^2) W F, W = sign(S - S') or 2 (S - S')."""

    @staticmethod
    def forward(  # torch fills the context, and apply takes no keywords
        ctx: Any,  # noqa: ANN401
        features: Tensor,
        reference: Tensor,
        kind: Kind,
        normalize: bool,  # noqa: FBT001
    ) -> Tensor:
        difference = features - reference
        scale = None
        if normalize:
            norm, reference_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (features, reference))
            scale, reference_scale = (torch.where(x > 0, x.reciprocal(), 0) for x in (norm, reference_norm))
            # 1/|f| - 1/|f'| = (|f'|^2 - |f|^2) / (|f| |f'| (|f| + |f'|)), without the cancellation.
            product = norm * reference_norm * (norm + reference_norm)
            change = -(difference * (features + reference)).sum(dim=-1, keepdim=True) / product
            change = torch.where(product > 0, change, scale - reference_scale)
            difference = difference * scale + reference * change
            middle = (features * scale + reference * reference_scale) / 2
        else:
            middle = (features + reference) / 2
        with torch.autocast(features.device.type, enabled=False):
            gram = torch.bmm(difference, middle.mT).baddbmm_(middle, difference.mT)
        if normalize:
            gram.diagonal(dim1=-2, dim2=-1).zero_()
        ctx.entries = entries = gram.shape[-1] ** 2
        values: Tensor
        if kind == "l1":
            values = torch.linalg.vector_norm(gram, ord=1, dim=-1).sum(dim=-1)
            gram.sign_()
        else:
            values = torch.linalg.vector_norm(gram, dim=(-2, -1)).square()
            gram.mul_(2)
        ctx.save_for_backward(features, scale, gram)
        return values / entries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        features, scale, weights = ctx.saved_tensors
        rows = features if scale is None else features * scale
        with torch.autocast(features.device.type, enabled=False):
            result = torch.bmm(weights, rows).mul_(gradient[:, None, None] * (2 / ctx.entries))
        if scale is not None:
            result = (result - rows * (result * rows).sum(dim=-1, keepdim=True)) * scale
        return result, None, None, None
