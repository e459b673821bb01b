import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fastfsl.arrays import LogitScaleWarning
from fastfsl.data import FeatureDataset, read_feature_file, write_feature_file
from fastfsl.errors import ConfigError, DataError, FastFSLError, ShapeError


def _arrays(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_features": rng.normal(size=(6, 4)).astype(np.float32),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_features": rng.normal(size=(3, 4)).astype(np.float16),
        "test_labels": np.array([2, 1, 0], dtype=np.uint8),
        "class_embeddings": rng.normal(size=(3, 4)),
        "class_names": np.array(["ant", "bee", "cat"]),
        "logit_scale": np.float32(50),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def _write(path: Path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        names = arrays.pop("class_names", None)
        metadata = None if names is None else {"class_names": json.dumps([str(name) for name in names])}
        save_file({name: np.asarray(array) for name, array in arrays.items()}, path, metadata)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_reads_both_formats(tmp_path, suffix):
    arrays = _arrays()
    dataset = read_feature_file(_write(tmp_path / f"features{suffix}", dict(arrays)))
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.logit_scale == 50
    assert list(dataset.splits) == ["train", "test"]
    for split in dataset.splits:
        features, labels = dataset.split(split)
        assert features.dtype == np.float32
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(features, arrays[f"{split}_features"].astype(np.float32))
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])
    assert dataset.embed_dim == 4


def test_defaults_and_views(tmp_path):
    views = np.ones((6, 5, 4), dtype=np.float32)
    dataset = read_feature_file(
        _write(tmp_path / "f.npz", _arrays(class_names=None, logit_scale=None, train_features=views))
    )
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    assert dataset.logit_scale == 100
    assert dataset.split("train")[0].shape == (6, 5, 4)
    with pytest.raises(DataError, match="no 'val' split"):
        dataset.split("val")


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


_TRAIN, _EMBEDDINGS = _arrays()["train_features"], _arrays()["class_embeddings"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"train_features": _with(_TRAIN, (4, 2), np.nan)}, DataError, "train_features has NaN .* first in row 4"),
        (
            {"train_features": _with(_TRAIN, (1, 0), np.inf)},
            DataError,
            "train_features has NaN or inf.* first in row 1",
        ),
        ({"class_embeddings": _with(_EMBEDDINGS, (2, 0), -np.inf)}, DataError, "class_embeddings has NaN .* row 2"),
        ({"class_embeddings": _with(_EMBEDDINGS, (2, 0), 1e300)}, DataError, "class_embeddings has NaN .* row 2"),
        ({"train_features": _with(_TRAIN, 3, 0)}, DataError, "train_features is zero in 1 rows, first in row 3"),
        ({"train_features": _with(_TRAIN, 3, 1e-44)}, DataError, "train_features is zero in 1 rows, first in row 3"),
        (
            {"train_features": _with(np.ones((6, 2, 4), dtype=np.float32), (5, 1), np.nan)},
            DataError,
            r"train_features has NaN .* first in row \(5, 1\)",
        ),
        ({"train_labels": np.array([0, 1, 2, 3, 1, 2])}, DataError, r"train_labels\[3\] is 3, expected 0..2"),
        ({"train_labels": np.array([0, 1, 2, -1, 1, 2])}, DataError, r"train_labels\[3\] is -1"),
        (
            {"train_labels": np.full(6, 2**64 - 1, dtype=np.uint64)},
            DataError,
            r"train_labels\[0\] is 18446744073709551615",
        ),
        ({"train_labels": np.zeros(6)}, DataError, "train_labels has type float64, expected integers"),
        ({"train_labels": np.zeros(6, dtype=bool)}, DataError, "train_labels has type bool"),
        ({"train_labels": np.zeros(5, dtype=int)}, ShapeError, r"train_labels has shape \(5,\), expected \(6,\)"),
        ({"train_labels": np.zeros((6, 1), dtype=int)}, ShapeError, r"train_labels has shape \(6, 1\)"),
        ({"train_features": np.ones((6, 5))}, ShapeError, "train_features has width 5, class_embeddings has 4"),
        (
            {"test_features": np.ones((3, 2, 4))},
            ShapeError,
            r"test_features has shape \(3, 2, 4\), expected \(rows, d\)",
        ),
        ({"train_features": np.ones((6, 4), dtype=int)}, ShapeError, "train_features has type int64"),
        ({"train_features": np.ones((0, 4))}, ShapeError, r"train_features has shape \(0, 4\)"),
        ({"class_embeddings": np.ones(4)}, ShapeError, r"class_embeddings has shape \(4,\)"),
        ({"class_embeddings": np.ones((1, 4)), "class_names": None}, DataError, "at least two classes"),
        (
            {"class_embeddings": None},
            DataError,
            "no array 'class_embeddings'; it holds class_names, logit_scale, test_",
        ),
        ({"train_labels": None}, DataError, "no array 'train_labels'"),
        ({"train_features": None}, DataError, "no array 'train_features'"),
        ({"class_names": np.array(["a", "b"])}, ShapeError, r"class_names has shape \(2,\), expected \(3,\)"),
        ({"class_names": np.array(["a", " ", "c"])}, DataError, r"class_names\[1\] is empty"),
        ({"class_names": np.array(["a", "b", "a"])}, DataError, "labels 0 and 2 are both called 'a'"),
        ({"logit_scale": np.float32(0)}, DataError, "logit_scale is 0.0"),
        ({"logit_scale": np.float32(np.nan)}, DataError, "logit_scale is nan"),
        ({"logit_scale": np.ones(2)}, ShapeError, r"logit_scale has shape \(2,\)"),
    ],
)
def test_unusable_arrays(tmp_path, suffix, changes, kind, message):
    path = _write(tmp_path / f"f{suffix}", _arrays(**changes))
    with pytest.raises(kind, match=message):
        read_feature_file(path)


TEXTS = np.array(["bee", "cat", "ant", "bee", "cat", "ant"])
QUERY = np.array(["ant", "bee", "cat"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bee", "cat", "ant"], [0, 1, 2, 0, 1, 2]),  # rows as the names say
        (None, [1, 2, 0, 1, 2, 0]),  # rows in ascending order
    ],
)
def test_text_labels_are_class_names(tmp_path, suffix, names, expected):
    path = tmp_path / f"f{suffix}"
    arrays = _arrays(train_labels=TEXTS, test_labels=QUERY, class_names=None if names is None else np.array(names))
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        texts = {name: arrays.pop(name) for name in list(arrays) if np.asarray(arrays[name]).dtype.kind == "U"}
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        save_file(arrays, path, {name: json.dumps(array.tolist()) for name, array in texts.items()})
    dataset = read_feature_file(path)
    assert dataset.class_names == (tuple(names) if names else ("ant", "bee", "cat"))
    assert dataset.split("train")[1].tolist() == expected
    assert [dataset.class_names[label] for label in dataset.split("test")[1]] == QUERY.tolist()


def test_bytes_are_texts_too(tmp_path):
    changes = {"train_labels": TEXTS.astype("S"), "test_labels": QUERY.astype("S"), "class_names": None}
    assert read_feature_file(_write(tmp_path / "f.npz", _arrays(**changes))).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("names", [None, np.array(["ant", "bee", "cat"])])
def test_labels_from_one_on_follow_the_rows(tmp_path, names):
    changes = {"train_labels": np.array([3, 2, 1, 3, 2, 1]), "test_labels": np.array([1, 2, 2]), "class_names": names}
    dataset = read_feature_file(_write(tmp_path / "f.npz", _arrays(**changes)))
    assert dataset.split("train")[1].tolist() == [2, 1, 0, 2, 1, 0]
    assert dataset.split("test")[1].tolist() == [0, 1, 1]
    assert dataset.class_names == (("class 1", "class 2", "class 3") if names is None else tuple(names))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array(["ant", "bee", "cat", "bea", "ant", "ant"])}, r"\[3\] is 'bea'.*mean 'bee'"),
        ({"class_names": None, "test_labels": np.array(["dog", "bee", "cat"])}, "4 classes .*3 rows: add class_names"),
        ({"test_labels": np.array([0, 1, 2])}, "train_labels holds texts and test_labels int64"),
        ({"train_labels": TEXTS.astype(object)}, r"train_labels holds Python objects.*unpickled.*dtype=str"),
        ({"class_names": QUERY.astype(object)}, r"class_names holds Python objects.*unpickled.*dtype=str"),
        ({"train_labels": np.array([b"\xff"] * 6)}, "no UTF-8"),
    ],
)
def test_text_labels_that_do_not_fit(tmp_path, changes, message):
    path = _write(tmp_path / "f.npz", _arrays(**{"train_labels": TEXTS, "test_labels": QUERY, **changes}))
    with pytest.raises(DataError, match=message):
        read_feature_file(path)


@pytest.mark.parametrize("scale", [4.605, 2.659, 0.07])
def test_a_stored_logarithm_is_warned_of(tmp_path, scale):
    path = _write(tmp_path / "f.npz", _arrays(logit_scale=np.float64(scale)))
    with pytest.warns(LogitScaleWarning, match=r"did you mean (exp of it, (99\.98|14\.)|1 / 0\.07)"):
        assert read_feature_file(path).logit_scale == scale


def test_no_split_at_all(tmp_path):
    path = _write(tmp_path / "f.npz", {"class_embeddings": _EMBEDDINGS, "features": _TRAIN})
    with pytest.raises(
        DataError, match="has no train_features, val_features or test_features; it holds class_embeddings"
    ):
        read_feature_file(path)


def test_nothing_is_ever_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    objects = np.array([Bomb(), Bomb(), Bomb()], dtype=object)
    np.savez(tmp_path / "f.npz", **_arrays(class_names=objects))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "single.npz", _TRAIN)
    (tmp_path / "single.npz.npy").rename(tmp_path / "single.npz")
    for name, message in (("f.npz", "unpickled"), ("bare.npz", "unpickled"), ("single.npz", "single array")):
        with pytest.raises(DataError, match=message):
            read_feature_file(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_class_names_in_safetensors_metadata_must_be_a_list_of_texts(tmp_path):
    arrays = {name: np.asarray(array) for name, array in _arrays(class_names=None).items()}
    for names in ("[1, 2, 3]", "{", '"abc"'):
        save_file(arrays, tmp_path / "f.safetensors", {"class_names": names})
        with pytest.raises(DataError, match="class_names in the metadata is not a JSON list"):
            read_feature_file(tmp_path / "f.safetensors")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_bytes_give_a_typed_error_or_the_same_shapes(tmp_path, suffix):
    """Truncated in many places, and single bytes overwritten all over the file."""
    path = _write(tmp_path / f"f{suffix}", _arrays(test_features=None, test_labels=None))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [whole[:position] + rng.bytes(1) + whole[position + 1 :] for position in range(0, len(whole), 3)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            dataset = read_feature_file(path)
        except FastFSLError:
            refused += 1
        else:
            assert dataset.class_embeddings.shape == (3, 4)
    assert refused > len(damaged) / 4


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(data=st.data())
def test_round_trip(tmp_path, suffix, data):
    num_classes, dim = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    values = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-6 else 1.0)
    rows = data.draw(st.integers(1, 6))
    shape = data.draw(st.sampled_from([(rows, dim), (rows, 3, dim)]))
    features = data.draw(hnp.arrays(np.float32, shape, elements=values))
    labels = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(0, num_classes - 1)))
    # numpy's text arrays cut trailing NULs, and no class is called so.
    names = data.draw(
        st.lists(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
            min_size=num_classes,
            max_size=num_classes,
            unique=True,
        )
    )
    dataset = FeatureDataset(
        class_names=tuple(names),
        splits={"train": (features, labels), "test": (features.reshape(-1, dim)[:rows], labels)},
        class_embeddings=data.draw(hnp.arrays(np.float32, (num_classes, dim), elements=values)),
        logit_scale=data.draw(st.floats(10, 1000)),
    )
    path = tmp_path / f"f{suffix}"
    write_feature_file(path, dataset)
    again = read_feature_file(path)
    assert again.class_names == dataset.class_names
    assert again.logit_scale == dataset.logit_scale
    np.testing.assert_array_equal(again.class_embeddings, dataset.class_embeddings)
    assert again.splits.keys() == dataset.splits.keys()
    for split in dataset.splits:
        np.testing.assert_array_equal(again.split(split)[0], dataset.split(split)[0])
        np.testing.assert_array_equal(again.split(split)[1], dataset.split(split)[1])


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    dataset = read_feature_file(_write(tmp_path / "f.npz", _arrays()))
    before = (tmp_path / "f.npz").read_bytes()
    with pytest.raises(ConfigError, match="feature files end in"):
        write_feature_file(tmp_path / "f.pkl", dataset)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises((OSError, ConfigError), match="No space left"):
        write_feature_file(tmp_path / "f.npz", dataset)
    assert (tmp_path / "f.npz").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("validation_features", "val_features"),
        ("Test_labels", "test_labels"),
        ("test_label", "test_labels"),
        ("logitscale", "logit_scale"),
        ("class_name", "class_names"),
    ],
)
def test_an_array_whose_name_is_mistyped_is_not_lost(tmp_path, suffix, given, meant):
    arrays = _arrays(**{meant: None})
    arrays[given] = np.array([50.0], np.float32)
    with pytest.raises(DataError, match=f"'{given}' would not be read: rename it '{meant}'"):
        read_feature_file(_write(tmp_path / f"features{suffix}", arrays))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_of_other_names_are_left_alone(tmp_path, suffix):
    arrays = _arrays(paths_index=np.arange(6), Test_labels=np.arange(3), train_paths=np.arange(6), seed=np.int64(1))
    assert len(read_feature_file(_write(tmp_path / f"features{suffix}", arrays)).split("test")[1]) == 3
