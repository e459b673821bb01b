"""The flow plan on disk: shared weights and per-step tables, in safetensors."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.untrusted import AGAIN, NEWER, is_positive, read_regular, strict_json
from fastfsl.errors import BundleError, DataError, ShapeError
from fastfsl.files import staged_file

PLAN_FORMAT = "fastfsl-flow-plan"

# The header holds twelve short entries; the largest plan in sight (d = 1024, 12 blocks) has 110 MB.
MAX_PLAN_HEADER_BYTES = 64 * 2**10
MAX_PLAN_BYTES = 4 * 2**30


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


def read_plan(path: str | os.PathLike[str]) -> PlanArrays:
    """Read a plan written by ``write_plan``.

    Raises:
        BundleError: the file is missing, damaged, not a plan, or of an unknown version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    data = read_regular(path, MAX_PLAN_BYTES)
    header = _safetensors_header(data, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != PLAN_FORMAT:
        raise BundleError(f"{path}: not a fastfsl flow plan; {AGAIN}")
    if metadata.get("version") != "1":
        raise BundleError(f"{path}: flow plan of version {metadata.get('version')!r}, expected '1'; {NEWER}")
    if sorted(header) != sorted(_PLAN_ARRAYS):
        raise BundleError(f"{path}: expected the arrays {', '.join(_PLAN_ARRAYS)}, got {sorted(header)}; {AGAIN}")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise BundleError(f"{path}: {name} must be float32 (F32); {AGAIN}")
    try:
        return PlanArrays(step_size=float(metadata.get("step_size", "")), **load(data))
    except (ShapeError, DataError, SafetensorError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from error


def write_plan(path: str | os.PathLike[str], plan: PlanArrays) -> None:
    """Write a plan as safetensors, atomically; equal plans give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(array) for name, array in plan.arrays().items()})
    length = struct.unpack("<Q", data[:8])[0]
    # safetensors writes its metadata in random order; putting it in here keeps the bytes, and so the hash, the same.
    metadata = {"format": PLAN_FORMAT, "version": "1", "step_size": repr(float(plan.step_size))}
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    with staged_file(Path(path)) as partial:
        partial.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])


def _safetensors_header(data: bytes, path: Path) -> dict[str, Any]:
    """The header of a safetensors file, its length bounded before it is parsed."""
    if len(data) < 8:
        raise BundleError(f"{path}: expected a safetensors file, got {len(data)} bytes; {AGAIN}")
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(MAX_PLAN_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{path}: the header claims {length} bytes, more than a plan has or may have; {AGAIN}")
    return strict_json(data[8 : 8 + length], path)
