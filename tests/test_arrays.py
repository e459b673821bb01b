import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastfsl.arrays import check_labels, check_width, numbers, unit, unit_rows, unit_views
from fastfsl.errors import DataError, ShapeError

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
        ([[1.0], [np.nan]], DataError, "NaN or infinity .first in row 1"),
        ([[1e200]], DataError, "larger than float32"),
    ],
)
def test_what_is_no_finite_number_is_named(values, error, words):
    with pytest.raises(error, match=words):
        numbers(values, "features", np.float32)


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
