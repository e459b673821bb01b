"""One tile of D = S - S', of which the Gram kernels are made.

    a_ij = f_i.f_j - g_i.g_j,   b_ij = g_i.g_j,   D_ij = s_i s_j a_ij + (s_i c_j + c_i t_j) b_ij

with s = 1/|f|, t = 1/|g| and c = s - t where rows are normalised, else 1, 1 and 0; see `fastfsl.kernels.gram_kernels`.
"""

import triton
import triton.language as tl

from fastfsl.kernels.gram_rows import CHANGE, REFERENCE_SCALE, SCALE


@triton.jit
def exact_products(
    features: tl.tensor,
    reference: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """a_ij and, where rows are normalised, b_ij of one tile of 16-bit features: the operands are what is in memory.

    What is subtracted are the sums of one block of the depth: they are small, and where tensor cores cut off instead of
    rounding they lose the same, so that the difference is right to 1e-4 of itself.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_i = i[:, None] * D + o_k[None, :]
    p_j = j[:, None] * D + o_k[None, :]
    m_i = (i < n)[:, None]
    m_j = (j < n)[:, None]
    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        f_i = tl.load(features + p_i + k, mask=m_i, other=0.0)
        g_i = tl.load(reference + p_i + k, mask=m_i, other=0.0)
        f_j = tl.load(features + p_j + k, mask=m_j, other=0.0)
        g_j = tl.load(reference + p_j + k, mask=m_j, other=0.0)
        a = tl.dot(f_i, tl.trans(f_j), a)
        theirs = tl.dot(g_i, tl.trans(g_j))
        a -= theirs
        if NORMALIZE:
            b += theirs
    return a, b


@triton.jit
def split_products(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """D_ij = s_i f_i.e_j + e_i.g_j t_j with e = s f - t g and, where rows are normalised, f_i.f_j, of float32 features.

    Products may round their operands to TF32, so the difference is taken before them.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_i = i[:, None] * D + o_k[None, :]
    p_j = j[:, None] * D + o_k[None, :]
    m_i = (i < n)[:, None]
    m_j = (j < n)[:, None]
    s_i, _, c_i = row_stats(stats, i, n)
    s_j, t_j, c_j = row_stats(stats, j, n)
    d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        f_i = tl.load(features + p_i + k, mask=m_i, other=0.0)
        g_i = tl.load(reference + p_i + k, mask=m_i, other=0.0)
        f_j = tl.load(features + p_j + k, mask=m_j, other=0.0)
        g_j = tl.load(reference + p_j + k, mask=m_j, other=0.0)
        e_i = (f_i - g_i) * s_i[:, None] + g_i * c_i[:, None]
        e_j = (f_j - g_j) * s_j[:, None] + g_j * c_j[:, None]
        d = tl.dot(f_i * s_i[:, None], tl.trans(e_j), d, input_precision=PRECISION)
        d = tl.dot(e_i, tl.trans(g_j * t_j[:, None]), d, input_precision=PRECISION)
        if NORMALIZE:
            product = tl.dot(f_i, tl.trans(f_j), product, input_precision=PRECISION)
    return d, product


@triton.jit
def row_stats(stats: tl.tensor, i: tl.tensor, n: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """s, t and c of rows; 0 beyond n."""
    s = tl.load(stats + SCALE * n + i, mask=i < n, other=0.0)
    t = tl.load(stats + REFERENCE_SCALE * n + i, mask=i < n, other=0.0)
    c = tl.load(stats + CHANGE * n + i, mask=i < n, other=0.0)
    return s, t, c


@triton.jit
def difference_tile(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """D_ij and, where rows are normalised, f_i.f_j of one tile; 0 beyond n."""
    if features.dtype.element_ty == tl.float32:
        d, product = split_products(
            features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        d, b = exact_products(features, reference, i, j, n, D, NORMALIZE, BLOCK_M, BLOCK_N, BLOCK_K)
        product = d + b
        if NORMALIZE:
            s_i, _, c_i = row_stats(stats, i, n)
            s_j, t_j, c_j = row_stats(stats, j, n)
            change = s_i[:, None] * c_j[None, :] + c_i[:, None] * t_j[None, :]
            d = s_i[:, None] * s_j[None, :] * d + change * b
    if NORMALIZE:
        d = tl.where(i[:, None] == j[None, :], 0.0, d)
    return d, product
