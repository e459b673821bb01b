import numpy as np
import pytest
from PIL import Image

from fastfsl.data import FeatureDataset, read_folder
from fastfsl.data.scoring import (
    calibration_error,
    digest_of,
    features_to_score,
    images_to_score,
    negative_log_likelihood,
    score,
)
from fastfsl.errors import DataError, ShapeError

NAMES = ("ant", "bee", "cow")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in NAMES[:2]:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_score_by_sample_by_class_and_over_classes():
    labels = np.array([0, 0, 0, 2])
    predicted = np.array([0, 0, 1, 2])
    evaluation = score(predicted, labels, NAMES, num_unreadable=1)
    assert evaluation.calibration_error is None
    sure = score(predicted, labels, NAMES, probabilities=np.eye(3)[predicted])
    assert sure.calibration_error == 0.25
    assert (sure.threshold, sure.coverage, sure.precision) == (None, None, None)
    assert evaluation.accuracy == 0.75
    assert evaluation.class_accuracy == {"ant": pytest.approx(2 / 3), "cow": 1.0}
    assert evaluation.macro_accuracy == pytest.approx(5 / 6)
    assert (evaluation.num_samples, evaluation.num_unreadable) == (4, 1)


def test_score_of_a_classifier_that_does_not_always_answer():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])
    predicted, labels = probabilities.argmax(axis=1), np.array([0, 1, 0, 1])
    for threshold, coverage, precision in ((0.6, 0.75, 1 / 3), (0.9, 0.25, 1.0), (0.95, 0.0, None)):
        evaluation = score(predicted, labels, NAMES, probabilities=probabilities, threshold=threshold)
        assert (evaluation.threshold, evaluation.coverage, evaluation.precision) == (threshold, coverage, precision)
        assert evaluation.accuracy == 0.5


def test_labels_are_those_of_the_classifier_not_of_the_data(folder):
    classes = ("cow", "bee", "ant")
    images = images_to_score(read_folder(folder), "test", classes, set(), print)
    assert {(sample.path.parent.name, sample.label) for sample in images.samples} == {("ant", 2), ("bee", 1)}


def test_a_class_the_classifier_does_not_know_is_refused(folder):
    with pytest.raises(DataError, match="'bee'"):
        images_to_score(read_folder(folder), "test", ("ant", "cow"), set(), print)


def test_a_flat_folder_leaves_out_what_was_trained_on(folder):
    flat = read_folder(folder / "train")
    seen = {digest_of(folder / "train" / "ant" / "0.png")}
    images = images_to_score(flat, "test", NAMES, seen, print)
    assert (len(images.samples), images.num_excluded) == (5, 1)
    everything = {digest_of(sample.path) for sample in flat.split("train")}
    with pytest.raises(DataError, match="every image"):
        images_to_score(flat, "test", NAMES, everything, print)


def test_a_test_image_that_was_trained_on_is_warned_of(folder):
    heard: list[str] = []
    seen = {digest_of(folder / "test" / "ant" / "0.png")}
    images = images_to_score(read_folder(folder), "test", NAMES, seen, heard.append)
    assert len(images.samples) == 6
    assert len(heard) == 1
    assert "1 of the 6" in heard[0]


def test_a_damaged_image_is_named_and_counted(folder):
    (folder / "test" / "ant" / "0.png").write_bytes(b"no image")
    heard: list[str] = []
    images = images_to_score(read_folder(folder), "test", NAMES, set(), heard.append)
    assert (len(images.samples), images.num_unreadable) == (5, 1)
    assert "0.png" in heard[0]


def test_features_are_checked_against_the_classifier():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 6)).astype(np.float32)
    labels = np.array([0, 1, 0, 1])
    embeddings = rng.normal(size=(2, 6)).astype(np.float32)
    dataset = FeatureDataset(NAMES[:2], {"train": (features, labels), "test": (features, labels)}, embeddings)
    got, mapped = features_to_score(dataset, "test", ("cow", "bee", "ant"), 6)
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(mapped, [2, 1, 2, 1])
    views = np.stack([features, 3 * features], axis=1) * np.float32(1e-30)
    seen = FeatureDataset(NAMES[:2], {"train": (views, labels)}, embeddings)
    got, _ = features_to_score(seen, "train", NAMES, 6)
    np.testing.assert_allclose(got, features / np.linalg.norm(features, axis=1, keepdims=True), rtol=1e-5)
    with pytest.raises(ShapeError, match="width 8"):
        features_to_score(dataset, "test", NAMES, 8)
    with pytest.raises(DataError, match="'bee'"):
        features_to_score(dataset, "test", ("ant",), 6)


def test_calibration_error_by_hand():
    # Bins of 15: 0.9 and 0.92 share (13/15, 14/15], 0.55 is alone. Right, wrong, right.
    probabilities = np.array([[0.9, 0.1, 0.0], [0.08, 0.92, 0.0], [0.25, 0.2, 0.55]])
    labels = np.array([0, 0, 2])
    expected = (abs(1 - 0.9 - 0.92) + abs(1 - 0.55)) / 3
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0])) == 1


def test_bins_are_open_below_and_closed_above():
    probabilities = np.array([[0.5, 0.5], [0.5 + 1e-9, 0.5 - 1e-9]])
    # Two bins (0, 0.5], (0.5, 1]: the first is right at 0.5, the second wrong at 0.5.
    assert calibration_error(probabilities, np.array([0, 1]), num_bins=2) == pytest.approx(0.5)
    assert calibration_error(probabilities, np.array([0, 1]), num_bins=1) == pytest.approx(0, abs=1e-8)


def test_likelihood_is_finite_even_where_a_probability_vanished():
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    assert negative_log_likelihood(probabilities[:1], np.array([0])) == pytest.approx(np.log(4))
    assert 80 < negative_log_likelihood(probabilities[1:], np.array([1])) < 90
