"""The gallery of mistakes: pictures with their files' names, the surest first, in a page that stays small."""

import base64
import re

import numpy as np
import pytest
from PIL import Image

from fastfsl.cli.mistakes import MAX_PICTURES, mistake_parts
from fastfsl.data.baselines import Predicted
from fastfsl.report import Gallery, Section, write_report


@pytest.fixture
def predicted(tmp_path):
    """60 noisy photographs of 600 x 400, of which 55 are taken for the other class."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(60):
        path = tmp_path / "data" / "test" / "ant" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (400, 600, 3), dtype=np.uint8)).save(path, quality=95)
        paths.append(path)
    sure = np.linspace(0.51, 0.99, 60)
    probabilities = np.stack([1 - sure, sure], axis=1)
    probabilities[:5] = probabilities[:5, ::-1]  # these are right
    return Predicted(("ant", "<b>bee"), probabilities, np.zeros(60, np.int64), tuple(paths))


def test_the_surest_mistakes_are_shown_with_their_names_and_the_page_stays_small(predicted, tmp_path):
    about, gallery = mistake_parts(predicted, tmp_path / "data")
    assert about == f"Shown: the {MAX_PICTURES} surest of 55 mistakes among 60 images, the surest first."
    assert isinstance(gallery, Gallery)
    assert [picture.name for picture in gallery.pictures[:2]] == ["test/ant/59.jpg", "test/ant/58.jpg"]
    assert gallery.pictures[0].caption == "ant, taken for <b>bee (99 %)"
    write_report(tmp_path / "page.html", "t", [Section("Mistakes", [about, gallery])])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page) < 2e6  # noise is the worst that JPEG can meet
    assert "<b>" not in page
    (tmp_path / "one.jpg").write_bytes(base64.b64decode(re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)[0]))
    with Image.open(tmp_path / "one.jpg") as picture:
        assert picture.size == (160, 107)


def test_a_file_that_has_gone_leaves_its_name(predicted, tmp_path):
    predicted.paths[59].unlink()
    _, gallery = mistake_parts(predicted, tmp_path / "data")
    assert isinstance(gallery, Gallery)
    assert gallery.pictures[0].name == "test/ant/59.jpg"
    assert gallery.pictures[0].jpeg == b""
    assert gallery.pictures[1].jpeg


def test_without_images_or_mistakes_there_is_no_gallery(predicted, tmp_path):
    none = Predicted(predicted.class_names, predicted.probabilities, predicted.labels)
    assert mistake_parts(none, tmp_path) == []
    right = Predicted(
        predicted.class_names, predicted.probabilities, predicted.probabilities.argmax(1), predicted.paths
    )
    assert mistake_parts(right, tmp_path) == ["Every image was taken for its own class."]
