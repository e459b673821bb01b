"""Weights as integers of which no processor cuts a sum off.

With AVX2 and AVX-512 alone ONNX Runtime multiplies bytes a in 0..255 by weights w and sums the products of two adjacent
rows, 2j and 2j + 1, in 16 bits: a_0 w_0 + a_1 w_1 is cut off beyond 32767. VNNI, AMX and ARM sum in 32 bits. So the
weights of one sign in each such pair add up to 127 at most here, and every processor gives the same answer. That makes
an output channel's step a fifth to a half larger than -127..127 would (-63..63 would double it), and costs no time.

What the larger step would cost in accuracy, rounding gives back. A row is rounded after the rows before it, and takes
over as much of their error as its inputs are correlated with theirs: with U'U = C^-1 for the covariance C of the
inputs, row i leaves e_i = (w_i - q_i) / U_ii, and row k > i becomes w_k - U_ik e_i.

Source: E. Frantar et al., "GPTQ", ICLR 2023, here within blocks of rows.
"""

import numpy as np
from numpy.typing import NDArray

# Of two weights of one sign in adjacent rows; 128 would fit as well.
PAIR_SUM = 127
# Rows that take over errors from each other, an even number. All of them would do little better, and covariances of a
# wide layer would take gigabytes.
BLOCK = 64
# Added to each variance, of the mean one: few images tell little of small correlations.
_DAMPING = 0.01


def integer_weights(
    weight: NDArray[np.float32], covariance: NDArray[np.float64]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round weights.

    Args:
        weight: (K, N).
        covariance: of the inputs, by blocks of `BLOCK` of them, (ceil(K / BLOCK), BLOCK, BLOCK); any multiple of it.

    Returns:
        Integers (K, N), of which those of one sign in rows 2j and 2j + 1 add up to `PAIR_SUM` at most, and the step of
        each output channel, (N,). Their product is about the weights.
    """
    height, width = weight.shape
    # Of an odd number of rows the last one's neighbour is 0, as it is where ONNX Runtime computes.
    pairs = np.zeros(((height + 1) // 2, 2, width), np.float32)
    pairs.reshape(-1, width)[:height] = weight
    steps: NDArray[np.float32] = np.max([_sums(pairs, sign).max(axis=0, initial=0) for sign in (1, -1)], axis=0)
    steps /= PAIR_SUM
    steps[steps == 0] = 1
    rows = weight / steps
    levels = np.empty((height, width), np.int8)
    for index, start in enumerate(range(0, height, BLOCK)):
        block = slice(start, start + BLOCK)
        levels[block] = _rounded(rows[block], covariance[index])
    return levels, steps


def _sums(pairs: NDArray[np.float32], sign: int) -> NDArray[np.float32]:
    """Sums (P, N) of the magnitudes of what has this sign in pairs (P, 2, N)."""
    sums: NDArray[np.float32] = np.maximum(sign * pairs, 0).sum(axis=1)
    return sums


def _rounded(rows: NDArray[np.float32], covariance: NDArray[np.float64]) -> NDArray[np.float32]:
    """Whole numbers for a block of rows, in steps."""
    size = len(rows)
    factor = _factor(covariance[:size, :size])
    rows, levels = rows.copy(), np.zeros_like(rows)
    for row in range(size):
        before = levels[row - 1] if row % 2 else np.float32(0)
        levels[row] = np.rint(rows[row]).clip(-PAIR_SUM - np.minimum(before, 0), PAIR_SUM - np.maximum(before, 0))
        error = (rows[row] - levels[row]) / factor[row, row]
        rows[row + 1 :] -= np.outer(factor[row, row + 1 :], error)
    return levels


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float32]:
    """The upper triangular U with U'U = C^-1."""
    size = len(covariance)
    mean = np.trace(covariance) / size
    if not np.isfinite(mean) or mean <= 0:  # inputs that never change, or are no numbers: each row by itself
        return np.eye(size, dtype=np.float32)
    inverse = np.linalg.inv(covariance / mean + _DAMPING * np.eye(size))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
