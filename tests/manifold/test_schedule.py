import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.errors import ConfigError
from fastfsl.manifold import temperature_at


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.07), (0.1, 0.05)])
def test_cosine_from_start_to_end(start, end):
    assert temperature_at(0, start, end) == start
    assert temperature_at(1, start, end) == end
    assert temperature_at(0.5, start, end) == pytest.approx((start + end) / 2, rel=1e-15)
    # cos 60 degrees = 1/2: three quarters of the way are left after a third of the time.
    assert temperature_at(1 / 3, start, end) == pytest.approx(0.75 * start + 0.25 * end, rel=1e-15)


@given(st.floats(0, 1), st.floats(0, 1))
def test_it_only_falls(one, other):
    first, second = sorted((one, other))
    assert 0.5 >= temperature_at(first, 0.5, 0.07) >= temperature_at(second, 0.5, 0.07) >= 0.07


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_is_a_fraction(progress):
    with pytest.raises(ConfigError, match="progress"):
        temperature_at(progress, 0.5, 0.07)


@pytest.mark.parametrize(("start", "end"), [(0, 0.1), (0.1, -1), (math.nan, 0.1)])
def test_temperatures_are_positive(start, end):
    with pytest.raises(ConfigError, match="temperatures > 0"):
        temperature_at(0.5, start, end)
