"""Folders as people have them: other names of splits, the wrong level, what systems leave behind, links."""

import inspect
import os
import sys

import pytest

from fastfsl.data import load_dataset, read_folder
from fastfsl.data.skipped import Skipped, file_account
from fastfsl.data.split_names import split_of
from fastfsl.data.walk import walk
from fastfsl.errors import DataError


def _items(dataset, split="train"):
    return [(dataset.item(sample), dataset.class_names[sample.label]) for sample in dataset.split(split)]


def _every_file(root):
    return sum(len(files) for _, _, files in os.walk(root))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("training", "validation", None),
        ("TRAINING", "Valid", "TESTING"),
        ("train_set", "dev-set", "test set"),
        ("tr", "val", "te"),
        ("trainset", "devel", "eval"),
        ("train2017", "val2017", "test2017"),
        ("training_images", "validation_images", "Evaluation"),
        ("01_train", "02_val", "03_test"),
        ("train", "eval", "test"),
    ],
)
def test_splits_by_any_usual_name(make_images, train, val, test):
    named = {"train": train, "val": val, "test": test}
    root = make_images(*(f"{name}/{kind}/1.png" for name in named.values() if name for kind in ("ant", "bee")))
    dataset = read_folder(root)
    assert dataset.class_names == ("ant", "bee")
    assert list(dataset.splits) == [split for split, name in named.items() if name]
    for split, name in named.items():
        if name:
            assert _items(dataset, split)[0] == (f"{name}/ant/1.png", "ant")


@pytest.mark.parametrize("name", ["bus", "car", "tree", "trainer", "latest", "evaluator", "2017", "images", "terrier"])
def test_names_of_classes_are_no_splits(name):
    assert split_of(name) is None


@pytest.mark.parametrize("folder", ["images", "Images", "data", "JPEGImages"])
def test_splits_below_a_folder_of_images(make_images, folder):
    root = make_images(f"{folder}/train/ant/1.png", f"{folder}/train/bee/1.png", f"{folder}/test/ant/1.png")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "1.txt").touch()
    (root / "README.md").touch()
    dataset = read_folder(root)
    assert list(dataset.splits) == ["train", "test"]
    assert dataset.class_names == ("ant", "bee")
    assert dataset.skipped.counts == {"beside the class folders": 2}


def test_classes_below_a_folder_of_images_in_each_split(make_images):
    dataset = read_folder(make_images("train/images/ant/1.png", "train/images/bee/1.png", "test/images/bee/1.png"))
    assert dataset.class_names == ("ant", "bee")
    assert list(dataset.splits) == ["train", "test"]


def test_splits_below_each_class(make_images):
    root = make_images(*(f"{kind}/{split}/1.png" for kind in ("ant", "bee") for split in ("Train", "test")))
    dataset = read_folder(root)
    assert dataset.class_names == ("ant", "bee")
    assert _items(dataset) == [("ant/Train/1.png", "ant"), ("bee/Train/1.png", "bee")]
    assert _items(dataset, "test") == [("ant/test/1.png", "ant"), ("bee/test/1.png", "bee")]
    make_images("cow/1.png")
    with pytest.raises(
        DataError, match="'ant' has 'test', 'Train' in it, as a class with splits of its own, and 'cow'"
    ):
        read_folder(root)


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Valid", "Test"), ("training", "validation")])
def test_classes_that_are_called_as_splits_are_refused(make_images, names):
    with pytest.raises(DataError, match=r"these are names of splits; put class folders into them, such as .*CLASS"):
        read_folder(make_images(*(f"{name}/1.png" for name in names)))


def test_two_names_of_one_split_are_refused(make_images):
    root = make_images("val/a/1.png", "valid/a/1.png", "train/a/1.png", "train/b/1.png")
    with pytest.raises(DataError, match="'val', 'valid' all mean the val split"):
        read_folder(root)


@pytest.mark.parametrize(
    "files",
    [
        ("ds/train/ant/1.png", "ds/train/bee/1.png", "ds/test/ant/1.png"),
        ("ds/Training/ant/1.png", "ds/Training/bee/1.png"),
        ("ds/ant/1.png", "ds/bee/1.png"),
    ],
)
@pytest.mark.parametrize("above", ["", "zip/", "a/b/"])
def test_the_folder_above_is_answered_with_the_one_that_is_meant(make_images, files, above):
    root = make_images(*(above + file for file in files))
    (root / "notes.txt").touch()
    (root / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_folder(root)
    assert str(caught.value).endswith(f"give {root / above / 'ds'}")


def test_a_folder_of_several_data_sets_names_them(make_images):
    root = make_images(*(f"{ds}/{split}/{k}/1.png" for ds in ("x", "y") for split in ("train", "test") for k in "ab"))
    with pytest.raises(DataError, match=r"holds data sets, not classes: give .*x or .*y"):
        read_folder(root)


@pytest.mark.parametrize(("given", "meant"), [("flat/ant", "flat"), ("ds/train/ant", "ds"), ("ds/test/bee", "ds")])
def test_one_level_too_deep_is_answered_with_the_folder_that_is_meant(make_images, monkeypatch, given, meant):
    root = make_images(
        "flat/ant/1.png",
        "flat/bee/1.png",
        *(f"ds/{split}/{k}/1.png" for split in ("train", "test") for k in ("ant", "bee")),
    )
    for folder in (root / given, "."):
        monkeypatch.chdir(root / given)
        with pytest.raises(DataError, match="it looks like one class of") as caught:
            read_folder(folder)
        assert f"one class of {root / meant}: give that folder" in str(caught.value)


LITTER = (
    "@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg", "$RECYCLE.BIN/x.png", "lost+found/x.png", "__MACOSX/cat/._1.png",
    "System Volume Information/x.png", ".ipynb_checkpoints/1.png", "#recycle/x.png", "@Recycle/x.jpg",
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "cat/._1.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini",
    "cat/.ipynb_checkpoints/1-checkpoint.png", ".Trashes/1.png",
)  # fmt: skip


def test_what_systems_leave_behind_is_neither_class_nor_image(make_images):
    root = make_images("cat/1.png", "dog/1.png", *LITTER)
    dataset = read_folder(root)
    assert dataset.class_names == ("cat", "dog")
    assert _items(dataset) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert dataset.skipped.counts == {"hidden or of the system": len(LITTER)}
    assert not dataset.skipped.unexpected
    seen = Skipped()
    assert [path.name for path in walk(root, seen)] == ["1.png", "1.png"]
    assert len(seen) + 2 == _every_file(root)


def test_every_file_is_an_image_or_counted_with_its_reason(make_images, monkeypatch):
    monkeypatch.setattr("fastfsl.data.walk.heif_installed", lambda: False)
    root = make_images("cat/IMG_1.JPG", "cat/IMG_2.JPEG", "dog/1.PNG", "dog/two.words.jpg", "stray.jpg")
    for name in (
        "cat/IMG_1.xmp", "cat/IMG_1.AAE", "cat/IMG_1.JPG.json", "cat/IMG_2.MOV", "cat/IMG_2.JPEG(1).json", "cat/x.aae",
        "cat/IMG_2.JPEG.supplemental-metadata.json",
        "dog/3.HEIC", "dog/4.heic", "dog/5.NEF", "dog/notes.txt", "dog/noending", "dog/film.mp4", "README.md",
    ):  # fmt: skip
        (root / name).touch()
    (root / "dog" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    dataset = read_folder(root)
    assert [item for item, _ in _items(dataset)] == [
        "cat/IMG_1.JPG",
        "cat/IMG_2.JPEG",
        "dog/1.PNG",
        "dog/two.words.jpg",
    ]
    assert dataset.skipped.counts == {
        "beside an image (.xmp)": 1,
        "beside an image (.aae)": 2,
        "beside an image (.json)": 3,
        "beside an image (.mov)": 1,
        "image of a format that is not read (.heic)": 2,
        "image of a format that is not read (.nef)": 1,
        "no image (.txt)": 1,
        "no image (no ending)": 1,
        "no image (.mp4)": 1,
        "link that leads nowhere (.jpg)": 1,
        "image outside the class folders (.jpg)": 1,
        "beside the class folders": 1,
    }
    account = file_account(4, dataset.skipped)
    assert account["seen"] == account["used"] + account["skipped"] == _every_file(root)
    warning = str(dataset.skipped.warning(account["seen"]))
    assert "skipped 8 of 20 files: 2 image of a format that is not read (.heic)" in warning
    assert "pip install 'fastfsl[heic]'" in warning
    with pytest.raises(DataError, match="--strict: 8 files would be skipped"):
        dataset.skipped.check(strict=True)


def test_heic_is_an_image_where_it_can_be_read(make_images, monkeypatch):
    monkeypatch.setattr("fastfsl.data.walk.heif_installed", lambda: True)
    dataset = read_folder(make_images("cat/1.HEIC", "cat/2.heif", "dog/1.hif"))
    assert len(dataset.split("train")) == 3


def test_a_class_of_files_that_cannot_be_read_says_which(make_images, monkeypatch):
    monkeypatch.setattr("fastfsl.data.walk.heif_installed", lambda: False)
    root = make_images("cat/1.jpg", *(f"dog/{number}.heic" for number in range(30)))
    with pytest.raises(
        DataError, match=r"no image file in the train folder of 'dog' \(there are 30 .*\.heic.*fastfsl\[heic\]"
    ):
        read_folder(root)


def test_names_written_in_other_bytes_are_one_class(make_images):
    dataset = read_folder(make_images("train/café/1.png", "train/tea/1.png", "test/cafe\u0301/1.png"))
    assert dataset.class_names == ("café", "tea")
    assert dataset.labels("test").tolist() == [0]


def test_training_and_prediction_follow_the_same_links(make_images, tmp_path):
    from fastfsl.cli.image_inputs import find_images

    root = make_images("cat/1.png", "dog/1.png", root=tmp_path / "ds")
    outside = make_images("2.png", "deep/3.png", root=tmp_path / "pool")
    (root / "cow").symlink_to(outside, target_is_directory=True)
    (root / "dog" / "more").symlink_to(outside / "deep", target_is_directory=True)
    (root / "cat" / "copy.png").symlink_to(outside / "2.png")
    (root / "cat" / "up").symlink_to(root, target_is_directory=True)
    (outside / "deep" / "loop").symlink_to(outside, target_is_directory=True)
    (root / "cat" / "itself").symlink_to(root / "cat" / "itself")
    trained = [item for item, _ in _items(read_folder(root))]
    assert trained == [
        "cat/1.png", "cat/copy.png", "cow/2.png", "cow/deep/3.png", "dog/1.png", "dog/more/3.png", "dog/more/loop/2.png"
    ]  # fmt: skip
    found = [path.relative_to(root).as_posix() for path in find_images([root])]
    # One walk over all: what was read below cow is not read again below dog.
    assert found == ["cat/1.png", "cat/copy.png", "cow/2.png", "cow/deep/3.png", "dog/1.png"]


def test_a_walk_does_not_recurse(tmp_path):
    folder = tmp_path.joinpath(*["d"] * 300)
    folder.mkdir(parents=True)
    (folder / "1.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        found = [path.name for path in walk(tmp_path, Skipped())]
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["1.png"]


@pytest.mark.parametrize("address", ["https://example.org/ds", "s3://bucket/ds", "gs://bucket/ds.csv"])
def test_an_address_as_data_gets_a_clear_answer(address):
    with pytest.raises(DataError, match="nothing is fetched from the network: download it first"):
        load_dataset(address)
