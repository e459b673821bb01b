import numpy as np
import pytest

from fastfsl.data import FeatureDataset, draw_episode, read_folder, select_classes
from fastfsl.errors import ConfigError, DataError


def feature_dataset(num_classes: int) -> FeatureDataset:
    labels = np.repeat(np.arange(num_classes), 3)[::-1].copy()
    rng = np.random.default_rng(0)
    return FeatureDataset(
        tuple("abcdefgh"[:num_classes]),
        {
            "train": (rng.normal(size=(len(labels), 2, 4)).astype(np.float32), labels),
            "test": (rng.normal(size=(2, 4)).astype(np.float32), np.array([0, 1])),
        },
        rng.normal(size=(num_classes, 4)).astype(np.float32),
        50.0,
    )


def test_all_is_the_data_set_itself():
    dataset = feature_dataset(5)
    assert select_classes(dataset, "all") is dataset


def test_base_is_the_first_half_rounded_up_and_new_the_rest():
    dataset = feature_dataset(5)
    base, new = select_classes(dataset, "base"), select_classes(dataset, "new")
    assert (base.class_names, new.class_names) == (("a", "b", "c"), ("d", "e"))
    features, labels = dataset.split("train")
    for part, first, end in ((base, 0, 3), (new, 3, 5)):
        kept = (labels >= first) & (labels < end)
        np.testing.assert_array_equal(part.split("train")[0], features[kept])
        np.testing.assert_array_equal(part.labels("train"), labels[kept] - first)
        np.testing.assert_array_equal(part.class_embeddings, dataset.class_embeddings[first:end])
        assert part.logit_scale == 50.0
    assert set(base.splits) == {"train", "test"}
    assert set(new.splits) == {"train"}  # the test samples are all of base classes


def test_images_are_parted_alike(make_images):
    dataset = read_folder(make_images(*(f"{name}/{number}.png" for name in "abcd" for number in range(3))))
    new = select_classes(dataset, "new")
    assert new.class_names == ("c", "d")
    assert [(item.path.parent.name, item.label) for item in new.split("train")] == [("c", 0)] * 3 + [("d", 1)] * 3
    assert draw_episode(new, 1, 0).items[0].startswith("c/")


def test_base_episodes_are_those_of_all_classes():
    dataset = feature_dataset(6)
    everything, base = draw_episode(dataset, 2, 7), draw_episode(select_classes(dataset, "base"), 2, 7)
    features = dataset.split("train")[0][list(everything.indices)]
    np.testing.assert_array_equal(
        select_classes(dataset, "base").split("train")[0][list(base.indices)], features[: len(base.indices)]
    )


def test_too_few_classes_and_unknown_parts_are_named():
    with pytest.raises(DataError, match="3 classes leave 1 new class"):
        select_classes(feature_dataset(3), "new")
    assert len(select_classes(feature_dataset(3), "base").class_names) == 2
    with pytest.raises(ConfigError, match="'half'"):
        select_classes(feature_dataset(4), "half")  # type: ignore[arg-type]  # what an untyped caller passes
