"""The flow's weights in 16 bits, with all that its compiled kernels read besides: ``weights.safetensors``.

Products' weights are fp16 or bf16; biases, tables and class embeddings stay float32. Numpy has no bf16: there the upper
16 bits of the float32 numbers are kept, as uint16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.manifest import FLOW_KERNELS_WEIGHTS, KERNEL_DTYPES, Manifest
from fastfsl.bundle.plan import PlanArrays
from fastfsl.bundle.tensors import read_tensors, write_tensors
from fastfsl.bundle.untrusted import AGAIN, is_positive
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError, DataError, ShapeError

WEIGHTS_FORMAT = "fastfsl-flow-kernel-weights"
WEIGHT_NAMES = ("input_weight", "first_weight", "second_weight", "carry_weight", "output_weight")
_TABLE_NAMES = (
    "input_bias", "first_bias", "second_bias", "carry_bias", "output_bias", "block_table", "final_table",
)  # fmt: skip
_METADATA = ("dtype", "step_size", "logit_scale", "num_prototypes")
_STORED = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}


@dataclass(frozen=True, eq=False)
class FlowWeights:
    """A flow plan with its weights rounded to 16 bits, and the classes that its states are compared with.

    Args:
        dtype: "fp16" or "bf16".
        arrays: the arrays of ``PlanArrays`` under their names: ``WEIGHT_NAMES`` float16, or uint16 holding the bits of
            bf16 numbers; the others float32.
        class_embeddings: L2-normalised, (C K, d) float32, a class's K prototypes one after the other.
        step_size: Euler step h.
        logit_scale: factor on the cosine similarities.
        num_prototypes: K.

    Raises:
        ShapeError: an array is missing, unknown, or has another dtype or shape.
        DataError: a value is not finite or out of range.
    """

    dtype: str
    arrays: Mapping[str, np.ndarray[Any, Any]]
    class_embeddings: np.ndarray[Any, Any]
    step_size: float
    logit_scale: float
    num_prototypes: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in KERNEL_DTYPES:
            raise DataError(f"dtype must be one of {', '.join(KERNEL_DTYPES)}, got {self.dtype!r}")
        if not is_positive(self.logit_scale):
            raise DataError(f"logit_scale must be a finite number above 0, got {self.logit_scale!r}")
        if sorted(self.arrays) != sorted((*WEIGHT_NAMES, *_TABLE_NAMES)):
            raise ShapeError(
                f"expected the arrays {', '.join((*WEIGHT_NAMES, *_TABLE_NAMES))}, got {sorted(self.arrays)}"
            )
        for name in WEIGHT_NAMES:
            if self.arrays[name].dtype != _STORED[self.dtype]:
                raise ShapeError(
                    f"{name} must be {_STORED[self.dtype]} for {self.dtype}, got {self.arrays[name].dtype}"
                )
        plan = self.to_plan()  # checks every shape, and that every value is finite
        classes, count = self.class_embeddings, self.num_prototypes
        if count < 1:
            raise DataError(f"num_prototypes must be above 0, got {count}")
        fits = classes.ndim == 2 and classes.shape[1] == plan.dim and len(classes) > 0 and len(classes) % count == 0
        if classes.dtype != np.float32 or not fits:
            raise ShapeError(
                f"class_embeddings must be float32 (C * {count}, {plan.dim}), got {classes.dtype} {classes.shape}"
            )
        if not np.isfinite(classes).all():
            raise DataError("class_embeddings holds NaN or infinite values")

    @property
    def dim(self) -> int:
        """d, the width of the features."""
        return int(self.arrays["input_weight"].shape[0])

    @property
    def num_steps(self) -> int:
        """M, the number of Euler steps."""
        return int(self.arrays["block_table"].shape[0])

    @property
    def num_blocks(self) -> int:
        """B, the number of residual blocks."""
        return int(self.arrays["block_table"].shape[1])

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return len(self.class_embeddings) // self.num_prototypes

    def to_plan(self) -> PlanArrays:
        """The plan in float32 that these rounded weights stand for."""
        arrays = {name: self.arrays[name] for name in _TABLE_NAMES}
        arrays |= {name: widen(self.arrays[name]) for name in WEIGHT_NAMES}
        return PlanArrays(step_size=self.step_size, **arrays)

    @classmethod
    def from_plan(
        cls,
        plan: PlanArrays,
        dtype: str,
        class_embeddings: np.ndarray[Any, Any],
        logit_scale: float,
    ) -> FlowWeights:
        """Round a plan's weights.

        Args:
            plan: the plan in float32.
            dtype: "fp16" or "bf16".
            class_embeddings: L2-normalised, (C, d), or (C, K, d) with K prototypes a class, float32.
            logit_scale: factor on the cosine similarities.

        Raises:
            ShapeError: the class embeddings do not have the plan's width.
            DataError: a weight is not finite in this dtype.
        """
        arrays = plan.arrays()
        arrays |= {name: narrow(arrays[name], dtype) for name in WEIGHT_NAMES}
        prototypes = class_embeddings.shape[1] if class_embeddings.ndim == 3 else 1
        rows = np.ascontiguousarray(class_embeddings.reshape(-1, class_embeddings.shape[-1]))
        return cls(dtype, arrays, rows, plan.step_size, float(logit_scale), prototypes)


def narrow(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """float32 to float16, or to the bits of bf16, rounded to nearest, ties to even.

    Too large a number becomes infinite; NaN is not to be passed.
    """
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded: np.ndarray[Any, Any] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def widen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ``narrow`` gave, as float32: exact."""
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def read_flow_weights(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> FlowWeights:
    """Read what a bundle's compiled kernels compute with.

    Raises:
        BundleError: the bundle has no kernels, or the file is damaged or contradicts the manifest.
    """
    path = Path(bundle_dir) / FLOW_KERNELS_WEIGHTS
    if manifest.kernels is None:
        raise BundleError(f"{bundle_dir}: has no compiled kernels; export it with --arch")
    data = read_file(bundle_dir, manifest, FLOW_KERNELS_WEIGHTS)
    metadata, arrays = read_tensors(path, WEIGHTS_FORMAT, "flow kernels' weights file", data, ("F32", "F16", "U16"))
    if set(metadata) != {"format", "version", *_METADATA} or "class_embeddings" not in arrays:
        raise BundleError(f"{path}: expected class_embeddings and the metadata {', '.join(_METADATA)}; {AGAIN}")
    classes = arrays.pop("class_embeddings")
    try:
        weights = FlowWeights(
            metadata["dtype"],
            arrays,
            classes,
            float(metadata["step_size"]),
            float(metadata["logit_scale"]),
            int(metadata["num_prototypes"]),
        )
    except (ShapeError, DataError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from error
    found = _sizes(weights.dim, weights.num_steps, weights.num_classes, weights.step_size)
    expected = _sizes(manifest.embed_dim, manifest.num_steps, len(manifest.class_names), manifest.step_size)
    found |= {"logit_scale": weights.logit_scale, "dtype": weights.dtype}
    expected |= {"logit_scale": manifest.logit_scale, "dtype": manifest.kernels["dtype"]}
    if found != expected:
        raise BundleError(f"{path}: holds {found}, the manifest says {expected}; {AGAIN}")
    return weights


def write_flow_weights(path: str | os.PathLike[str], weights: FlowWeights) -> None:
    """Write as safetensors, atomically; equal weights give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    about = {
        "dtype": weights.dtype,
        "step_size": repr(float(weights.step_size)),
        "logit_scale": repr(float(weights.logit_scale)),
        "num_prototypes": str(weights.num_prototypes),
    }
    write_tensors(path, WEIGHTS_FORMAT, {**weights.arrays, "class_embeddings": weights.class_embeddings}, about)


def _sizes(dim: int, steps: int, classes: int, step_size: float | None) -> dict[str, Any]:
    return {"width": dim, "steps": steps, "classes": classes, "step size": step_size}
