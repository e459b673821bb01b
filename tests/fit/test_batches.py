import hashlib
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastfsl.encoders import Augmentation
from fastfsl.encoders.augmentation import augmented_view, seed_of_view
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.batches import FeatureBatches, ImageBatches, num_batches
from fastfsl.fit.processes import Processes
from fastfsl.images import Preprocessing, open_image

PREPROCESSING = Preprocessing((8, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
NUM_SAMPLES = 7
LABELS = np.array([3, 1, 4, 1, 5, 9, 2])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(NUM_SAMPLES):
        mode = ("RGB", "L")[index % 2]
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).convert(mode).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(NUM_SAMPLES)]


def images(paths, **options: Any) -> ImageBatches:
    chosen: dict[str, Any] = {"num_views": 2, "batch_size": 3, "seed": 0, **options}
    return ImageBatches(paths, LABELS, PREPROCESSING, Augmentation(), **chosen)


def features(**options: Any) -> FeatureBatches:
    values = torch.arange(NUM_SAMPLES * 4 * 2.0).reshape(NUM_SAMPLES, 4, 2)
    chosen: dict[str, Any] = {"num_views": 2, "batch_size": 3, "seed": 0, **options}
    return FeatureBatches(values, LABELS, **chosen)


@pytest.fixture(params=["images", "features"])
def make(request, paths):
    return (lambda **options: images(paths, **options)) if request.param == "images" else features


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair, other in zip(first, second, strict=True) for a, b in zip(pair, other, strict=True)
    )


def test_an_epoch_holds_every_sample_once(make):
    batches = make()
    assert (batches.num_samples, batches.batches_per_epoch) == (7, 3)
    epoch = list(batches.epoch(0))
    assert [len(labels) for _, labels in epoch] == [3, 3, 1]
    assert Counter(torch.cat([labels for _, labels in epoch]).tolist()) == Counter(LABELS.tolist())
    assert all(labels.dtype == torch.int64 and inputs.dtype == torch.float32 for inputs, labels in epoch)
    assert all(inputs.shape[:2] == (len(labels), 2) for inputs, labels in epoch)


def test_a_smaller_last_batch_is_left_out_where_asked_but_never_the_only_one(make):
    kept, dropped = make(), make(drop_last=True)
    assert (kept.batches_per_epoch, dropped.batches_per_epoch) == (3, 2)
    assert same(dropped.epoch(4), list(kept.epoch(4))[:2])
    assert same(dropped.epoch(4, first=1), list(kept.epoch(4))[1:2])
    whole = make(drop_last=True, batch_size=7)
    assert [len(labels) for _, labels in whole.epoch(0)] == [7]
    few = make(drop_last=True, batch_size=8)
    assert few.batches_per_epoch == 1
    assert [len(labels) for _, labels in few.epoch(0)] == [7]


@pytest.mark.parametrize(
    ("samples", "kept", "dropped"), [(37, 2, 1), (32, 1, 1), (64, 2, 2), (31, 1, 1), (1, 1, 1), (95, 3, 2)]
)
def test_batches_of_an_epoch_are_counted(samples, kept, dropped):
    assert num_batches(samples, 32, drop_last=False) == kept
    assert num_batches(samples, 32, drop_last=True) == dropped


def test_an_epoch_is_a_function_of_seed_and_number(make):
    batches = make()
    list(batches.epoch(0))
    assert same(batches.epoch(3), make().epoch(3))
    assert not same(batches.epoch(3), batches.epoch(4))
    assert not same(batches.epoch(3), make(seed=1).epoch(3))


def test_an_epoch_can_be_entered_anywhere(make):
    assert same(make().epoch(1, first=2), list(make().epoch(1))[2:])
    assert list(make().epoch(1, first=3)) == []


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_a_batch(make, world):
    whole = list(make().epoch(1))
    shares = [list(make().epoch(1, processes=Processes(rank, world))) for rank in range(world)]
    for number, (inputs, labels) in enumerate(whole):
        parts = []
        for rank in range(world):
            part, all_labels = shares[rank][number]
            assert torch.equal(all_labels, labels)
            share = Processes(rank, world).share(len(labels))
            assert len(part) == max(1, share.stop - share.start)  # something to compute with, even if it counts for 0
            parts.append(part[: share.stop - share.start])
        assert torch.equal(torch.cat(parts), inputs)


def test_features_come_in_different_views_of_their_sample():
    seen = set()
    for epoch in range(20):
        for inputs, labels in features(num_views=3).epoch(epoch):
            numbers = inputs[..., 0] / 2
            samples, views = numbers // 4, numbers % 4
            assert (samples == samples[:, :1]).all()
            assert (labels == torch.from_numpy(LABELS)[samples[:, 0].long()]).all()
            assert all(len(set(row)) == 3 for row in views.tolist())
            seen |= {tuple(row) for row in views.tolist()}
    assert len(seen) == 4 * 3 * 2


def test_images_come_in_new_views_every_epoch(paths):
    by_label: dict[int, torch.Tensor] = {}
    for inputs, labels in images(paths).epoch(5):
        by_label |= dict(zip(labels.tolist(), inputs, strict=True))
    for index, label in enumerate(LABELS.tolist()):
        if label == 1:  # of two samples
            continue
        digest = hashlib.sha256(paths[index].read_bytes()).hexdigest()
        image = Image.open(paths[index])
        for view in range(2):
            expected = augmented_view(image, Augmentation(), PREPROCESSING, seed_of_view(0, digest, 5 * 2 + view))
            assert torch.equal(by_label[label][view], expected)
            assert expected.shape == (3, 8, 6)


# RGB images take 360 bytes, grey ones 120; there are four and three of them.
@pytest.mark.parametrize(("room", "least", "most"), [(2**20, 7, 7), (1800, 7, 7), (700, 13, 17), (0, 21, 21)])
def test_decoded_images_are_kept_while_there_is_room(paths, monkeypatch, room, least, most):
    opened = []

    def counting(path):
        opened.append(path)
        return open_image(path)

    monkeypatch.setattr("fastfsl.fit.batches.open_image", counting)
    batches = images(paths, max_decoded_bytes=room)
    epochs = [list(batches.epoch(epoch)) for epoch in range(3)]
    assert least <= len(opened) <= most
    assert same(epochs[2], images(paths).epoch(2))


def test_an_epoch_left_early_leaves_no_threads(paths):
    before = threading.active_count()
    epoch = images(paths, batch_size=1).epoch(0)
    next(epoch)
    assert threading.active_count() > before
    epoch.close()
    assert threading.active_count() == before


def test_a_damaged_image_is_named(paths, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    before = threading.active_count()
    with pytest.raises(DataError, match=r"damaged\.png"):
        list(images([*paths[:6], damaged]).epoch(0))
    assert threading.active_count() == before


def test_wrong_arguments_are_told(make, paths):
    with pytest.raises(ConfigError, match="batch_size"):
        make(batch_size=0)
    with pytest.raises(ConfigError, match="num_views"):
        make(num_views=0)
    with pytest.raises(ConfigError, match=r"1\.\.4"):
        features(num_views=5)
    with pytest.raises(ShapeError, match="one label"):
        images(paths[:3])
    with pytest.raises(ShapeError, match=r"\(n, V, d\)"):
        FeatureBatches(torch.zeros(7, 2), LABELS, batch_size=1, seed=0)
