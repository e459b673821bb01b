"""Checks of the arrays that estimators are given: numbers, finite, of unit length, labels, the logit scale."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastfsl.errors import ConfigError, DataError, DTypeError, ShapeError

# CLIP's logit scale starts at 14.3 and is learned up to 100 and a little more. Its logarithm, which checkpoints store,
# lies between 2.6 and 5.
SMALLEST_USUAL_LOGIT_SCALE = 10.0


class LogitScaleWarning(UserWarning):
    """A logit scale is so small that it is probably the stored logarithm of one.

    Whoever wants such a scale silences it: `warnings.simplefilter("ignore", LogitScaleWarning)`.
    """


def as_array(values: object, name: str) -> NDArray[Any]:
    """Convert whatever holds numbers or labels to a numpy array; nothing is checked yet.

    Takes arrays and nested lists, torch tensors of any type, on any device and with a gradient, lists of them, and
    everything with `__array__`: data frames and series of pandas and polars, JAX arrays. bfloat16 and the 8-bit floats
    become float32.

    Args:
        values: what to convert.
        name: what messages call it.

    Raises:
        ShapeError: ragged, sparse, masked or otherwise not to be converted.
    """
    try:
        return _converted(values)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ShapeError(f"expected {name} to be an array of numbers or texts: {error}") from error


def numbers(values: object, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """A non-empty array of finite numbers.

    Args:
        values: whatever `as_array` takes.
        name: what messages call it.
        dtype: floating type to convert to.

    Raises:
        ShapeError: ragged, empty or not numbers.
        DataError: a value is not finite, or larger than `dtype` holds; its row is named.
    """
    if values is None:
        raise ShapeError(f"expected {name} to be an array of numbers, got None")
    array = as_array(values, name)
    if array.dtype.kind == "O":
        array = _from_objects(array, name)
    if array.dtype.kind == "c":
        raise ShapeError(f"expected {name} to be an array of numbers. Complex data not supported: got {array.dtype}")
    if array.dtype.kind not in "fiub" or array.size == 0:
        none = " (0 feature(s) (shape={0}) while a minimum of 1 is required.)" if array.shape[-1:] == (0,) else ""
        raise ShapeError(
            f"expected {name} to be a non-empty array of numbers, got {array.dtype} {array.shape}"
            f"{none.format(array.shape)}"
        )
    _refuse_infinite(array, name, "NaN or infinity")
    with np.errstate(over="ignore"):
        converted: NDArray[Any] = array.astype(dtype)
    _refuse_infinite(converted, name, f"a value larger than {np.dtype(dtype)} holds")
    return converted


def unit(array: NDArray[Any], name: str) -> NDArray[Any]:
    """The vectors along the last axis at unit length, whatever their length was.

    Raises:
        DataError: a vector is zero; its row is named.
    """
    largest = np.abs(array).max(axis=-1, keepdims=True)
    if not largest.all():
        row = int(np.argwhere(largest == 0)[0][0])
        raise DataError(f"expected non-zero {name}, got a zero vector in row {row}: it has no direction; remove it")
    scaled = array / largest  # so that no square over- or underflows
    result: NDArray[Any] = scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
    return result


def unit_rows(values: object, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Rows (rows, d) of finite numbers, none of them zero, at unit length.

    Raises:
        ShapeError: not a two-dimensional array of numbers.
        DataError: a value is not finite or a row is zero.
    """
    array = numbers(values, name, dtype)
    if array.ndim != 2:
        raise ShapeError(f"expected {name} (rows, d), got {array.shape}{_reshape(array)}")
    return unit(array, name)


def unit_views(values: object, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Features (n, d) or of V views (n, V, d), at unit length, as (n, V, d); V = 1 for the former.

    Raises:
        ShapeError: of another rank, or no numbers.
        DataError: a value is not finite or a vector is zero.
    """
    array = numbers(values, name, dtype)
    if array.ndim not in (2, 3):
        raise ShapeError(f"expected {name} (n, d) or (n, V, d), got {array.shape}{_reshape(array)}")
    return unit(array if array.ndim == 3 else array[:, None], name)


def label_array(labels: object, num_samples: int | None = None) -> NDArray[Any]:
    """Labels as one of numpy's types: integers as int64, texts, bools, or floating numbers without a fraction.

    Args:
        labels: whatever `as_array` takes, (n,).
        num_samples: n, where it is known.

    Returns:
        (n,).

    Raises:
        ShapeError: not one per sample.
        DataError: missing, infinite or fractional labels, or of several kinds.
    """
    if labels is None:
        raise DataError("this estimator requires y to be passed, but the target y is None: pass one label per sample")
    array = as_array(labels, "labels")
    if array.ndim != 1 or (num_samples is not None and len(array) != num_samples):
        wanted = "(n,)" if num_samples is None else f"({num_samples},)"
        raise ShapeError(f"expected labels {wanted}, one a sample, got {array.shape}")
    array = _of_one_kind(array)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            what = "NaN" if np.isnan(array).any() else "infinity or a value too large for dtype('float64')"
            raise DataError(f"Input y contains {what}. Expected one label per sample: remove or repair these samples")
        if (array != np.floor(array)).any():
            raise DataError(
                f"Unknown label type: continuous. Expected integer labels, texts or bools, got {array.dtype} with "
                "fractions"
            )
    elif array.dtype.kind in "iu":
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise DataError(f"expected labels that fit 64-bit integers, got {array.max()}")
        array = array.astype(np.int64)
    elif array.dtype.kind not in "Ub":
        raise DataError(f"Unknown label type: {array.dtype}. Expected integer labels, texts or bools")
    return array


def check_labels(labels: object, num_samples: int, num_classes: int) -> NDArray[np.int64]:
    """Class indices, (num_samples,).

    Raises:
        ShapeError: not one a sample.
        DataError: not integers in 0 .. num_classes - 1.
    """
    array = as_array(labels, "labels")
    if array.shape != (num_samples,):
        raise ShapeError(f"expected labels ({num_samples},), one a sample, got {array.shape}")
    if array.dtype.kind not in "iu":
        raise DataError(f"expected integer labels, got {array.dtype}: pass class indices 0..{num_classes - 1}")
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(
            f"expected labels in 0..{num_classes - 1} (one a class embedding), got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64)


def check_weights(weights: object, num_samples: int) -> NDArray[np.float64] | None:
    """Weights of samples, (num_samples,); None for None.

    Raises:
        ShapeError: not one number per sample.
        DataError: not finite, or their sum is not above 0.
    """
    if weights is None:
        return None
    array = numbers(weights, "sample_weight")
    if array.shape != (num_samples,):
        raise ShapeError(f"expected sample_weight ({num_samples},), one number per sample, got {array.shape}")
    if not array.sum() > 0:
        raise DataError(f"expected sample_weight with a sum above 0, got {array.sum()}")
    return array


def check_logit_scale(value: object, name: str = "logit_scale") -> float:
    """`logit_scale_of`, with a warning of one that is probably a stored logarithm."""
    scale = logit_scale_of(value, name)
    warn_of_logarithm(scale, name)
    return scale


def logit_scale_of(value: object, name: str = "logit_scale") -> float:
    """The factor on the cosines, 100 for None.

    Args:
        value: a number, or what holds one: a model's `logit_scale.exp()`, of any type and with a gradient.
        name: what messages call it.

    Raises:
        ConfigError: not one positive number.
    """
    if value is None:
        return 100.0
    array = as_array(value, name)
    if array.dtype.kind not in "fiu" or array.size != 1:
        raise ConfigError(f"expected {name} to be one positive number, got {value!r}")
    scale = float(array.item())
    if not (np.isfinite(scale) and scale > 0):
        raise ConfigError(f"expected a positive {name}, got {value}")
    return scale


def warn_of_logarithm(scale: float, name: str) -> None:
    """Warn if a logit scale is so small that it is probably the stored logarithm of one."""
    if scale < SMALLEST_USUAL_LOGIT_SCALE:
        meant = f"exp of it, {np.exp(scale):.4g}, as checkpoints store the logarithm"
        if scale < 1:
            meant = f"1 / {scale:g}, as a temperature is the inverse"
        warnings.warn(
            f"{name} is {scale:g}, and CLIP models have {SMALLEST_USUAL_LOGIT_SCALE:g} to 200: did you mean {meant}? "
            "If this scale is meant, silence fastfsl.arrays.LogitScaleWarning",
            LogitScaleWarning,
            stacklevel=2,
        )


def check_width(features_width: int, embeddings_width: int) -> None:
    """Refuse features and class embeddings of different widths.

    Raises:
        ShapeError: naming both.
    """
    if features_width != embeddings_width:
        raise ShapeError(
            f"expected features and class embeddings of one width, got {features_width} and {embeddings_width}: "
            "both must come from the same CLIP model"
        )


def _refuse_infinite(array: NDArray[np.generic], name: str, what: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))[0]) if array.ndim else 0
        raise DataError(f"expected finite {name}, got {what} (first in row {row}): remove or repair that row")


def _converted(values: object) -> NDArray[Any]:
    if all(hasattr(values, name) for name in ("detach", "cpu", "numpy")):  # a tensor, without importing torch
        return _from_tensor(values)
    if hasattr(values, "nnz") and hasattr(values, "toarray"):
        raise ShapeError("expected a dense array, got a sparse one: pass its .toarray()")
    if isinstance(values, np.ma.MaskedArray) and np.ma.getmaskarray(values).any():
        raise ShapeError("expected an array without masked values, got some: remove or fill them")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        if not isinstance(values, list | tuple):
            raise
        array = np.stack([_converted(value) for value in values])  # of tensors that numpy cannot read by itself
    if array.dtype.type.__module__ == "ml_dtypes":  # of which numpy knows the size alone
        return array.astype(np.int64 if "int" in array.dtype.name else np.float32)
    return array


def _from_tensor(tensor: Any) -> NDArray[Any]:  # noqa: ANN401  # torch is not imported here
    if tensor.is_complex():
        raise ShapeError("Complex data not supported")
    try:
        array: NDArray[Any] = tensor.numpy(force=True)
    except TypeError:  # numpy has no such type: bfloat16, 8-bit floats
        array = tensor.float().numpy(force=True)
    return array


def _from_objects(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Numbers that are kept as Python objects, as a data frame of mixed columns does."""
    if any(isinstance(value, str | bytes) for value in array.flat):
        raise ShapeError(f"expected {name} to be a non-empty array of numbers, got texts")
    if any(isinstance(value, complex) for value in array.flat):
        raise ShapeError(f"expected {name} to be an array of numbers. Complex data not supported")
    try:
        return array.astype(np.float64)
    except TypeError as error:
        raise DTypeError(f"expected {name} to be an array of numbers: {error}") from error
    except ValueError as error:
        raise ShapeError(f"expected {name} to be an array of numbers: {error}") from error


def _of_one_kind(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels that are kept as Python objects, or as bytes, in one of numpy's types."""
    if labels.dtype.kind in "TS":
        return labels.astype(np.str_)
    if labels.dtype.kind != "O":
        return labels
    values = labels.tolist()
    if all(isinstance(value, str) for value in values):
        return np.array(values, dtype=np.str_)
    if all(isinstance(value, bool | int | float | np.generic) for value in values):
        return np.array(values)
    kinds = ", ".join(sorted({type(value).__name__ for value in values}))
    raise DataError(f"expected labels of one kind, none of them missing, got {kinds}")


def _reshape(array: NDArray[Any]) -> str:
    return ". Reshape your data: one sample is features[None]" if array.ndim == 1 else ""
