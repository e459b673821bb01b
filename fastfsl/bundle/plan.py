"""The flow plan on disk: shared weights and per-step tables, in safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastfsl.bundle.tensors import read_shapes, read_tensors, write_tensors
from fastfsl.bundle.untrusted import AGAIN, is_positive
from fastfsl.errors import BundleError, DataError, ShapeError

PLAN_FORMAT = "fastfsl-flow-plan"


@dataclass(frozen=True, eq=False)
class PlanArrays:
    """A flow plan: shared weights and per-step tables, all float32. Linear layers are (out, in): y = x W^T + b.

    Args:
        step_size: Euler step h, above 0.
        input_weight: W_in, (d, d).
        input_bias: b_in, (d,).
        first_weight: first linear of each block, (B, d, d).
        first_bias: (B, d).
        second_weight: second linear of each block, (B, d, d).
        second_bias: (B, d).
        output_weight: W_out, (d, d).
        output_bias: b_out, (d,).
        carry_weight: W_in W_out, (d, d).
        carry_bias: W_in b_out, (d,).
        block_table: LayerNorm scale a, shift c and gate of each step and block, (M, B, 3, d).
        final_table: a and c of the final layer at each step, (M, 2, d).

    M = 0 (the features stay where they are) and B = 0 are legal.

    Raises:
        ShapeError: an array has another dtype or shape.
        DataError: a value is not finite, or ``step_size`` is not above 0.
    """

    step_size: float
    input_weight: np.ndarray[Any, Any]
    input_bias: np.ndarray[Any, Any]
    first_weight: np.ndarray[Any, Any]
    first_bias: np.ndarray[Any, Any]
    second_weight: np.ndarray[Any, Any]
    second_bias: np.ndarray[Any, Any]
    output_weight: np.ndarray[Any, Any]
    output_bias: np.ndarray[Any, Any]
    carry_weight: np.ndarray[Any, Any]
    carry_bias: np.ndarray[Any, Any]
    block_table: np.ndarray[Any, Any]
    final_table: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        if not is_positive(self.step_size):
            raise DataError(f"step_size must be a finite number above 0, got {self.step_size!r}")
        arrays = self.arrays()
        for name, array in arrays.items():
            if array.dtype != np.float32:
                raise ShapeError(f"{name} must be a float32 array, got {array.dtype}")
        if self.input_weight.ndim != 2 or self.block_table.ndim != 4 or self.dim < 1:
            raise ShapeError(
                f"expected input_weight (d, d) and block_table (M, B, 3, d), got {self.input_weight.shape} and "
                f"{self.block_table.shape}"
            )
        d, blocks, steps = self.dim, self.num_blocks, self.num_steps
        expected = {
            "input_weight": (d, d),
            "input_bias": (d,),
            "first_weight": (blocks, d, d),
            "first_bias": (blocks, d),
            "second_weight": (blocks, d, d),
            "second_bias": (blocks, d),
            "output_weight": (d, d),
            "output_bias": (d,),
            "carry_weight": (d, d),
            "carry_bias": (d,),
            "block_table": (steps, blocks, 3, d),
            "final_table": (steps, 2, d),
        }
        for name, array in arrays.items():
            if array.shape != expected[name]:
                raise ShapeError(f"{name} must have shape {expected[name]}, got {array.shape}")
            if not np.isfinite(array).all():
                raise DataError(f"{name} holds NaN or infinite values")

    @property
    def num_steps(self) -> int:
        """M, the number of Euler steps."""
        return int(self.block_table.shape[0])

    @property
    def num_blocks(self) -> int:
        """B, the number of residual blocks."""
        return int(self.block_table.shape[1])

    @property
    def dim(self) -> int:
        """d, the width of the features."""
        return int(self.input_weight.shape[0])

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every array under its name, in the order of the fields."""
        return {name: getattr(self, name) for name in _PLAN_ARRAYS}


_PLAN_ARRAYS = tuple(field.name for field in fields(PlanArrays) if field.name != "step_size")


def read_plan(path: str | os.PathLike[str], data: bytes | None = None) -> PlanArrays:
    """Read a plan written by ``write_plan``.

    Args:
        path: the file; with ``data`` only what messages call it.
        data: the file's bytes, if they were read already.

    Raises:
        BundleError: the file is missing, damaged, not a plan, or of an unknown version.
    """
    metadata, arrays = read_tensors(path, PLAN_FORMAT, "flow plan", data)
    if sorted(arrays) != sorted(_PLAN_ARRAYS):
        raise BundleError(f"{path}: expected the arrays {', '.join(_PLAN_ARRAYS)}, got {sorted(arrays)}; {AGAIN}")
    try:
        return PlanArrays(step_size=float(metadata.get("step_size", "")), **arrays)
    except (ShapeError, DataError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from error


def plan_sizes(path: str | os.PathLike[str], data: bytes) -> tuple[int, int, float]:
    """Number of steps, width and step size of a plan, as its header says them; the numbers behind it are not read.

    Args:
        path: what messages call it.
        data: the file's bytes.

    Raises:
        BundleError: it is no plan, or of an unknown version.
    """
    metadata, shapes = read_shapes(path, PLAN_FORMAT, "flow plan", data)
    try:
        steps, _, _, dim = shapes["block_table"]
        return steps, dim, float(metadata["step_size"])
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path}: expected a block_table (M, B, 3, d) and a step_size ({error}); {AGAIN}") from error


def write_plan(path: str | os.PathLike[str], plan: PlanArrays) -> None:
    """Write a plan as safetensors, atomically; equal plans give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_tensors(path, PLAN_FORMAT, plan.arrays(), {"step_size": repr(float(plan.step_size))})
