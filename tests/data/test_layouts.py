import json
import shutil

import pytest

from fastfsl.data import ImageDataset, load_dataset, prompt_names
from fastfsl.errors import DataError


def names(dataset, split):
    return [(sample.path.name, dataset.class_names[sample.label]) for sample in dataset.split(split)]


def test_a_folder_with_a_sets_split_file_is_read_by_it(make_images, tmp_path):
    make_images("2750/Forest/1.png", "2750/River/2.png", "2750/River/3.png")
    listed = {
        "train": [["Forest/1.png", 0, "Forest"], ["River/2.png", 1, "River"]],
        "test": [["River/3.png", 1, "River"]],
    }
    (tmp_path / "split_zhou_EuroSAT.json").write_text(json.dumps(listed))
    dataset = load_dataset(tmp_path)
    assert isinstance(dataset, ImageDataset)
    assert dataset.kind == "split-file"
    assert names(dataset, "test") == [("3.png", "River")]


@pytest.fixture
def aircraft(make_images, tmp_path):
    make_images(*(f"images/000{number}.jpg" for number in range(1, 5)))
    (tmp_path / "variants.txt").write_text("707-320\nF/A-18\n")
    (tmp_path / "images_variant_train.txt").write_text("0002 F/A-18\n0001 707-320\n")
    (tmp_path / "images_variant_val.txt").write_text("0003 707-320\n\n")
    (tmp_path / "images_variant_test.txt").write_text("0004 F/A-18\n")
    return tmp_path


def test_aircraft_is_read_by_its_own_lists(aircraft):
    dataset = load_dataset(aircraft)
    assert dataset.class_names == ("707-320", "F/A-18")
    assert names(dataset, "train") == [("0002.jpg", "F/A-18"), ("0001.jpg", "707-320")]
    assert names(dataset, "val") == [("0003.jpg", "707-320")]
    assert names(dataset, "test") == [("0004.jpg", "F/A-18")]


def test_what_is_wrong_with_aircrafts_lists_is_named(aircraft):
    (aircraft / "images_variant_val.txt").write_text("0003 707-320\n0009 F/A-18\n")
    with pytest.raises(DataError, match=r"1 of 2 images are missing, such as .*0009\.jpg"):
        load_dataset(aircraft)
    (aircraft / "images_variant_val.txt").write_text("0003 747\n")
    with pytest.raises(DataError, match="line 1: '747' is not in variants"):
        load_dataset(aircraft)
    (aircraft / "variants.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(aircraft)


@pytest.fixture
def imagenet(make_images, tmp_path):
    wnids = ("n03773504", "n04008634", "n01440764")
    make_images(*(f"images/{split}/{wnid}/{split}{wnid}.JPEG" for split in ("train", "val") for wnid in wnids))
    (tmp_path / "classnames.txt").write_text("n01440764 tench\nn03773504 missile\nn04008634 missile\n")
    return tmp_path


def test_imagenet_has_names_for_its_folders_and_tests_on_val(imagenet):
    dataset = load_dataset(imagenet)
    assert dataset.class_names == ("tench", "missile", "missile (n04008634)")
    assert prompt_names(dataset.class_names, "imagenet") == ("tench", "missile", "missile")
    assert set(dataset.splits) == {"train", "test"}
    assert names(dataset, "test")[0] == ("valn01440764.JPEG", "tench")


def test_a_test_folder_of_imagenet_does_not_displace_val(imagenet):
    shutil.copytree(imagenet / "images" / "val", imagenet / "images" / "test")
    for image in (imagenet / "images" / "test").rglob("*.JPEG"):
        image.rename(image.with_name(f"test{image.name}"))
    dataset = load_dataset(imagenet)
    assert set(dataset.splits) == {"train", "val", "test"}
    assert names(dataset, "val")[0] == ("valn01440764.JPEG", "tench")
    assert names(dataset, "test")[0][0].startswith("testval")


def test_what_is_wrong_with_imagenets_names_is_named(imagenet):
    (imagenet / "classnames.txt").write_text("n01440764 tench\nn03773504\n")
    with pytest.raises(DataError, match="line 2: expected `n01440764 tench`"):
        load_dataset(imagenet)
    (imagenet / "classnames.txt").write_text("n01440764 tench\nn03773504 missile\n")
    with pytest.raises(DataError, match="no name for 1 class folders, such as 'n04008634'"):
        load_dataset(imagenet)
