"""Tables of paths and labels as people have them."""

import codecs
import json

import pytest

from fastfsl import data
from fastfsl.data import Columns, ImageDataset
from fastfsl.errors import ConfigError, DataError

FILES = ("cat_1.png", "cat_2.png", "dog_1.png", "dog_2.png")
ROWS = [(file, file[:3]) for file in FILES]


def load_dataset(path, image_root=None, columns=None) -> ImageDataset:
    dataset = data.load_dataset(path, image_root, columns)
    assert isinstance(dataset, ImageDataset)
    return dataset


def _items(dataset, split="train"):
    return [(sample.path.name, dataset.class_names[sample.label]) for sample in dataset.split(split)]


def _csv(rows, header=("path", "label"), separator=","):
    return "\n".join(separator.join(map(str, row)) for row in ([header] if header else []) + list(rows)) + "\n"


@pytest.fixture
def flat(make_images, tmp_path):
    return make_images(*FILES, root=tmp_path / "ds")


@pytest.mark.parametrize("by_folder", [True, False])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", _csv(ROWS)),
        ("labels.csv", _csv(ROWS, ("Image Path", "Class"))),
        ("anything.csv", _csv(ROWS, ("filename", "breed"))),
        ("labels.csv", _csv([("images/x", *row) for row in ROWS], ("note", "file_name", "category"))),
        ("labels.csv", _csv(ROWS, separator=";")),
        ("labels.csv", _csv(ROWS, header=None)),
        ("labels.tsv", _csv(ROWS, separator="\t")),
        ("labels.csv", _csv([(f'"{path}"', f'" {label} "') for path, label in ROWS]).replace("\n", "\r\n")),
        ("labels.csv", _csv([(n, *row) for n, row in enumerate(ROWS)], ("", "image", "target"))),
        ("labels.csv", _csv([(path[:-4], label) for path, label in ROWS], ("id", "breed"))),
        ("labels.csv", _csv([(".\\" + path, label) for path, label in ROWS])),
        ("metadata.csv", _csv(ROWS, ("file_name", "label"))),
        ("metadata.jsonl", "\n".join(json.dumps({"file_name": path, "label": label}) for path, label in ROWS)),
        ("labels.json", json.dumps([{"file_name": path, "label": label} for path, label in ROWS])),
        ("labels.ndjson", "\n\n".join(json.dumps({"label": [label], "image": path}) for path, label in ROWS)),
    ],
)
def test_a_table_beside_a_flat_folder(flat, name, text, by_folder):
    (flat / name).write_text(text, newline="")
    dataset = load_dataset(flat if by_folder else flat / name)
    assert _items(dataset) == ROWS
    assert (dataset.kind, dataset.root) == ("table", flat)
    assert dataset.item(dataset.split("train")[0]) == "cat_1.png"
    assert not dataset.skipped.unexpected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_byte_order_are_no_part_of_a_name(flat, encoding):
    (flat / "labels.csv").write_text(_csv(ROWS), encoding=encoding)
    assert _items(load_dataset(flat / "labels.csv")) == ROWS
    (flat / "labels.jsonl").write_bytes(
        codecs.BOM_UTF8 + b'{"path":"cat_1.png","label":"a"}\n{"path":"dog_1.png","label":"b"}'
    )
    assert load_dataset(flat / "labels.jsonl").class_names == ("a", "b")


def test_parquet(flat):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table(
            {"path": [path for path, _ in ROWS], "label": pa.array([name for _, name in ROWS]).dictionary_encode()}
        ),
        flat / "x.parquet",
    )
    assert _items(load_dataset(flat / "x.parquet")) == ROWS
    assert _items(load_dataset(flat)) == ROWS
    pq.write_table(pa.table({"image": [{"bytes": b"1", "path": "a"}], "label": [0]}), flat / "hub.parquet")
    with pytest.raises(DataError, match="holds images, not paths"):
        load_dataset(flat / "hub.parquet")
    (flat / "bad.parquet").write_bytes(b"PAR1noise")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_dataset(flat / "bad.parquet")


def test_coco_categories(flat):
    content = {
        "images": [{"id": 7 + n, "file_name": path} for n, (path, _) in enumerate(ROWS)],
        "annotations": [{"image_id": 7 + n, "category_id": 1 + (n > 1), "bbox": [0, 0, 1, 1]} for n in range(4)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = flat / "_annotations.coco.json"
    path.write_text(json.dumps(content))
    assert _items(load_dataset(path)) == ROWS
    assert _items(load_dataset(flat)) == ROWS
    content["annotations"].append({"image_id": 7, "category_id": 2})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 of 4 images have several categories, such as cat_1\.png"):
        load_dataset(path)


@pytest.mark.parametrize("column", ["split", "Subset", "set", "usage"])
def test_a_column_of_splits(flat, column):
    splits = ("Train", "VALID", "training", "Testing")
    rows = [(*row, split) for row, split in zip(ROWS[:1] + ROWS[1:2] + ROWS[2:], splits, strict=True)]
    (flat / "labels.csv").write_text(_csv(rows, ("path", "label", column)))
    dataset = load_dataset(flat / "labels.csv")
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {"train": 2, "val": 1, "test": 1}
    (flat / "labels.csv").write_text(_csv([(*row, "fold1") for row in ROWS], ("path", "label", "split")))
    with pytest.raises(DataError, match="the column 'split' has 'fold1': expected train, val or test"):
        load_dataset(flat / "labels.csv")


def test_one_table_per_split(make_images, tmp_path):
    root = make_images("train/1.png", "train/2.png", "test/3.png", "test/4.png", root=tmp_path / "ds")
    (root / "train.csv").write_text(_csv([("1.png", "a"), ("2.png", "b")]))
    (root / "test.csv").write_text(_csv([("3.png", "b")]))
    dataset = load_dataset(root)
    assert _items(dataset) == [("1.png", "a"), ("2.png", "b")]
    assert _items(dataset, "test") == [("3.png", "b")]
    assert dataset.skipped.counts["not in the table"] == 1


def test_hugging_face_metadata_in_each_split(make_images, tmp_path):
    root = make_images("train/1.png", "train/x/2.png", "test/3.png", root=tmp_path / "ds")
    (root / "train" / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "label": "a"}\n{"file_name": "x/2.png", "label": "b"}\n'
    )
    (root / "test" / "metadata.csv").write_text("file_name,label\n3.png,a\n")
    dataset = load_dataset(root)
    assert [dataset.item(sample) for sample in dataset.split("train")] == ["train/1.png", "train/x/2.png"]
    assert _items(dataset, "test") == [("3.png", "a")]


def test_numbers_with_a_column_of_names(flat):
    (flat / "labels.csv").write_text(
        _csv([(p, "01"[name == "dog"], name) for p, name in ROWS], ("image", "label", "label_name"))
    )
    dataset = load_dataset(flat / "labels.csv")
    assert _items(dataset) == ROWS
    assert dataset.notes == ()
    (flat / "labels.csv").write_text(_csv([(p, f"{10 if name == 'dog' else 9}.0") for p, name in ROWS]))
    dataset = load_dataset(flat / "labels.csv")
    assert dataset.class_names == ("9.0", "10.0")


def test_numbers_without_names_are_told(flat):
    (flat / "labels.csv").write_text(_csv([(p, 10 if name == "dog" else 9) for p, name in ROWS]))
    dataset = load_dataset(flat / "labels.csv")
    assert dataset.class_names == ("9", "10")
    assert "called by numbers" in dataset.notes[0]


def test_columns_by_name(flat):
    (flat / "t.csv").write_text(
        _csv([(p, "x", name, "test" if "2" in p else "train") for p, name in ROWS], ("where", "label", "what", "when"))
    )
    columns = Columns("where", "what", "when")
    dataset = load_dataset(flat / "t.csv", columns=columns)
    assert _items(dataset) == [("cat_1.png", "cat"), ("dog_1.png", "dog")]
    assert _items(load_dataset(flat, columns=columns), "test") == [("cat_2.png", "cat"), ("dog_2.png", "dog")]
    with pytest.raises(
        ConfigError, match=r"--label-column 'genus': .* has the columns 'where', 'label', 'what', 'when'"
    ):
        load_dataset(flat / "t.csv", columns=Columns(label="genus"))
    with pytest.raises(ConfigError, match="names of columns go"):
        load_dataset(flat.parent, columns=columns)


def test_an_image_root_elsewhere(flat, tmp_path):
    table = tmp_path / "tables" / "labels.csv"
    table.parent.mkdir()
    table.write_text(_csv(ROWS))
    with pytest.raises(DataError, match=r"4 of 4 listed images are missing: cat_1\.png, .*--images"):
        load_dataset(table)
    assert _items(load_dataset(table, flat)) == ROWS
    table.write_text(_csv([(flat / path, label) for path, label in ROWS]))
    dataset = load_dataset(table)
    assert _items(dataset) == ROWS
    assert dataset.item(dataset.split("train")[0]) == (flat / "cat_1.png").as_posix()


def test_images_in_a_folder_beside_the_table(make_images, tmp_path):
    root = make_images(*(f"images/{file}" for file in FILES), root=tmp_path / "ds")
    (root / "labels.csv").write_text(_csv([(path.replace("_", "_"), label) for path, label in ROWS]))
    assert load_dataset(root).root == root / "images"


def test_missing_files_are_all_counted(flat):
    (flat / "labels.csv").write_text(_csv([*ROWS, *((f"{n}.png", "cat") for n in range(12))]))
    with pytest.raises(DataError, match=r"12 of 16 listed images are missing: 0\.png, .*9\.png and 2 more"):
        load_dataset(flat / "labels.csv")
    (flat / "labels.csv").write_text(_csv([("C:\\photos\\cat_1.png", "cat"), ("dog_1.png", "dog")]))
    with pytest.raises(DataError, match="as Windows writes it"):
        load_dataset(flat / "labels.csv")
    (flat / "labels.csv").write_text(_csv([("https://example.org/1.png", "cat"), ("dog_1.png", "dog")]))
    with pytest.raises(DataError, match="1 of 2 paths are addresses"):
        load_dataset(flat / "labels.csv")


def test_rows_without_a_label_and_rows_that_come_twice_are_counted(flat):
    (flat / "labels.csv").write_text(_csv([*ROWS, ROWS[0], ("cat_1.png", ""), (ROWS[1][0], "dog")]))
    dataset = load_dataset(flat / "labels.csv")
    assert dataset.skipped.counts == {"listed twice": 1, "without a label": 1}
    assert dataset.notes == (f"1 train images stand under several labels: {flat / 'cat_2.png'} (cat, dog)",)


def test_an_image_in_train_and_in_test_is_told(flat):
    rows = [*((*row, "train") for row in ROWS), (*ROWS[0], "test")]
    (flat / "labels.csv").write_text(_csv(rows, ("path", "label", "split")))
    assert "1 images are both in train and in test" in load_dataset(flat / "labels.csv").notes[0]


def test_files_that_are_not_in_the_table_are_counted(flat, make_images):
    make_images("more.png", root=flat)
    (flat / "labels.csv").write_text(_csv(ROWS))
    dataset = load_dataset(flat)
    assert dataset.skipped.counts == {"not in the table": 1, "beside the class folders": 1}


def test_class_folders_win_over_a_table_that_says_the_same(make_images, tmp_path):
    root = make_images("cat/1.png", "dog/2.png", root=tmp_path / "ds")
    (root / "labels.csv").write_text(_csv([("cat/1.png", "cat"), ("dog/2.png", "dog")]))
    assert load_dataset(root).kind == "folder"
    (root / "predictions.csv").write_text(_csv([("cat/1.png", "dog"), ("dog/2.png", "cow")]))
    assert load_dataset(root).class_names == ("cat", "dog")
    (root / "labels.csv").write_text(_csv([("cat/1.png", "tabby"), ("dog/2.png", "poodle")]))
    dataset = load_dataset(root)
    assert dataset.class_names == ("poodle", "tabby")
    assert "not the folders" in dataset.notes[0]
    (root / "labels.csv").write_text(_csv([("1.jpg", "tabby"), ("2.jpg", "poodle")]))
    dataset = load_dataset(root)
    assert dataset.class_names == ("cat", "dog")
    assert "labels.csv is not used" in dataset.notes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("path,label\n", "has no rows"),
        ("a,b,c\n1,2,3\n", "not clear which column holds the paths"),
        ("path,one,two\ncat_1.png,2,3\n", "not clear which column holds the labels"),
        ("path,label\ncat_1.png,cat\ndog_1.png,cat\n", r"one class only \('cat'\)"),
        ("path,label\ncat_1.png,cat\ndog_1.png,dog,x\n", "line 3: 3 cells, expected 2"),
        ("path,path\n1,2\n", "two columns are called 'path'"),
        ('path,label\n"cat_1.png,cat\n', "not a table in CSV"),
        (b"path,label\ncat_1.png,caf\xe9\n", "not UTF-8"),
        (b"path,label\ncat_1.png,c\0t\n", "not a table|one class"),
        ("path,label,split\ncat_1.png,cat,train\ndog_1.png,dog,test\n", "'dog' in test but not in train"),
        ("path,label\n,cat\ndog_1.png,dog\n", "row 2: the column 'path' is empty"),
    ],
)
def test_tables_that_cannot_be_used(flat, text, words):
    (flat / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        load_dataset(flat / "labels.csv")


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"path": 1}', '"x"', "[" * 100_000])
def test_json_lines_that_cannot_be_used(flat, text):
    (flat / "labels.jsonl").write_text(text)
    with pytest.raises(DataError):
        load_dataset(flat / "labels.jsonl")


def test_a_split_file_from_windows(flat):
    path = flat / "split.json"
    content = {
        "train": [[f".\\{file}", int("dog" in file), label] for file, label in ROWS],
        "Test": [[FILES[0], 0, "cat"]],
    }
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(content).encode())
    dataset = load_dataset(path)
    assert _items(dataset) == ROWS
    assert _items(dataset, "test") == ROWS[:1]
    path.write_text(json.dumps({"train": [["C:\\a.png", 0, "a"], ["b.png", 1, "b"]]}))
    with pytest.raises(DataError, match="as Windows writes it"):
        load_dataset(path)


@pytest.mark.parametrize("labels", [("0", "1"), ("0.0", "1.0"), ("-1", "1"), ("0", "")])
def test_classes_called_by_numbers_are_said(flat, labels):
    named = [(path, labels[label == "dog"]) for path, label in ROWS]
    (flat / "labels.csv").write_text(_csv([*named, (FILES[-1], "7")]))
    assert any("called by numbers" in note for note in load_dataset(flat / "labels.csv").notes)
