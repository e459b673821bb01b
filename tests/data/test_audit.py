import numpy as np
import pytest

from fastfsl.data import audit as module
from fastfsl.data.audit import audit, exact_duplicates, near_duplicates

NAMES = ("ant", "bee", "cow")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(count, 64)).astype(np.float32) for count in (30, 21))
    return train, np.arange(30) % 3, test, np.arange(21) % 3


def test_clean_data_raise_no_warning(data):
    assert audit(NAMES, *data).warnings() == []


def test_imbalance_and_untested_classes_are_told(data):
    train, _, test, _ = data
    labels = np.array([0] * 27 + [1, 1, 2])
    found = audit(NAMES, train, labels, test, np.zeros(21, dtype=np.int64))
    assert found.class_counts == (27, 2, 1)
    imbalance, untested = found.warnings()
    assert "1 to 27" in imbalance
    assert "2 of 3 classes" in untested
    assert "'bee', 'cow'" in untested


def test_exact_copies_within_the_pool_are_counted_with_their_labels(data):
    train, labels, *_ = data
    train[4] = train[10] = train[1]  # the same class; three alike are two copies
    train[8] = train[3]  # another class
    found = exact_duplicates(train, labels)
    assert (found.num_samples, found.num_other_label) == (3, 1)
    assert found.first == ((1, 4), (3, 8), (1, 10))


@pytest.mark.parametrize("max_entries", [2**24, 40, 7], ids=["one block", "rows", "rows and columns"])
def test_planted_near_duplicates_are_found_in_any_blocks(data, monkeypatch, max_entries):
    monkeypatch.setattr(module, "_MAX_ENTRIES", max_entries)
    train, train_labels, test, test_labels = data
    rng = np.random.default_rng(1)
    test[5] = 3.0 * train[20] + 0.01 * rng.normal(size=64)  # longer and a little off: labels 2 and 2
    test[19] = train[3]  # labels 1 and 0
    train[29] = train[3]
    test[7] = train[8] + 0.2 * rng.normal(size=64)  # too far off
    found = near_duplicates(train, train_labels, test, test_labels)
    assert (found.num_samples, found.num_other_label) == (2, 1)
    assert found.first == ((20, 5), (3, 19))
    (warning,) = audit(NAMES, train[:29], train_labels[:29], test, test_labels).warnings()
    assert "2 test samples" in warning
    assert "train 20 = test 5" in warning
    assert "1 under another label" in warning


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_length_are_compared_by_direction(data, scale):
    train, labels, test, test_labels = data
    test[2] = train[6]
    scaled = train * np.float32(scale), labels, test * np.float32(scale), test_labels
    assert near_duplicates(*scaled).first == ((6, 2),)


def test_views_count_by_their_mean_direction(data):
    train, labels, test, test_labels = data
    views = np.stack([train * 5, train], axis=1)
    test[2] = train[6]
    assert near_duplicates(views, labels, test, test_labels).first == ((6, 2),)
