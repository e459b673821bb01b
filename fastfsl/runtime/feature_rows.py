"""Embeddings that a caller hands over, checked row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastfsl.errors import DataError, ShapeError

# A unit row stored in float16 is up to 5e-4 longer than 1.
_LONGEST_BLEND = 1 + 1e-3


def feature_rows(features: object, width: int, *, normalized: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Checked features as float32 rows.

    The norm is taken in float64, so that very long and very short features neither over- nor underflow.

    Args:
        features: (n, d) or (d,).
        width: d.
        normalized: bring the rows to length 1. Otherwise they stay as they are and are at most 1 long, as a blend
            alpha * tuned + (1 - alpha) * frozen of unit embeddings is.

    Returns:
        (n, d) float32.

    Raises:
        ShapeError: another shape, or no numbers.
        DataError: NaN, infinite, all-zero or, of a blend, too long rows; they are named.
    """
    try:
        array = np.asarray(features)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that cannot become arrays
        raise ShapeError(f"features must be an array of numbers of shape (n, {width}): {error}") from error
    if array.ndim > 0 and len(array) == 0:
        return np.empty((0, width), np.float32)
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"features must be numbers, got dtype {array.dtype}")
    rows = array.astype(np.float64)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ShapeError(f"features must have shape (n, {width}) or ({width},), got {array.shape}")
    _refuse(np.logical_not(np.isfinite(rows).all(axis=1)), "hold NaN or infinite values", "leave them out")
    longest = np.abs(rows).max(axis=1, keepdims=True)
    _refuse(longest[:, 0] == 0, "hold nothing but zeros, which have no direction", "leave them out")
    scaled = rows / longest
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    if normalized:
        unit: np.ndarray[Any, np.dtype[np.float32]] = (scaled / length).astype(np.float32)
        return unit
    _refuse(
        (longest > _LONGEST_BLEND / length)[:, 0],
        "are longer than 1, which a blend of two unit embeddings never is",
        "of this bundle's encoder the length counts: pass what `embed` returns, as it is",
    )
    return rows.astype(np.float32)


def _refuse(bad: np.ndarray[Any, Any], what: str, remedy: str) -> None:
    if bad.any():
        named = ", ".join(map(str, np.flatnonzero(bad)[:5]))
        raise DataError(f"{int(bad.sum())} feature rows {what} (rows {named}, counted from 0); {remedy}")
