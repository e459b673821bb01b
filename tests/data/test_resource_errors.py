"""A disk that fails, or no file handles left: the data are not blamed, and nothing is left out for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastfsl.data import Episode, ImageDataset, check_readable, load_dataset
from fastfsl.data.scoring import digest_of
from fastfsl.errors import DataError, ResourceError
from fastfsl.images import opening


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "train" / name / f"{number}.png")
    return tmp_path


def _fail(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_image_is_not_skipped_for_want_of_a_handle(folder, monkeypatch):
    dataset = load_dataset(folder)
    assert isinstance(dataset, ImageDataset)
    read = opening._read

    def fail(path):
        if path.name == "1.png":
            raise ResourceError(f"cannot read the image {path}: too many open files")
        return read(path)

    monkeypatch.setattr(opening, "_read", fail)
    with pytest.raises(ResourceError, match="too many open files"):
        check_readable(dataset.split("train"), dataset.class_names)


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_folder_on_a_failing_disk_is_not_read_in_part(folder, monkeypatch, call):
    monkeypatch.setattr(os, call, _fail)
    with pytest.raises((ResourceError, OSError)) as caught:
        load_dataset(folder)
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("read", [Episode.load, load_dataset, digest_of], ids=["episode", "split file", "digest"])
def test_a_file_on_a_failing_disk_is_not_blamed(tmp_path, monkeypatch, read):
    path = tmp_path / "split.json"
    path.write_text("{}")
    monkeypatch.setattr(Path, "open", _fail)
    monkeypatch.setattr(Path, "read_text", _fail)
    with pytest.raises(ResourceError, match="input/output error; check the disk or network"):
        read(path)


@pytest.mark.parametrize("name", ["features.npz", "features.safetensors"])
def test_a_feature_file_on_a_failing_disk_is_not_blamed(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", _fail)
    with pytest.raises(ResourceError, match="check the disk or network"):
        load_dataset(tmp_path / name)
