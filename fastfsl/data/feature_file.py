"""Feature files: what some encoder computed, in one `.npz` or `.safetensors` file.

Arrays (n images, V augmented views, d embedding width, C classes):

| name                                     | shape               | type                                            |
|------------------------------------------|---------------------|-------------------------------------------------|
| `train_features`                         | (n, d) or (n, V, d) | float16, float32 or float64                     |
| `train_labels`                           | (n,)                | any integer type, or text; see below            |
| `val_features`, `val_labels`, `test_...` | (n, d), (n,)        | the same; optional                              |
| `class_embeddings`                       | (C, d)              | floating                                        |
| `class_names`, optional                  | (C,)                | text; default: the labels, or "class 0", ...    |
| `logit_scale`, optional                  | ()                  | number > 0, exp of the temperature; default 100 |

Labels in [0, C) are indices of rows of `class_embeddings`. Text labels are class names: row c belongs to
`class_names[c]`, or, without `class_names`, to the c-th of the distinct labels of all splits in ascending order, of
which there must then be C. So do other integers, such as 1 .. C, of which C are distinct.

At least one split must be there. Other arrays are ignored, but for one whose name is nearly that of an array which is
missing: `validation_features`, `test_label`. safetensors has no text arrays: `class_names` and text
labels are there JSON lists in the file's metadata. Nothing is unpickled. Values are returned as stored, in float32:
whoever compares directions normalises, which is why rows without a direction (all zeros) are refused.
"""

import difflib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastfsl.arrays import warn_of_logarithm
from fastfsl.data.dataset import SPLITS, FeatureDataset, FloatArray, LabelArray
from fastfsl.data.file_labels import match_labels
from fastfsl.data.split_names import split_of
from fastfsl.errors import ConfigError, DataError, ShapeError, resource_error
from fastfsl.files import staged_file

DEFAULT_LOGIT_SCALE = 100.0

_KNOWN = (
    *(f"{split}_{part}" for split in SPLITS for part in ("features", "labels")),
    "class_embeddings",
    "class_names",
    "logit_scale",
)

# How alike two names are of which one is probably mistyped: a letter or two of a dozen.
_CLOSE = 0.88

# Arrays of text, which safetensors keeps in the metadata.
_TEXTS = ("class_names", *(f"{split}_labels" for split in SPLITS))

_AnyArray = NDArray[Any]


def read_feature_file(path: str | Path) -> FeatureDataset:
    """Read a feature file.

    Args:
        path: A `.npz` or `.safetensors` file with the arrays above.

    Returns:
        The data set, float32 features and int64 labels.

    Raises:
        DataError: Unreadable file, missing array, NaN or infinite value, row of zeros, labels that do not fit the
            classes, fewer than two classes.
        ShapeError: Arrays whose shapes or types do not fit the table above or each other.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"feature file {path} does not exist")
    arrays = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_npz(path)
    return _checked(path, arrays)


def write_feature_file(path: str | Path, dataset: FeatureDataset) -> None:
    """Write a feature file, whole or not at all; the extension chooses the format.

    Args:
        path: Where to; `.npz` or `.safetensors`. An existing file is replaced.
        dataset: What to write.

    Raises:
        ConfigError: Another extension, or the file cannot be written.
    """
    path = Path(path)
    arrays: dict[str, _AnyArray] = {"class_embeddings": dataset.class_embeddings}
    for split, (features, labels) in dataset.splits.items():
        arrays[f"{split}_features"] = features
        arrays[f"{split}_labels"] = labels
    arrays["logit_scale"] = np.array(dataset.logit_scale, dtype=np.float64)
    arrays = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays.items()}
    suffix = path.suffix.lower()
    if suffix not in {".npz", ".safetensors"}:
        raise ConfigError(f"feature files end in .npz or .safetensors, got {suffix!r}: {path}")
    with staged_file(path) as staging:
        if suffix == ".npz":
            with staging.open("wb") as file:
                np.savez(file, allow_pickle=False, class_names=np.array(dataset.class_names, dtype=np.str_), **arrays)
        else:
            staging.write_bytes(save(arrays, metadata={"class_names": json.dumps(dataset.class_names)}))


def _read_npz(path: Path) -> dict[str, _AnyArray]:
    advice = "save it with numpy.savez(path, train_features=..., train_labels=..., class_embeddings=...)"
    arrays: dict[str, _AnyArray] = {}
    try:
        # Opened here: numpy leaves a file that it opened itself open when its content is damaged.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a single array, not the named arrays of a feature file: {advice}")
            with file:
                _check_names(path, file.files)
                arrays = {name: _from_npz(path, file, name) for name in file.files if _is_known(name)}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise resource_error(error, f"read {path}") or DataError(
            f"{path} cannot be read as .npz ({error}); nothing is unpickled: {advice}"
        ) from error
    except (MemoryError, OverflowError) as error:
        raise DataError(f"{path} is damaged or too large for this machine's memory ({error})") from error
    return arrays


def _read_safetensors(path: Path) -> dict[str, _AnyArray]:
    arrays: dict[str, _AnyArray] = {}
    try:
        path.open("rb").close()  # safetensors calls a file missing that it cannot open, whatever the reason
        with safe_open(path, framework="numpy") as file:
            _check_names(path, [*file.keys(), *(file.metadata() or {})])
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                if _is_known(name):
                    arrays[name] = file.get_tensor(name)
            texts = {name: text for name, text in (file.metadata() or {}).items() if name in _TEXTS}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise resource_error(error, f"read {path}") or DataError(
            f"{path} cannot be read as a safetensors feature file ({error}); "
            "features in float16, float32 or float64, labels as integers"
        ) from error
    for name, text in texts.items():
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {name} in the metadata is not a JSON list ({error})") from error
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise DataError(f"{path}: {name} in the metadata is not a JSON list of texts")
        if name in arrays:
            raise DataError(f"{path}: {name} is both an array and in the metadata: leave one of them out")
        arrays[name] = np.array(listed, dtype=np.str_)
    return arrays


def _from_npz(path: Path, file: np.lib.npyio.NpzFile, name: str) -> _AnyArray:
    try:
        return np.asarray(file[name])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} holds Python objects, and nothing is unpickled: save texts as numpy.array({name}, "
            "dtype=str), and numbers as an array of numbers"
        ) from error


def _is_known(name: str) -> bool:
    return name in _KNOWN


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse a name that was probably meant as one of those that are missing: its array would be lost.

    Raises:
        DataError: naming both.
    """
    names = list(names)
    missing = [name for name in _KNOWN if name not in names]
    for name in names:
        if name in _KNOWN:
            continue
        prefix, _, part = name.casefold().rpartition("_")
        meant = f"{split_of(prefix)}_{part}"
        close = [meant] if meant in missing else difflib.get_close_matches(name.casefold(), missing, 1, _CLOSE)
        if close:
            raise DataError(f"{path}: {name!r} would not be read: rename it {close[0]!r}, or remove it")


def _checked(path: Path, arrays: Mapping[str, _AnyArray]) -> FeatureDataset:
    class_embeddings = _features(path, arrays, "class_embeddings", dimensions=(2,))
    num_classes, dim = class_embeddings.shape
    if num_classes < 2:
        raise DataError(f"{path}: class_embeddings has {num_classes} row: at least two classes are needed")
    present = [split for split in SPLITS if f"{split}_features" in arrays or f"{split}_labels" in arrays]
    of_splits = {name: arrays[name] for name in (f"{split}_labels" for split in present) if name in arrays}
    names, indices = match_labels(path, of_splits, arrays.get("class_names"), num_classes)
    arrays = {**arrays, **indices}
    splits: dict[str, tuple[FloatArray, LabelArray]] = {}
    for split in present:
        dimensions = (2, 3) if split == "train" else (2,)
        features = _features(path, arrays, f"{split}_features", dimensions)
        if features.shape[-1] != dim:
            raise ShapeError(
                f"{path}: {split}_features has width {features.shape[-1]}, class_embeddings has {dim}: "
                "both must come from the same encoder"
            )
        splits[split] = features, _labels(path, arrays, f"{split}_labels", len(features), num_classes)
    if not splits:
        raise DataError(f"{path} has no train_features, val_features or test_features; it holds {_names(arrays)}")
    return FeatureDataset(
        names,
        splits,
        class_embeddings,
        _logit_scale(path, arrays.get("logit_scale")),
        path,
    )


def _features(path: Path, arrays: Mapping[str, _AnyArray], name: str, dimensions: tuple[int, ...]) -> FloatArray:
    array = _required(path, arrays, name)
    if array.dtype.kind != "f":
        raise ShapeError(f"{path}: {name} has type {array.dtype}, expected floating point")
    if array.ndim not in dimensions or 0 in array.shape:
        wanted = " or ".join({2: "(rows, d)", 3: "(n, V, d)"}[number] for number in dimensions)
        raise ShapeError(f"{path}: {name} has shape {array.shape}, expected {wanted}, none of them 0")
    with np.errstate(over="ignore"):  # a float64 beyond float32's range turns into inf, reported below
        features = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.asarray(~np.isfinite(features).all(axis=-1))
    if bad.any():
        row = _first(bad)
        raise DataError(f"{path}: {name} has NaN or infinite values in {int(bad.sum())} rows, first in row {row}")
    # Squares of subnormal numbers vanish: compare the largest entry, not the norm.
    flat = np.asarray(np.abs(features).max(axis=-1) < np.finfo(np.float32).tiny)
    if flat.any():
        row = _first(flat)
        raise DataError(
            f"{path}: {name} is zero in {int(flat.sum())} rows, first in row {row}: such a row has no direction and "
            "cannot be normalised"
        )
    return features


def _labels(path: Path, arrays: Mapping[str, _AnyArray], name: str, length: int, num_classes: int) -> LabelArray:
    labels = _required(path, arrays, name)
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {name} has type {labels.dtype}, expected integers or class names: convert with .astype('int64'), "
            "or texts with numpy.array(labels, dtype=str)"
        )
    if labels.shape != (length,):
        raise ShapeError(
            f"{path}: {name} has shape {labels.shape}, expected ({length},): one label per row of features"
        )
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{path}: {name}[{row}] is {labels[row]}, expected 0..{num_classes - 1}: "
            f"class_embeddings has {num_classes} rows"
        )
    return labels.astype(np.int64)


def _logit_scale(path: Path, value: _AnyArray | None) -> float:
    if value is None:
        return DEFAULT_LOGIT_SCALE
    if value.size != 1 or value.dtype.kind not in "fiu":
        raise ShapeError(f"{path}: logit_scale has shape {value.shape} and type {value.dtype}, expected one number")
    scale = float(value.reshape(()))
    if not np.isfinite(scale) or scale <= 0:
        raise DataError(f"{path}: logit_scale is {scale}, expected a number above 0 (100 for OpenAI's CLIP)")
    warn_of_logarithm(scale, f"{path}: logit_scale")
    return scale


def _required(path: Path, arrays: Mapping[str, _AnyArray], name: str) -> _AnyArray:
    if name not in arrays:
        raise DataError(f"{path} has no array {name!r}; it holds {_names(arrays)}")
    return arrays[name]


def _names(arrays: Mapping[str, _AnyArray]) -> str:
    return ", ".join(sorted(arrays)) or "none of the expected arrays"


def _first(bad: NDArray[np.bool_]) -> str:
    row = tuple(int(index) for index in np.argwhere(bad)[0])
    return str(row[0]) if len(row) == 1 else str(row)
