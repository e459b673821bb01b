import sys

import numpy as np
import pytest
from PIL import Image

from fastfsl.errors import ConfigError
from fastfsl.report.accuracy_plot import AccuracyLine, write_accuracy_plot

SHOTS = (1, 4, "all")


def lines(number):
    return [AccuracyLine(f"method {i}", (0.1 * i, 0.5, 0.9), (0.02, 0.01, None)) for i in range(number)]


def test_a_picture_of_every_method(tmp_path):
    write_accuracy_plot(tmp_path / "a.png", SHOTS, lines(14), "flowers")
    write_accuracy_plot(tmp_path / "b.png", SHOTS, lines(1), "flowers")
    with Image.open(tmp_path / "a.png") as many, Image.open(tmp_path / "b.png") as one:
        assert many.size == one.size
        assert not np.array_equal(np.asarray(many), np.asarray(one))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_cell_that_failed_leaves_a_gap(tmp_path):
    line = AccuracyLine("failed", (0.1, None, 0.9), (None, None, None))
    write_accuracy_plot(tmp_path / "a.png", SHOTS, [line, AccuracyLine("none", (None,) * 3, (None,) * 3)], "title")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_any_title_will_do(tmp_path):
    write_accuracy_plot(tmp_path / "a.png", SHOTS, lines(1), "\u82b1 $\\nothing$ {")
    assert (tmp_path / "a.png").exists()


def test_drawing_needs_no_global_state(tmp_path):
    write_accuracy_plot(tmp_path / "a.png", SHOTS, lines(2), "title")
    assert "matplotlib.pyplot" not in sys.modules


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="choose another"):
        write_accuracy_plot(tmp_path / "file" / "a.png", SHOTS, lines(1), "title")
