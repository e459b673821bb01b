import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from fastfsl.arrays import (
    LogitScaleWarning,
    check_labels,
    check_logit_scale,
    check_width,
    label_array,
    numbers,
    unit,
    unit_rows,
    unit_views,
)
from fastfsl.errors import ConfigError, DataError, DTypeError, ShapeError

finite = st.floats(-1e300, 1e300, allow_nan=False, allow_infinity=False)


@given(arrays(np.float64, (3, 4), elements=finite))
def test_unit_vectors_have_length_one_and_the_old_direction(array):
    if not np.abs(array).max(axis=1).all():
        with pytest.raises(DataError, match="zero vector"):
            unit(array, "rows")
        return
    result = unit(array, "rows")
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=1e-12)
    largest = np.abs(array).argmax(axis=1)
    rows = np.arange(3)
    expected = array / array[rows, largest][:, None]
    np.testing.assert_allclose(result / result[rows, largest][:, None], expected, atol=1e-300)  # no digits below


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ([[1.0], [1.0, 2.0]], ShapeError, "array of numbers"),
        ([], ShapeError, "non-empty"),
        ([["a"]], ShapeError, "numbers"),
        ([[1j]], ShapeError, "numbers"),
        (None, ShapeError, "got None"),
        (np.nan, DataError, "NaN or infinity"),
        ([[1.0], [np.nan]], DataError, "NaN or infinity .first in row 1"),
        ([[1e200]], DataError, "larger than float32"),
    ],
)
def test_what_is_no_finite_number_is_named(values, error, words):
    with pytest.raises(error, match=words):
        numbers(values, "features", np.float32)


class OnADevice:
    """Like a tensor on a card: numpy cannot read it, and `numpy(force=True)` copies it."""

    def __init__(self, array):
        self.array = array

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self

    def is_complex(self):
        return False

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.array


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 2.0]], dtype=torch.float8_e4m3fn),
        torch.tensor([[1.0, 2.0]], dtype=torch.float16, requires_grad=True),
        torch.tensor([[1, 2]], dtype=torch.int8),
        torch.tensor([[1.0, 2.0]], requires_grad=True) * 1,
        [torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)],
        [[torch.tensor(1.0), torch.tensor(2.0, dtype=torch.bfloat16)]],
        OnADevice(np.array([[1.0, 2.0]])),
        [OnADevice(np.array([1.0, 2.0]))],
        np.array([[1, 2]], ml_dtypes.bfloat16),
        np.array([[1, 2]], ml_dtypes.float8_e5m2),
        np.array([[1, 2]], ml_dtypes.int4),
        np.array([[1, 2]], np.longdouble),
        np.array([[1, 2.0]], object),
        np.ma.masked_array([[1.0, 2.0]], mask=[[False, False]]),
        ((1, 2.0),),
    ],
)
def test_whatever_holds_numbers_is_taken(values):
    found = numbers(values, "features")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[1, 2]])
    np.testing.assert_array_equal(label_array(np.ravel(numbers(values, "labels"))), [1, 2])


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (sparse.csr_array(np.eye(2)), ShapeError, "sparse one: pass its .toarray()"),
        (torch.eye(2).to_sparse(), ShapeError, "array of numbers"),
        (torch.ones(2, 2, device="meta"), ShapeError, "array of numbers"),
        (torch.ones(2, 2, dtype=torch.complex64), ShapeError, "Complex data not supported"),
        (np.ma.masked_array(np.eye(2), mask=np.eye(2, dtype=np.bool_)), ShapeError, "masked values"),
        (np.array([[{}]]), DTypeError, "argument must be .* string.* number"),
        (np.array([["a"]], object), ShapeError, "got texts"),
        (np.ones((3, 0)), ShapeError, r"0 feature\(s\) \(shape=\(3, 0\)\)"),
    ],
)
def test_what_holds_no_dense_real_numbers_is_refused(values, error, words):
    with pytest.raises(error, match=words):
        numbers(values, "features")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array(["b", "a"], object), ["b", "a"]),
        (np.array([b"b", b"a"]), ["b", "a"]),
        (["b", "a"], ["b", "a"]),
        (np.array([2, 1], np.uint64), [2, 1]),
        (torch.tensor([2, 1], dtype=torch.uint8), [2, 1]),
        (torch.tensor([2, 1], dtype=torch.bfloat16), [2, 1]),
        ([torch.tensor(2), torch.tensor(1)], [2, 1]),
        (np.array([True, False]), [True, False]),
    ],
)
def test_labels_are_texts_numbers_or_bools(labels, expected):
    assert label_array(labels, 2).tolist() == expected


def test_a_usual_logit_scale_passes_and_a_logarithm_is_warned_of():
    assert check_logit_scale(None) == 100
    assert check_logit_scale(14.28) == 14.28
    with pytest.warns(LogitScaleWarning, match="did you mean exp of it, 99.98"):
        assert check_logit_scale(4.605) == 4.605
    with pytest.warns(LogitScaleWarning, match="did you mean 1 / 0.01"):
        check_logit_scale(0.01)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive logit_scale"):
            check_logit_scale(bad)


def test_ranks_are_checked():
    assert unit_views(np.ones((2, 3)), "features").shape == (2, 1, 3)
    assert unit_views(np.ones((2, 4, 3)), "features").shape == (2, 4, 3)
    with pytest.raises(ShapeError, match=r"\(n, V, d\)"):
        unit_views(np.ones(3), "features")
    with pytest.raises(ShapeError, match=r"\(rows, d\)"):
        unit_rows(np.ones(3), "rows")


def test_the_asked_for_dtype_is_given():
    assert unit_rows(np.ones((2, 3), np.float16), "rows").dtype == np.float64
    assert unit_rows(np.ones((2, 3), np.int32), "rows", np.float32).dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        ([0, 1], ShapeError, r"\(3,\)"),
        ([0.0, 1.0, 1.0], DataError, "integer"),
        ([0, 1, 2], DataError, r"0\.\.1"),
        ([0, -1, 1], DataError, r"-1\.\.1"),
    ],
)
def test_labels_are_checked(labels, error, words):
    with pytest.raises(error, match=words):
        check_labels(labels, 3, 2)


def test_labels_and_widths_that_fit_pass():
    assert check_labels(np.array([1, 0, 1], np.uint8), 3, 2).dtype == np.int64
    check_width(4, 4)
    with pytest.raises(ShapeError, match="5 and 4"):
        check_width(5, 4)
