import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastfsl.data import read_split_file
from fastfsl.errors import DataError

_GOOD = {
    "train": [["cat/1.png", 1, "cat"], ["ant/1.png", 0, "ant"]],
    "val": [],
    "test": [["cat/2.png", 1, "cat"]],
}


@pytest.fixture
def write_split(make_images, tmp_path):
    def write(content, *, images=("ant/1.png", "cat/1.png", "cat/2.png"), folder=""):
        make_images(*(f"{folder}/{image}" if folder else image for image in images))
        path = tmp_path / "split_zhou_Zoo.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_reads_names_labels_and_order(write_split):
    dataset = read_split_file(write_split(_GOOD))
    assert dataset.class_names == ("ant", "cat")
    assert [(dataset.item(s), s.label) for s in dataset.split("train")] == [("cat/1.png", 1), ("ant/1.png", 0)]
    assert list(dataset.splits) == ["train", "test"]  # the empty "val" is left out
    assert dataset.kind == "split-file"


@pytest.mark.parametrize("folder", ["images", "101_ObjectCategories"])
def test_finds_the_image_folder_beside_the_file(write_split, tmp_path, folder):
    dataset = read_split_file(write_split(_GOOD, folder=folder))
    assert dataset.root == tmp_path / folder


def test_an_image_root_elsewhere(write_split, make_images, tmp_path):
    path = write_split(_GOOD, images=())
    elsewhere = make_images("ant/1.png", "cat/1.png", "cat/2.png", root=tmp_path / "a" / "b")
    with pytest.raises(DataError, match=r"'cat/1.png', is neither below .*image root"):
        read_split_file(path)
    assert read_split_file(path, image_root=elsewhere).root == elsewhere
    with pytest.raises(DataError, match="is not a folder"):
        read_split_file(path, image_root=tmp_path / "nowhere")


def test_missing_images_are_counted_and_named(write_split):
    path = write_split(_GOOD, images=("cat/1.png", "ant/1.png"))
    with pytest.raises(DataError, match=r"1 of 3 listed images are missing, such as .*cat/2.png"):
        read_split_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON split file"),
        ("[1, 2", "not a JSON split file"),
        ("[" * 100_000, "not a JSON split file"),
        ("[]", "is not a split file"),
        ('{"pictures": []}', "is not a split file"),
        ('{"training": []}', '"train" is empty'),
        ('{"train": {}}', '"train" is dict, not a list'),
        ('{"train": []}', '"train" is empty'),
        ('{"test": []}', "lists no image"),
        ({"train": [["a.png", 0]]}, r"train\[0\] is .* expected \[relative path, label, class name\]"),
        ({"train": [["a.png", True, "a"]]}, r"train\[0\] is"),
        ({"train": [["a.png", 0.0, "a"]]}, r"train\[0\] is"),
        ({"train": [["a.png", -1, "a"]]}, "label -1: labels count from 0"),
        ({"train": [["a.png", 0, " "]]}, "empty class name"),
        ({"train": [["../a.png", 0, "a"]]}, r"path '\.\./a.png'"),
        ({"train": [["/etc/passwd", 0, "a"]]}, "path '/etc/passwd'"),
        ({"train": [["a\0.png", 0, "a"]]}, "path"),
        ({"train": [["", 0, "a"]]}, "path ''"),
        ('{"train": [["\\ud800.png", 0, "a"]]}', "path"),
        ({"train": [["a.png", 0, "a"], ["b.png", 0, "b"]]}, r"train\[1\] calls label 0 'b', elsewhere it is 'a'"),
        ({"train": [["a.png", 0, "a"], ["b.png", 2, "b"]]}, "label 1 is never used"),
        ({"train": [["a.png", 0, "a"], ["b.png", 1, "a"]]}, "labels 0 and 1 are both called 'a'"),
        ({"train": [["a.png", 0, "a"]]}, r"one class only \('a'\)"),
        ({"train": [["a.png", 0, "a"]], "test": [["b.png", 1, "b"]]}, r'1 classes have no image in "train"'),
        ({"train": [["x" * 300, 0, "a"], ["b.png", 1, "b"]]}, "image root"),
    ],
)
def test_unusable_files(write_split, content, message):
    with pytest.raises(DataError, match=message):
        read_split_file(write_split(content))


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_split_file(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'{"train": [["caf\xe9", 0, "a"]]}')
    with pytest.raises(DataError, match="not a JSON split file"):
        read_split_file(tmp_path / "latin.json")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=10,
)
_items = st.lists(st.tuples(st.text(max_size=6), st.integers(-1, 3), st.text(max_size=3)) | _json, max_size=5)
_contents = _json | st.dictionaries(st.sampled_from(["train", "val", "test", "x"]), _items | _json, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(_contents)
def test_whatever_json_it_is_a_data_set_or_a_data_error(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):  # no image exists here, so nothing can be read
        read_split_file(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12),
    st.lists(st.text("abc äß", min_size=1, max_size=5).filter(str.strip), min_size=4, max_size=4, unique=True),
)
def test_round_trip(tmp_path, rows, names):
    labels = sorted({label for _, label in rows} | {0, 1})
    rows = [*rows, (0, labels[0]), (1, labels[1])]
    items = [[f"{number}.png", labels.index(label), names[label]] for number, label in rows]
    for relative, _, _ in items:
        (tmp_path / relative).touch()
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": items, "val": [], "test": items[:1]}))
    dataset = read_split_file(path)
    again = [[dataset.item(s), s.label, dataset.class_names[s.label]] for s in dataset.split("train")]
    assert again == items
