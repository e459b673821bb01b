"""The Gram alignment loss and its gradient in one pass over tiles of S - S'; no N x N matrix is kept.

    L = (1/N^2) sum_ij |D_ij| or D_ij^2,   dL/df_i = (2/N^2) sum_j sign(D_ij) f_j or (4/N^2) sum_j D_ij f_j

with D = S - S'; where asked for, rows are normalised first and the gradient is projected. The forward pass leaves the
gradient but for its factor, the backward pass puts that in, in place. An element of features and reference is read for
the statistics of its row and by every tile of rows of its image, which finds it in the L2 cache; one of the gradient is
written, and in the backward pass read, beside the feature, and written. Kept beside it: 24 bytes a row, and 4 for every
32 columns. Equations: `fastfsl.kernels.gram_kernels`. Reference: fastfsl/manifold/gram.py. Compiled for six
architectures, not yet run on a card.
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfsl.errors import ConfigError, DeviceError, ShapeError
from fastfsl.kernels import gram_kernels, gram_squared, gram_tiles
from fastfsl.kernels.gram_rows import NUM_STATS, UNIT_WIDTH, rows_kernel
from fastfsl.kernels.gram_tiles import GramTile, Variant
from fastfsl.kernels.tiles import DTypeName

Kind = Literal["l1", "squared"]
Reduction = Literal["mean", "sum", "none"]

DTYPES: dict[torch.dtype, DTypeName] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Triton's interpreter takes the tiles of this architecture.
INTERPRETED_ARCH = 90


def gram_alignment_loss(
    features: Tensor,
    reference: Tensor,
    kind: Kind = "l1",
    reduction: Reduction = "mean",
    *,
    normalize: bool = True,
    allow_tf32: bool = False,
) -> Tensor:
    """Mean over the entries of |S - S'| or (S - S')^2, S and S' the Gram matrices of the rows of the two.

    As `fastfsl.manifold.gram_alignment_loss`, on a card. Operands of products have the features' dtype; they are summed
    and subtracted in float32, which is the dtype of the loss, under autocast too.

    Its `l1` form bounds the Gromov-Wasserstein distance of the two sets of features from above: that distance is the
    least mean |S_ik - S'_jl| over all couplings of their rows, this the mean under the identity coupling, row with row.

    Args:
        features: rows f, (B, N, d), or (N, d) for a single Gram matrix; float16, bfloat16 or float32. Their gradient
            has their dtype.
        reference: rows f' of the frozen encoder, of the same shape; they get no gradient.
        kind: `l1`, the published form, or `squared`.
        reduction: over the Gram matrices: `mean`, `sum`, or `none`, one value for each, (B,) or ().
        normalize: L2-normalise the rows first; the diagonal of S - S' is then exactly 0. A row of zeros stays one and
            gets no gradient.
        allow_tf32: operands of float32 products may be rounded to 10 bits of mantissa; the difference of rows is not.

    Raises:
        ShapeError: if the two differ in shape, are empty, or have another rank or dtype.
        ConfigError: if the kind or the reduction is unknown.
        DeviceError: if they are not on one CUDA card.

    Source: MPS-Tuning (arXiv 2508.12877), manifold alignment regularisation.
    """
    if kind not in {"l1", "squared"}:
        raise ConfigError(f"expected kind 'l1' or 'squared', got {kind!r}")
    if reduction not in {"mean", "sum", "none"}:
        raise ConfigError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    rows, others = _operands(features, reference)
    how = _How(kind, reduction, normalize, allow_tf32)
    with_gradient = torch.is_grad_enabled() and rows.requires_grad
    value: Tensor
    if torch.compiler.is_compiling() or type(rows) not in {Tensor, torch.nn.Parameter}:
        # Only where it is needed: in eager mode an operator costs more time than the launches.
        value = gram_alignment(rows, others, *how, with_gradient)[0]
    elif with_gradient:
        value = _GramAlignment.apply(rows, others, how)
    else:
        value = _compute(rows, others, how, with_gradient=False).value
    return value.reshape(features.shape[:-2]) if reduction == "none" else value


def gram_difference(features: Tensor, reference: Tensor, *, normalize: bool = True, allow_tf32: bool = False) -> Tensor:
    """S - S' as the kernels compute it, float32, (B, N, N) or (N, N): for tests, and small N.

    Args:
        features: rows f, (B, N, d) or (N, d).
        reference: rows f', of the same shape.
        normalize: L2-normalise the rows first.
        allow_tf32: as in `gram_alignment_loss`.

    Raises:
        ShapeError: if the two differ in shape, are empty, or have another rank or dtype.
        DeviceError: if they are not on one CUDA card.
    """
    rows, others = _operands(features.detach(), reference)
    n = rows.shape[1]
    difference = rows.new_empty(len(rows), n, n, dtype=torch.float32)
    how = _How("l1", "none", normalize, allow_tf32)
    _, _, stats = _empty(rows, with_gradient=False)
    _launch_rows(rows, others, stats, how)
    _launch_value(rows, others, stats, how, difference)
    return difference.reshape(*features.shape[:-1], n)


class _How(NamedTuple):
    """The options of the loss, in the order of the operators' arguments."""

    kind: str
    reduction: str
    normalize: bool
    allow_tf32: bool

    def weight(self, batch: int, n: int) -> float:
        """What an entry of D counts in the result."""
        return 1 / (n * n * (batch if self.reduction == "mean" else 1))


class _Computed(NamedTuple):
    """The value, and for the backward pass r, its units by row and columns, s and p; see `gram_kernels`."""

    value: Tensor
    gradient: Tensor
    units: Tensor
    stats: Tensor


class _GramAlignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, reference: Tensor, how: _How) -> Tensor:  # noqa: ANN401  # torch fills it
        computed = _compute(features, reference, how, with_gradient=True)
        ctx.save_for_backward(features, reference)
        ctx.how, ctx.computed = how, computed
        return computed.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        features, reference = ctx.saved_tensors
        computed, ctx.computed = ctx.computed, None
        if (
            computed is None
        ):  # a second backward pass: the first one has changed the gradient in place, and given it away
            computed = _compute(features, reference, ctx.how, with_gradient=True)
        return _finish(features, computed, upstream, ctx.how, output=computed.gradient), None, None


@torch.library.custom_op("fastfsl::gram_alignment", mutates_args=())
def gram_alignment(
    features: Tensor,
    reference: Tensor,
    kind: str,
    reduction: str,
    normalize: bool,  # noqa: FBT001  # operators have no keywords
    allow_tf32: bool,  # noqa: FBT001
    with_gradient: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss as an operator, for torch.compile: the fields of `_Computed`."""
    return _compute(features, reference, _How(kind, reduction, normalize, allow_tf32), with_gradient=with_gradient)


@gram_alignment.register_fake
def _(
    features: Tensor,
    reference: Tensor,  # noqa: ARG001
    kind: str,  # noqa: ARG001
    reduction: str,
    normalize: bool,  # noqa: ARG001, FBT001
    allow_tf32: bool,  # noqa: ARG001, FBT001
    with_gradient: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value = features.new_empty((features.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    return _Computed(value, *_empty(features, with_gradient=with_gradient))


@torch.library.custom_op("fastfsl::gram_alignment_gradient", mutates_args=())
def gram_alignment_gradient(
    features: Tensor,
    gradient: Tensor,
    units: Tensor,
    stats: Tensor,
    upstream: Tensor,
    kind: str,
    reduction: str,
    normalize: bool,  # noqa: FBT001
    allow_tf32: bool,  # noqa: FBT001
) -> Tensor:
    """The backward pass as an operator."""
    computed = _Computed(upstream, gradient, units, stats)
    how = _How(kind, reduction, normalize, allow_tf32)
    return _finish(features, computed, upstream, how, output=torch.empty_like(gradient))


@gram_alignment_gradient.register_fake
def _(features: Tensor, *_: Any) -> Tensor:  # noqa: ANN401
    return torch.empty_like(features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    features, _, *ctx.how, ctx.with_gradient = inputs
    ctx.save_for_backward(features, *output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    if not ctx.with_gradient:
        raise RuntimeError("this value was computed without a gradient: call the operator with with_gradient=True")
    return gram_alignment_gradient(*ctx.saved_tensors, upstream, *ctx.how), *(None,) * 6


gram_alignment.register_autograd(_backward, setup_context=_save)


def _operands(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as contiguous (B, N, d) of one dtype, d a multiple of 16: zeros to the right change no product."""
    if features.shape != reference.shape or features.ndim not in {2, 3} or not features.numel():
        raise ShapeError(
            f"expected features and reference of one shape, (B, N, d) or (N, d), got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}: pass the same rows of the tuned and of the frozen encoder"
        )
    dtype = torch.promote_types(features.dtype, reference.dtype)
    if dtype not in DTYPES:
        raise ShapeError(
            f"expected float16, bfloat16 or float32, got {features.dtype} and {reference.dtype}: convert them, or call "
            "fastfsl.manifold.gram_alignment_loss"
        )
    interpreted = not isinstance(rows_kernel, triton.JITFunction)
    if features.device != reference.device or not (features.is_cuda or interpreted):
        raise DeviceError(
            f"expected features and reference on one CUDA card, got them on {features.device} and {reference.device}: "
            "move them, or call fastfsl.manifold.gram_alignment_loss, which computes the same anywhere"
        )
    padding = -features.shape[-1] % 16
    rows, others = (x.to(dtype).reshape(-1, *x.shape[-2:]) for x in (features, reference.detach()))
    if padding:
        rows, others = F.pad(rows, (0, padding)), F.pad(others, (0, padding))
    return rows.contiguous(), others.contiguous()


def _compute(features: Tensor, reference: Tensor, how: _How, *, with_gradient: bool) -> _Computed:
    """Value and what the backward pass needs; nothing of it follows autocast."""
    batch, n, _ = features.shape
    squared = how.kind == "squared"
    gradient, units, stats = _empty(features, with_gradient=with_gradient)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        _launch_rows(features, reference, stats, how)
        if squared and _by_columns(features, how, with_gradient=with_gradient):
            into = (gradient, units) if with_gradient else None
            values = gram_squared.squared_by_columns(features, reference, stats, into, normalize=how.normalize)
            values *= how.weight(batch, n)
        elif with_gradient:
            values = _launch_loss(features, reference, stats, gradient, units, how)
        else:
            values = _launch_value(features, reference, stats, how)
        value = values.view(batch, -1).sum(dim=1) if how.reduction == "none" else values.sum()
    return _Computed(value, gradient, units, stats)


def _by_columns(features: Tensor, how: _How, *, with_gradient: bool) -> bool:
    """Whether d x d products take fewer multiplications than tiles of D, of which a loss alone needs half."""
    _, n, dim = features.shape
    tiles = gram_tiles.num_products(_tile(features), dim, DTYPES[features.dtype], normalize=how.normalize)
    return 5 * dim < tiles * n if with_gradient else 3 * dim < n


def _empty(features: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, units and statistics, without values."""
    batch, n, dim = features.shape
    units = -(-dim // UNIT_WIDTH.value)
    return (
        features.new_empty((batch, n, dim) if with_gradient else 0),
        features.new_empty((batch, n, units) if with_gradient else 0, dtype=torch.float32),
        features.new_empty(batch, NUM_STATS, n, dtype=torch.float32),
    )


def _launch_rows(features: Tensor, reference: Tensor, stats: Tensor, how: _How) -> None:
    batch, n, dim = features.shape
    variant = gram_tiles.rows_variant(dim, normalize=how.normalize)
    _launch(variant, features, (batch * triton.cdiv(n, variant.tile.rows),), features, reference, stats, n)


def _launch_loss(
    features: Tensor, reference: Tensor, stats: Tensor, gradient: Tensor, units: Tensor, how: _How
) -> Tensor:
    """Parts of the value by image, (B, P), with r in `gradient` and `units`, and p in `stats`."""
    batch, n, dim = features.shape
    arch, dtype = _arch(features.device), DTYPES[features.dtype]
    variant = gram_tiles.loss_variant(
        arch, n, dim, dtype, squared=how.kind == "squared", normalize=how.normalize, tf32=how.allow_tf32
    )
    tiles = batch * triton.cdiv(n, variant.tile.rows)
    values = stats.new_empty(tiles)
    grid = (tiles * gram_tiles.num_slices(_tile(features), dim),)
    weight = how.weight(batch, n)
    _launch(variant, features, grid, features, reference, stats, values, gradient, units, weight, n)
    return values


def _launch_value(
    features: Tensor, reference: Tensor, stats: Tensor, how: _How, difference: Tensor | None = None
) -> Tensor:
    """Parts of the value by image, (B, P), or D into `difference`."""
    batch, n, dim = features.shape
    variant = gram_tiles.value_variant(
        _arch(features.device),
        dim,
        DTYPES[features.dtype],
        squared=how.kind == "squared",
        normalize=how.normalize,
        tf32=how.allow_tf32,
        write=difference is not None,
    )
    tiles = batch * triton.cdiv(n, variant.tile.rows) * triton.cdiv(n, variant.tile.columns)
    values = stats.new_empty(tiles)
    target = values if difference is None else difference
    _launch(variant, features, (tiles,), features, reference, stats, values, target, how.weight(batch, n), n)
    return values


def _finish(features: Tensor, computed: _Computed, upstream: Tensor, how: _How, output: Tensor) -> Tensor:
    """The gradient times the upstream one, () or (B,), into `output`, which may be `computed.gradient`."""
    batch, n, dim = features.shape
    variant = gram_tiles.finish_variant(normalize=how.normalize)
    grid = triton.cdiv(batch * n, variant.tile.rows), triton.cdiv(dim, variant.tile.columns)
    factor = (2 if how.kind == "l1" else 4) * how.weight(batch, n)
    upstream = upstream.to(torch.float32)
    stride = upstream.stride(0) if upstream.ndim else 0
    _launch(
        variant, features, grid, computed.gradient, computed.units, features, computed.stats, upstream, output, factor,
        n, batch * n, stride,
    )  # fmt: skip
    return output


def _launch(variant: Variant, features: Tensor, grid: tuple[int, ...], *arguments: Tensor | float) -> None:
    kernel, tile = gram_kernels.FLOW[variant.name], variant.tile
    constants = _constants(variant, features.shape[-1])
    with torch.cuda.device_of(features):
        kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


@cache
def _constants(variant: Variant, dim: int) -> dict[str, int | str]:
    return gram_kernels.constants(variant.name, dim, variant.tile)


@cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tile(features: Tensor) -> GramTile:
    _, n, dim = features.shape
    return gram_tiles.gram_tile(_arch(features.device), n, dim, DTYPES[features.dtype])
