"""The demo's real data: a fixed split, written whole or not at all."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from fastfsl.demo import digits
from fastfsl.errors import ConfigError, DataError

# Written down once: the test split may never move, or figures of different releases stop being comparable.
TEST_SPLIT_SHA256 = "509215cdf1b5aaf5c43181fac73935a7a91b954963c067edcde1b88cf5ab660b"
TEST_IMAGES_SHA256 = "5e509e5f896c605d66845ab2e5ceefc27622b311c21a617311df80b9699bf8ce"


def names(root, split):
    return sorted(path.relative_to(root / split).as_posix() for path in (root / split).rglob("*.png"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return digits.write_digits(tmp_path_factory.mktemp("digits") / "data")


def test_the_split_is_fixed_stratified_and_disjoint():
    _, labels = digits.load_scans()
    train, test = digits.split_indices(labels)
    assert set(train).isdisjoint(test)
    assert sorted(train + test) == list(range(1797))
    assert [sum(labels[i] == c for i in test) for c in range(10)] == [100] * 10
    assert min(sum(labels[i] == c for i in train) for c in range(10)) >= 16
    assert hashlib.sha256(repr(test).encode()).hexdigest() == TEST_SPLIT_SHA256


def test_files_carry_the_class_and_the_index(written):
    _, labels = digits.load_scans()
    train, test = digits.split_indices(labels)
    for split, indices in (("train", train), ("test", test)):
        assert names(written, split) == sorted(f"{digits.CLASS_NAMES[labels[i]]}/{i:04d}.png" for i in indices)


def test_images_are_grey_and_reproducible(written):
    counts, labels = digits.load_scans()
    digest = hashlib.sha256()
    for name in names(written, "test"):
        with Image.open(written / "test" / name) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
            digest.update(image.tobytes())
    assert digest.hexdigest() == TEST_IMAGES_SHA256
    index = digits.split_indices(labels)[1][0]
    with Image.open(written / "test" / digits.CLASS_NAMES[labels[index]] / f"{index:04d}.png") as image:
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(small.ravel(), counts[index].ravel())[0, 1] > 0.95  # ink is light, upright and in place


def test_shots_and_seed_choose_train_images_and_leave_the_test_split(written, tmp_path):
    few = digits.write_digits(tmp_path / "a", num_shots=2, seed=0)
    other = digits.write_digits(tmp_path / "b", num_shots=2, seed=1)
    again = digits.write_digits(tmp_path / "c", num_shots=2, seed=0)
    assert len(names(few, "train")) == 20
    assert {name.split("/")[0] for name in names(few, "train")} == set(digits.CLASS_NAMES)
    assert names(few, "train") == names(again, "train") != names(other, "train")
    assert set(names(few, "train")) <= set(names(written, "train"))
    assert names(few, "test") == names(other, "test") == names(written, "test")


def test_writing_again_keeps_the_files(written):
    image = next((written / "train" / "zero").iterdir())
    before = image.stat().st_mtime_ns
    assert digits.write_digits(written) == written
    assert image.stat().st_mtime_ns == before


def test_an_empty_target_is_filled(tmp_path):
    digits.write_digits(tmp_path, num_shots=1)
    assert len(names(tmp_path, "train")) == 10


def test_other_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not this set of digits"):
        digits.write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unwritable_target_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        digits.write_digits(tmp_path / "file" / "digits")


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(ConfigError, match="no space left"):
        digits.write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_shots", [0, -1, 1000])
def test_impossible_shots_are_refused(tmp_path, num_shots):
    with pytest.raises(DataError, match="num_shots"):
        digits.write_digits(tmp_path / "digits", num_shots=num_shots)


def test_a_short_class_is_refused():
    with pytest.raises(DataError, match="class 1"):
        digits.split_indices([0] * 200 + [1] * 115)


def test_augmentation_never_mirrors():
    assert digits.AUGMENTATION["horizontal_flip"] is False
    assert all(template.count("{}") == 1 for template in digits.TEMPLATES)
    assert len(set(digits.CLASS_NAMES)) == 10
