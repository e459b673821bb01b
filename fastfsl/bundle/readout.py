"""The read-out on disk and in numpy: from a feature, and the flow's logits where there is a flow, to logits.

logits = (flow_weight * flow_logits + x W^T + b + sum_k exp(-beta_k (1 - x keys_k^T)) values_k) / temperature
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.manifest import FLOW_GRAPH, READOUT, Manifest
from fastfsl.bundle.tensors import read_tensors, write_tensors
from fastfsl.bundle.untrusted import AGAIN, is_fraction, is_positive, strict_json
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError, DataError, ShapeError

READOUT_FORMAT = "fastfsl-readout"

_Wide = np.ndarray[Any, np.dtype[np.float64]]

# Affinities (rows, keys) held at once: 8 MiB of float64, whatever the number of rows.
_AFFINITIES_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class KernelArrays:
    """exp(-beta (1 - x keys^T)) values: cached samples that vote for classes by how near they are.

    Args:
        keys: (n, d) float32, n above 0; of any length.
        values: (n, C) float32.
        beta: sharpness, above 0.

    Raises:
        ShapeError: an array has another dtype or shape.
        DataError: a value is not finite, or ``beta`` is not above 0.
    """

    keys: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]
    beta: float

    def __post_init__(self) -> None:
        if not is_positive(self.beta):
            raise DataError(f"beta must be a finite number above 0, got {self.beta!r}")
        _check_array("keys", self.keys, (None, None))
        _check_array("values", self.values, (len(self.keys), None))


@dataclass(frozen=True, eq=False)
class Readout:
    """What turns a unit feature and the flow's logits into logits.

    Args:
        flow_weight: factor on the flow's logits, 0 or above; 0 where there is no flow.
        linear_weight: W, (C, d) float32; zeros where there is no linear part.
        linear_bias: b, (C,) float32.
        kernels: kernel parts, each over d features and C classes.
        temperature: divides the logits, above 0.
        threshold: probability of the best class below which the answer is "none of these", 0 to 1; None: there is no
            such answer.

    Raises:
        ShapeError: an array has another dtype or shape.
        DataError: a value is not finite or out of range.
    """

    flow_weight: float
    linear_weight: np.ndarray[Any, Any]
    linear_bias: np.ndarray[Any, Any]
    kernels: tuple[KernelArrays, ...] = ()
    temperature: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not _is_weight(self.flow_weight):
            raise DataError(f"flow_weight must be a finite number, 0 or above, got {self.flow_weight!r}")
        if not is_positive(self.temperature):
            raise DataError(f"temperature must be a finite number above 0, got {self.temperature!r}")
        if self.threshold is not None and not is_fraction(self.threshold):
            raise DataError(f"threshold must be None or a number from 0 to 1, got {self.threshold!r}")
        _check_array("linear_weight", self.linear_weight, (None, None))
        _check_array("linear_bias", self.linear_bias, (self.num_classes,))
        for index, kernel in enumerate(self.kernels):
            _check_array(f"kernel{index}_keys", kernel.keys, (None, self.dim))
            _check_array(f"kernel{index}_values", kernel.values, (None, self.num_classes))

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return int(self.linear_weight.shape[0])

    @property
    def dim(self) -> int:
        """d, the width of the features."""
        return int(self.linear_weight.shape[1])

    def describe(self) -> dict[str, Any]:
        """What it consists of, as JSON values: no arrays."""
        return {
            "flow_weight": self.flow_weight,
            "linear": bool(self.linear_weight.any() or self.linear_bias.any()),
            "kernels": [{"keys": len(kernel.keys), "beta": kernel.beta} for kernel in self.kernels],
            "temperature": self.temperature,
            "threshold": self.threshold,
        }

    def apply(
        self, features: np.ndarray[Any, Any], flow_logits: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits of unit features.

        Computed in float64, because a kernel's terms may cancel: ProKeR's add up to thousands before they leave logits
        of ten. The stored float32 arrays are exact enough.

        Args:
            features: (n, d), L2-normalised.
            flow_logits: (n, C); None where there is no flow.

        Returns:
            (n, C) float32; infinite or NaN where the arrays' values are too large for it.

        Raises:
            ShapeError: the features have another width, or the flow's logits another shape or are missing.
        """
        expected = (len(features), self.num_classes)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ShapeError(f"expected features (n, {self.dim}), got {features.shape}")
        if flow_logits is None and self.flow_weight > 0:
            raise ShapeError(f"expected flow_logits {expected}, because flow_weight is {self.flow_weight}, got None")
        if flow_logits is not None and flow_logits.shape != expected:
            raise ShapeError(f"expected flow_logits {expected}, got {flow_logits.shape}")
        logits = np.empty(expected, np.float32)
        step = max(1, _AFFINITIES_AT_ONCE // max((len(kernel.keys) for kernel in self.kernels), default=1))
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(features), step):
                rows = slice(start, start + step)
                total = self._logits(features[rows].astype(np.float64))
                if flow_logits is not None:
                    total += self.flow_weight * flow_logits[rows].astype(np.float64)
                logits[rows] = total / self.temperature
        return logits

    def _logits(self, x: _Wide) -> _Wide:
        """The linear and the kernel parts, before the temperature."""
        weight, bias, kernels = self._wide
        total: _Wide = x @ weight.T + bias
        for keys, values, beta in kernels:
            total += np.exp(beta * (x @ keys.T - 1.0)) @ values
        return total

    @cached_property
    def _wide(self) -> tuple[_Wide, _Wide, list[tuple[_Wide, _Wide, float]]]:
        """The arrays in float64, made once: a conversion costs as much as many a batch."""
        kernels = [(k.keys.astype(np.float64), k.values.astype(np.float64), k.beta) for k in self.kernels]
        return self.linear_weight.astype(np.float64), self.linear_bias.astype(np.float64), kernels


def read_readout(path: str | os.PathLike[str], data: bytes | None = None) -> Readout:
    """Read a read-out written by ``write_readout``.

    Args:
        path: the file; with ``data`` only what messages call it.
        data: the file's bytes, if they were read already.

    Raises:
        BundleError: the file is missing, damaged, not a read-out, or of an unknown version.
    """
    metadata, arrays = read_tensors(path, READOUT_FORMAT, "read-out", data)
    try:
        values = strict_json(metadata.get("values", "").encode(), path)
        if sorted(values) != sorted(_VALUES) or not isinstance(values["betas"], list):
            raise ValueError(f"expected the values {', '.join(_VALUES)}, got {values!r:.80}")
        betas = values.pop("betas")
        names = _names(len(betas))
        if sorted(arrays) != sorted(names):
            raise ValueError(f"expected the arrays {', '.join(names)}, got {sorted(arrays)}")
        weight, bias, *parts = (arrays[name] for name in names)
        kernels = tuple(
            KernelArrays(keys, values, beta) for keys, values, beta in zip(parts[::2], parts[1::2], betas, strict=True)
        )
        return Readout(linear_weight=weight, linear_bias=bias, kernels=kernels, **values)
    except (ShapeError, DataError, ValueError) as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from error


def load_readout(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> Readout | None:
    """The read-out of a bundle; None if it has none, because its logits are simply the flow's.

    Raises:
        BundleError: it is altered or no read-out, or contradicts the manifest.
    """
    if READOUT not in manifest.files:
        return None
    path = Path(bundle_dir) / READOUT
    readout = read_readout(path, read_file(bundle_dir, manifest, READOUT))
    found = (readout.num_classes, readout.dim, readout.flow_weight > 0)
    expected = (len(manifest.class_names), manifest.embed_dim, FLOW_GRAPH in manifest.files)
    if found != expected:
        raise BundleError(f"{path}: (classes, width, flow) are {found}, the manifest says {expected}; export it again")
    return readout


def write_readout(path: str | os.PathLike[str], readout: Readout) -> None:
    """Write a read-out as safetensors, atomically; equal read-outs give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    parts = [array for kernel in readout.kernels for array in (kernel.keys, kernel.values)]
    arrays = dict(zip(_names(len(readout.kernels)), [readout.linear_weight, readout.linear_bias, *parts], strict=True))
    betas = [float(kernel.beta) for kernel in readout.kernels]
    values = dict(zip(_VALUES, (readout.flow_weight, readout.temperature, readout.threshold, betas), strict=True))
    write_tensors(path, READOUT_FORMAT, arrays, {"values": json.dumps(values)})


_VALUES = ("flow_weight", "temperature", "threshold", "betas")


def _names(num_kernels: int) -> list[str]:
    """Names of the arrays, in their order."""
    parts = [f"kernel{index}_{part}" for index in range(num_kernels) for part in ("keys", "values")]
    return ["linear_weight", "linear_bias", *parts]


def _check_array(name: str, array: np.ndarray[Any, Any], shape: tuple[int | None, ...]) -> None:
    """Refuse an array that is not float32, finite, non-empty and of the shape; None stands for any size."""
    if array.dtype != np.float32:
        raise ShapeError(f"{name} must be a float32 array, got {array.dtype}")
    sizes_fit = len(array.shape) == len(shape) and all(
        size == found if size is not None else found > 0 for size, found in zip(shape, array.shape, strict=True)
    )
    if not sizes_fit:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{name} must have shape ({wanted}), nothing empty, got {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds NaN or infinite values")


def _is_weight(value: object) -> bool:
    is_zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
    return is_positive(value) or is_zero
