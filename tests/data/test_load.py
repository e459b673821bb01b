import subprocess
import sys

import numpy as np
import pytest

from fastfsl.data import FeatureDataset, ImageDataset, ImageSample, check_readable, load_dataset, read_folder
from fastfsl.errors import ConfigError, DataError


def test_dispatch(make_images, tmp_path):
    root = make_images("ant/1.png", "bee/1.png", root=tmp_path / "images")
    assert isinstance(load_dataset(str(root)), ImageDataset)
    split = tmp_path / "Split.JSON"
    split.write_text('{"train": [["ant/1.png", 0, "ant"], ["bee/1.png", 1, "bee"]]}')
    assert isinstance(load_dataset(split), ImageDataset)
    assert isinstance(load_dataset(split, image_root=root), ImageDataset)
    np.savez(
        tmp_path / "f.npz", train_features=np.ones((2, 3)), train_labels=np.arange(2), class_embeddings=np.ones((2, 3))
    )
    assert isinstance(load_dataset(tmp_path / "f.npz"), FeatureDataset)


def test_unknown_paths(make_images, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")
    for impossible in ("x" * 5000, "nul\0byte"):
        with pytest.raises(DataError, match="does not exist"):
            load_dataset(impossible)
    (tmp_path / "data.zip").touch()
    with pytest.raises(DataError, match="no known kind"):
        load_dataset(tmp_path / "data.zip")
    with pytest.raises(ConfigError, match="an image root go with a table or a split file"):
        load_dataset(make_images("ant/1.png", "bee/1.png"), image_root=tmp_path)


def test_corrupt_images_are_named_and_the_others_kept(make_images, tmp_path):
    root = make_images("ant/1.png", "ant/2.png", "bee/1.png")
    (root / "ant" / "2.png").write_bytes(b"not an image")
    whole = (root / "bee" / "1.png").read_bytes()
    (root / "bee" / "3.png").write_bytes(whole[: len(whole) // 2])
    dataset = read_folder(root)
    done = []
    good, bad = check_readable(dataset.split("train"), dataset.class_names, progress=lambda *step: done.append(step))
    assert [dataset.item(sample) for sample in good] == ["ant/1.png", "bee/1.png"]
    assert [path.name for path, _ in bad] == ["2.png", "3.png"]
    assert all(str(path) in reason for path, reason in bad)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_class_without_a_readable_image_is_named(make_images):
    root = make_images("ant/1.png", "bee/1.png")
    (root / "bee" / "1.png").write_bytes(b"")
    dataset = read_folder(root)
    with pytest.raises(DataError, match=r"no readable image for class 'bee': .*1.png"):
        check_readable(dataset.split("train"), dataset.class_names)
    with pytest.raises(DataError, match=r"class 7: .*nowhere"):
        check_readable([ImageSample(root / "nowhere.png", 7)])


def test_the_data_room_stays_free_of_torch():
    code = "import sys, fastfsl.data; assert not {'torch', 'open_clip', 'sklearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
