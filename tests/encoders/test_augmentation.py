import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fastfsl.encoders.augmentation import Augmentation, augmented_view, crop_box, seed_of_view
from fastfsl.errors import ConfigError
from fastfsl.images import Preprocessing

_PREPROCESSING = Preprocessing(image_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.2))


def _image(width=60, height=44):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_crops_follow_torchvision_s_distribution():
    """Mean area, mean log ratio and mean position of 3000 crops, against torchvision's own draws."""
    augmentation = Augmentation(ratio=(0.3, 2.0))  # wide enough to tell a uniform ratio from a log-uniform one

    def summary(boxes):
        top, left, height, width = np.array(boxes, dtype=float).T
        return np.stack([height * width / (90 * 120), np.log(width / height), top / 90, left / 120])

    rng = random.Random(0)
    ours = summary([crop_box(90, 120, augmentation, rng) for _ in range(3000)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.zeros(3, 90, 120)
        theirs = summary([
            transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [0.3, 2.0]) for _ in range(3000)
        ])  # fmt: skip
    # Four standard errors of the difference: the greatest standard deviation is that of the log ratio, below 0.55.
    assert np.abs(ours.mean(1) - theirs.mean(1)).max() < 4 * 0.55 * np.sqrt(2 / 3000)
    assert np.abs(ours.std(1) - theirs.std(1)).max() < 4 * 0.55 * np.sqrt(1 / 3000)


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.floats(0.01, 1),
    st.floats(0.1, 10),
    st.integers(0, 2**128 - 1),
)
def test_crops_lie_inside_the_image(height, width, scale, ratio, seed):
    augmentation = Augmentation(scale=(scale, 1.0), ratio=(ratio, ratio * 1.5))
    top, left, crop_height, crop_width = crop_box(height, width, augmentation, random.Random(seed))
    assert 0 <= top < top + crop_height <= height
    assert 0 <= left < left + crop_width <= width


def test_a_view_is_a_function_of_its_seed_alone():
    image = _image()
    state = torch.random.get_rng_state()
    first = augmented_view(image, Augmentation(), _PREPROCESSING, 7)
    torch.manual_seed(123)
    again = augmented_view(image, Augmentation(), _PREPROCESSING, 7)
    torch.random.set_rng_state(state)
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert not torch.equal(first, augmented_view(image, Augmentation(), _PREPROCESSING, 8))
    assert first.shape == (3, 32, 32)


def test_drawing_views_leaves_torch_s_generator_alone():
    before = torch.random.get_rng_state()
    augmented_view(_image(), Augmentation(), _PREPROCESSING, 7)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_whole_image_without_a_flip_is_resized_and_normalised():
    image = _image(48, 48)
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=False)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = ((pixels - [0.5, 0.4, 0.3]) / [0.3, 0.25, 0.2]).transpose(2, 0, 1)
    for seed in range(5):
        np.testing.assert_allclose(augmented_view(image, still, _PREPROCESSING, seed).numpy(), expected, atol=1e-5)


def test_half_the_views_are_flipped_and_none_when_that_is_off():
    image = _image(32, 32)
    whole = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = augmented_view(image, replace(whole, horizontal_flip=False), _PREPROCESSING, 0)
    views = [augmented_view(image, whole, _PREPROCESSING, seed) for seed in range(200)]
    flipped = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert sum(torch.equal(view, plain) for view in views) == 200 - flipped
    assert 70 < flipped < 130


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_every_mode_of_open_image_is_taken(mode):
    assert augmented_view(_image().convert(mode), Augmentation(), _PREPROCESSING, 0).shape == (3, 32, 32)


def test_seeds_of_views_are_all_different():
    seeds = {seed_of_view(seed, sha, view) for seed in (0, 1) for sha in ("a" * 64, "b" * 64) for view in range(20)}
    assert len(seeds) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "augmentation scale: expected 0 <"),
        ({"scale": (0.5, 1.5)}, "greatest <= 1"),
        ({"scale": (0.9, 0.5)}, "augmentation scale"),
        ({"scale": 0.5}, "expected two numbers"),
        ({"ratio": (1.0, float("nan"))}, "augmentation ratio"),
        ({"ratio": ("a", "b")}, "expected two numbers"),
        ({"interpolation": "lanczos"}, "bicubic or bilinear"),
        ({"horizontal_flip": "no"}, "expected true or false, got 'no'"),
    ],
)
def test_impossible_augmentations(options, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


def test_equal_settings_are_equal_however_written():
    from_yaml: Any = {"scale": [0.08, 1]}
    assert Augmentation(**from_yaml) == Augmentation()
    assert Augmentation().to_dict() == {
        "scale": [0.08, 1.0],
        "ratio": [3 / 4, 4 / 3],
        "horizontal_flip": True,
        "interpolation": "bicubic",
    }
