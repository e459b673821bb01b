"""Where a flow sends its classes, and what takes the text of another class to where it would send that one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.manifest import Manifest
from fastfsl.bundle.tensors import read_tensors, write_tensors
from fastfsl.bundle.text_record import TEXT_CLASSES
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError

CLASS_PLACES_FORMAT = "fastfsl-class-places"


@dataclass(frozen=True, eq=False)
class ClassPlaces:
    """The classes of a flow's graph, and what a new one needs.

    Args:
        class_embeddings: what the flow is read out with, L2-normalised, (C K, d) float32, a class's K prototypes one
            after the other.
        target_shift: added to the text embedding of a new class, (d,) float32.
        target_centre: what the places of classes lie about, (d,) float32; None in bundles written before it was kept.
    """

    class_embeddings: np.ndarray[Any, np.dtype[np.float32]]
    target_shift: np.ndarray[Any, np.dtype[np.float32]]
    target_centre: np.ndarray[Any, np.dtype[np.float32]] | None = None


def read_class_places(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> ClassPlaces:
    """The places of a bundle's classes.

    Raises:
        BundleError: the file is altered, damaged, or contradicts the manifest.
    """
    path = Path(bundle_dir) / TEXT_CLASSES
    _, arrays = read_tensors(
        path, CLASS_PLACES_FORMAT, "list of class places", read_file(bundle_dir, manifest, TEXT_CLASSES)
    )
    classes, dim = len(manifest.class_names), manifest.embed_dim
    shapes = {name: array.shape for name, array in arrays.items()}
    rows = shapes.get("class_embeddings", (0,))[0]
    expected = {"class_embeddings": (rows, dim), "target_shift": (dim,)}
    if "target_centre" in shapes:
        expected["target_centre"] = (dim,)
    if shapes != expected or rows == 0 or rows % classes:
        raise BundleError(f"{path}: expected arrays of {classes} classes, {expected}, got {shapes}; {AGAIN}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise BundleError(f"{path}: holds NaN or infinite values; {AGAIN}")
    return ClassPlaces(**arrays)


def write_class_places(path: str | os.PathLike[str], places: ClassPlaces) -> None:
    """Write the places of classes as safetensors, atomically; equal places give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    arrays = {name: array for name, array in vars(places).items() if array is not None}
    write_tensors(path, CLASS_PLACES_FORMAT, arrays, {})
