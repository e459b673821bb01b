import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.data import read_folder
from fastfsl.data.natural_order import natural_key
from fastfsl.errors import DataError


def _items(dataset, split):
    return [(dataset.item(sample), sample.label) for sample in dataset.split(split)]


def test_a_flat_folder_is_the_train_split_in_natural_order(make_images):
    root = make_images("class 10/b.png", "class 2/a10.png", "class 2/a9.png", "class 10/A.PNG")
    dataset = read_folder(root)
    assert dataset.class_names == ("class 2", "class 10")
    assert list(dataset.splits) == ["train"]
    assert _items(dataset, "train") == [
        ("class 2/a9.png", 0),
        ("class 2/a10.png", 0),
        ("class 10/A.PNG", 1),
        ("class 10/b.png", 1),
    ]
    assert dataset.kind == "folder"
    assert dataset.labels("train").tolist() == [0, 0, 1, 1]


def test_split_folders_share_train_s_labels(make_images):
    root = make_images("train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "val/cat/2.png", "test/bee/3.png")
    dataset = read_folder(root)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert _items(dataset, "val") == [("val/cat/2.png", 2)]
    assert _items(dataset, "test") == [("test/bee/3.png", 1)]


def test_a_folder_with_only_a_test_split_can_be_evaluated_on(make_images):
    dataset = read_folder(make_images("test/ant/1.png", "test/bee/1.png"))
    assert list(dataset.splits) == ["test"]
    with pytest.raises(DataError, match=r"no 'train' split, only 'test'"):
        dataset.split("train")


def test_a_class_may_be_called_train(make_images):
    """Among {bus, car, train} "train" holds images, not class folders."""
    dataset = read_folder(make_images("train/1.png", "bus/1.png", "car/1.png"))
    assert dataset.class_names == ("bus", "car", "train")
    assert list(dataset.splits) == ["train"]


def test_extensions_match_in_any_case_and_the_rest_is_counted(make_images):
    root = make_images(
        "a/1.JPeG", "a/2.png", "a/sub/deeper/3.WebP", "b/1.bmp", ".hidden/1.png", "a/.2.png", "__MACOSX/x.png"
    )
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "b" / "Thumbs.db").write_bytes(b"")
    (root / "README.md").write_text("beside the classes")
    dataset = read_folder(root)
    assert dataset.class_names == ("a", "b")
    assert [item for item, _ in _items(dataset, "train")] == ["a/1.JPeG", "a/2.png", "a/sub/deeper/3.WebP", "b/1.bmp"]
    assert dataset.skipped.counts == {
        "hidden or of the system": 4,
        "no image (.txt)": 1,
        "beside the class folders": 1,
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no folder"),
        (["lonely/1.png"], r"one class only \('lonely'\)"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], r"'c' in test/ but not in train/"),
        (["train/a/1.png", "train/b/1.png", "val/B/1.png"], r"'B' in val/ but not in train/.*spelt alike"),
        (["train/a/1.png", "train/b/1.png", "more/a/1.png"], r"beside them, 'more'"),
        (["a/1.png", "b/c/2.txt"], r"no image file in the train folder of 'b'"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.txt"], r"no image file in the test folder of 'a'"),
    ],
)
def test_unusable_layouts(make_images, files, message):
    root = make_images(*files)
    with pytest.raises(DataError, match=message):
        read_folder(root)


def test_a_class_folder_whose_name_is_no_text_is_refused(make_images):
    root = make_images("ok/1.png", f"{os.fsdecode(bytes([99, 97, 102, 233]))}/1.png")
    with pytest.raises(DataError, match=r"'caf\\udce9' is not UTF-8"):
        read_folder(root)


def test_missing_folder_and_file_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DataError, match="is not a folder: expected one folder per class"):
            read_folder(path)


def test_an_empty_split_folder_is_named(make_images):
    root = make_images("train/a/1.png", "train/b/1.png")
    (root / "test").mkdir()
    with pytest.raises(DataError, match=r"test holds no class folder"):
        read_folder(root)


def test_a_class_folder_empty_in_test_only_is_fine(make_images):
    root = make_images("train/a/1.png", "train/b/1.png", "test/a/1.png")
    (root / "test" / "b").mkdir()
    assert len(read_folder(root).split("test")) == 1


def test_links_are_followed_and_loops_end(make_images, tmp_path):
    root = make_images("a/1.png", "b/1.png", root=tmp_path / "data")
    outside = make_images("c/1.png", "c/2.png", root=tmp_path / "elsewhere")
    (root / "c").symlink_to(outside / "c", target_is_directory=True)
    (root / "a" / "back").symlink_to(root, target_is_directory=True)
    (root / "a" / "itself").symlink_to(root / "a" / "itself")
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    # Links from each of twenty folders to all: followed along every path they would never end.
    for number in range(20):
        (root / "b" / f"n{number}").mkdir()
        for other in range(20):
            (root / "b" / f"n{number}" / f"to{other}").symlink_to(root / "b" / f"n{other}", target_is_directory=True)
    start = time.perf_counter()
    dataset = read_folder(root)
    assert time.perf_counter() - start < 5
    items = [item for item, _ in _items(dataset, "train")]
    assert items[0] == "a/1.png"
    assert "b/1.png" in items
    assert items[-2:] == ["c/1.png", "c/2.png"]
    assert "b/gone.png" not in items
    assert len(items) == len(set(items))


def test_a_folder_without_permission_is_named(make_images, monkeypatch):
    root = make_images("a/1.png", "b/1.png")
    scandir = os.scandir

    def forbidden(path):
        if path == root / "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # the tests may run as root, who reads every folder
    with pytest.raises(DataError, match=r"b cannot be listed \(Permission denied\)"):
        read_folder(root)


@given(st.lists(st.text(max_size=12)))
def test_natural_order_is_a_total_order_that_ignores_how_it_was_listed(names):
    ordered = sorted(names, key=natural_key)
    assert sorted(names[1:] + names[:1], key=natural_key) == ordered


def test_natural_order_compares_numbers_as_numbers():
    assert sorted(["x10", "X2", "x1b", "x1"], key=natural_key) == ["x1", "x1b", "X2", "x10"]
