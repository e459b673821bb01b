"""Features and their cache: the same numbers with and without it, and no forward pass twice."""

import errno
import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfsl.encoders import Augmentation, FeatureCache, default_cache_dir, extract_features, load_encoder
from fastfsl.encoders import feature_cache as feature_cache_module
from fastfsl.encoders.augmentation import augmented_view, seed_of_view
from fastfsl.errors import ConfigError, DataError, ResourceError
from fastfsl.images import open_image


@pytest.fixture
def encoder(model_folder):
    return load_encoder(f"local-dir:{model_folder}")


@pytest.fixture
def forwarded(encoder):
    """Sizes of the batches that went through the image tower."""
    sizes = []
    encoder.model.visual.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_without_views_the_evaluation_transform_is_used(encoder, image_files, tmp_path):
    features = extract_features(encoder, image_files, cache_dir=tmp_path / "cache")
    assert features.shape == (6, 1, 32)
    assert features.dtype == np.float32
    for file, row in zip(image_files, features[:, 0], strict=True):
        expected = encoder.encode_images(encoder.transform(open_image(file))[None])[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)


def test_views_are_those_of_their_seeds(encoder, image_files, tmp_path):
    augmentation = Augmentation(scale=(0.3, 0.8))
    features = extract_features(encoder, image_files[:2], 3, augmentation, seed=5, cache_dir=tmp_path / "cache")
    assert features.shape == (2, 3, 32)
    for file, rows in zip(image_files, features, strict=False):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        for view, row in enumerate(rows):
            pixels = augmented_view(
                open_image(file), augmentation, encoder.preprocessing, seed_of_view(5, sha256, view)
            )
            np.testing.assert_allclose(row, encoder.encode_images(pixels[None])[0].numpy(), atol=1e-5)


def test_a_second_run_computes_nothing(encoder, forwarded, image_files, tmp_path):
    first = extract_features(encoder, image_files, 4, cache_dir=tmp_path / "cache", batch_size=5)
    assert forwarded == [5, 5, 5, 5, 4]
    forwarded.clear()
    steps = []
    again = extract_features(
        encoder, image_files, 4, cache_dir=tmp_path / "cache", progress=lambda *step: steps.append(step)
    )
    assert forwarded == []
    assert steps == [(24, 24)]
    np.testing.assert_array_equal(first, again)


def test_the_cache_goes_by_content_not_by_name_or_order(encoder, forwarded, image_files, tmp_path):
    first = extract_features(encoder, image_files, 2, cache_dir=tmp_path / "cache")
    moved = [shutil.copy(file, tmp_path / f"moved{number}.jpg") for number, file in enumerate(image_files)]
    forwarded.clear()
    again = extract_features(encoder, moved[::-1], 2, cache_dir=tmp_path / "cache")
    assert forwarded == []
    np.testing.assert_array_equal(first[::-1], again)


def test_more_views_keep_the_first_ones(encoder, forwarded, image_files, tmp_path):
    few = extract_features(encoder, image_files, 2, cache_dir=tmp_path / "cache")
    forwarded.clear()
    many = extract_features(encoder, image_files, 5, cache_dir=tmp_path / "cache")
    assert sum(forwarded) == 6 * 3
    np.testing.assert_array_equal(many[:, :2], few)
    elsewhere = extract_features(encoder, image_files[3:], 5, cache_dir=tmp_path / "other", batch_size=1)
    np.testing.assert_allclose(elsewhere, many[3:], atol=1e-5)  # whatever the batch


def test_whatever_features_depend_on_is_in_the_key(toy, encoder, image_files, tmp_path):
    cache, files = tmp_path / "cache", image_files[:2]
    other = load_encoder(f"local-dir:{toy.folder(tmp_path / 'other', toy.model(seed=1))}")
    results = [
        extract_features(encoder, files, 1, cache_dir=cache),
        extract_features(encoder, files, 1, seed=1, cache_dir=cache),
        extract_features(encoder, files, 1, Augmentation(scale=(0.5, 1.0)), cache_dir=cache),
        extract_features(encoder, files, 1, Augmentation(ratio=(1.0, 1.0)), cache_dir=cache),
        extract_features(encoder, files, 0, cache_dir=cache),
        extract_features(other, files, 1, cache_dir=cache),
    ]
    assert len(list((cache / "features").iterdir())) == 6
    for index, one in enumerate(results):
        for another in results[:index]:
            assert np.abs(one - another).max() > 1e-4
    # Without views neither the seed nor the augmentation matters.
    extract_features(encoder, files, 0, Augmentation(scale=(0.5, 1.0)), seed=3, cache_dir=cache)
    assert len(list((cache / "features").iterdir())) == 6


def test_an_interrupted_run_resumes_where_it_stopped(encoder, forwarded, image_files, tmp_path, monkeypatch):
    whole = extract_features(encoder, image_files, 4, cache_dir=tmp_path / "reference")
    forwarded.clear()
    encode = encoder.encode_images

    def interrupted(pixels):
        if len(forwarded) == 2:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(encoder, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_features(encoder, image_files, 4, cache_dir=tmp_path / "cache", batch_size=5)
    monkeypatch.undo()
    assert forwarded == [5, 5]
    forwarded.clear()
    steps = []
    resumed = extract_features(
        encoder, image_files, 4, cache_dir=tmp_path / "cache", batch_size=5, progress=lambda *step: steps.append(step)
    )
    assert steps[0] == (10, 24)
    assert sum(forwarded) == 14
    np.testing.assert_allclose(resumed, whole, atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: b"\xff" * 8 + content[8:],
    ],
    ids=["empty", "cut", "one bit flipped", "header"],
)
def test_a_damaged_shard_is_dropped_and_its_features_computed_again(encoder, forwarded, image_files, tmp_path, damage):
    cache = tmp_path / "cache"
    first = extract_features(encoder, image_files[:3], 2, cache_dir=cache)
    [damaged] = cache.glob("features/*/*.safetensors")
    extract_features(encoder, image_files[3:], 2, cache_dir=cache)
    damaged.write_bytes(damage(damaged.read_bytes()))
    forwarded.clear()
    with pytest.warns(UserWarning, match=re.escape(f"cached features in {damaged} are damaged")):
        again = extract_features(encoder, image_files, 2, cache_dir=cache)
    assert sum(forwarded) == 6  # the other shard is still good
    np.testing.assert_allclose(again[:3], first, atol=1e-5)
    assert not damaged.exists()
    forwarded.clear()
    extract_features(encoder, image_files, 2, cache_dir=cache)  # and no warning any more
    assert forwarded == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), OSError("No more handles (os error 24)")])
def test_a_shard_that_cannot_be_read_now_is_not_dropped(encoder, image_files, tmp_path, monkeypatch, error):
    extract_features(encoder, image_files, cache_dir=tmp_path)
    [shard] = tmp_path.glob("features/*/*.safetensors")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(feature_cache_module, "safe_open", fail)
    with pytest.raises(ResourceError, match="safetensors"):
        extract_features(encoder, image_files, cache_dir=tmp_path)
    assert shard.exists()


def test_an_image_that_cannot_be_read_now_is_not_called_bad(encoder, image_files, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ResourceError, match="raise the limit of open files"):
        extract_features(encoder, image_files, cache_dir=tmp_path)


def test_full_shards_are_written_on_the_way(encoder, image_files, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache_module, "SHARD_ROWS", 5)
    extract_features(encoder, image_files, 4, cache_dir=tmp_path / "cache", batch_size=4)
    assert len(list(tmp_path.glob("cache/features/*/*.safetensors"))) == 5
    names = {file.name for file in tmp_path.glob("cache/features/*/*")}
    assert sum(not name.endswith(".safetensors") for name in names) == 1
    assert "configuration.json" in names


def test_an_unwritable_cache_costs_a_warning_only(encoder, image_files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"features cannot be cached .*FASTFSL_CACHE"):
        features = extract_features(encoder, image_files, cache_dir=tmp_path / "file")
    assert features.shape == (6, 1, 32)


def test_the_same_content_twice_is_computed_once(encoder, forwarded, image_files, tmp_path):
    steps = []
    features = extract_features(
        encoder, [image_files[0], *image_files[:2]], 2, cache_dir=tmp_path, progress=lambda *step: steps.append(step)
    )
    assert sum(forwarded) == 4
    assert steps == [(0, 6), (6, 6)]
    np.testing.assert_array_equal(features[0], features[1])


def test_progress_counts_every_view(encoder, image_files, tmp_path):
    steps = []
    extract_features(
        encoder, image_files, 3, cache_dir=tmp_path, batch_size=4, progress=lambda *step: steps.append(step)
    )
    assert steps == [(done, 18) for done in (0, 4, 8, 12, 16, 18)]


def test_unreadable_images_are_named_and_the_others_cached(encoder, forwarded, image_files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.png"):
        extract_features(encoder, [*image_files, tmp_path / "bad.png"], cache_dir=tmp_path / "cache", batch_size=2)
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read"):
        extract_features(encoder, [tmp_path / "nowhere.png"], cache_dir=tmp_path / "cache")
    assert sum(forwarded) == 6
    forwarded.clear()
    extract_features(encoder, image_files, cache_dir=tmp_path / "cache")
    assert forwarded == []


@pytest.mark.parametrize("options", [{"num_views": -1}, {"seed": -1}, {"batch_size": 0}])
def test_bad_options(encoder, image_files, tmp_path, options):
    with pytest.raises(ConfigError, match="expected num_views >= 0"):
        extract_features(encoder, image_files, cache_dir=tmp_path, **options)


def test_no_images_give_no_features(encoder, tmp_path):
    assert extract_features(encoder, [], 3, cache_dir=tmp_path).shape == (0, 3, 32)


def test_an_encoder_that_gives_nan_is_refused(encoder, image_files, tmp_path):
    with torch.no_grad():
        encoder.model.visual.proj.fill_(torch.nan)
    with pytest.raises(ConfigError, match="NaN or infinite features"):
        extract_features(encoder, image_files, cache_dir=tmp_path)


def test_where_the_cache_is_by_default(monkeypatch, tmp_path, encoder, image_files):
    monkeypatch.delenv("FASTFSL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "fastfsl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "fastfsl"
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    extract_features(encoder, image_files[:1])
    assert len(list((tmp_path / "own" / "features").iterdir())) == 1


_FILL = """
import sys, time
from pathlib import Path
import numpy as np
from fastfsl.encoders import feature_cache

directory, start = Path(sys.argv[1]), int(sys.argv[2])
feature_cache.SHARD_ROWS = 7
(directory / f"ready{start}").touch()
while not (directory / "go").exists():
    time.sleep(0.001)
with feature_cache.FeatureCache(directory, {"encoder": "x"}, 4) as cache:
    for number in range(start, start + 80):
        if cache.get(f"{number:064x}", 0) is None:
            cache.add(f"{number:064x}", 0, np.full(4, number, dtype=np.float32))
"""


def test_two_caches_may_be_open_on_one_folder(tmp_path, monkeypatch):
    """What two processes do, one step after the other: nothing is shared but the files."""
    monkeypatch.setattr(feature_cache_module, "SHARD_ROWS", 3)
    with FeatureCache(tmp_path, {"encoder": "x"}, 4) as one, FeatureCache(tmp_path, {"encoder": "x"}, 4) as another:
        for number in range(20):
            one.add(f"{number:064x}", 0, np.full(4, number, dtype=np.float32))
            another.add(f"{number + 10:064x}", 0, np.full(4, number + 10, dtype=np.float32))
    with FeatureCache(tmp_path, {"encoder": "x"}, 4) as cache:
        for number in range(30):
            row = cache.get(f"{number:064x}", 0)
            assert row is not None
            assert (row == number).all()


def test_a_shard_that_vanishes_while_the_folder_is_read(tmp_path, monkeypatch):
    """Another process may have dropped it as damaged."""
    with FeatureCache(tmp_path, {"encoder": "x"}, 4) as cache:
        cache.add("0" * 64, 0, np.ones(4, dtype=np.float32))
    listed = list(cache.folder.glob("*.safetensors"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*listed, self / "vanished.safetensors"])
    with FeatureCache(tmp_path, {"encoder": "x"}, 4) as cache:
        assert cache.get("0" * 64, 0) is not None


@pytest.mark.slow
def test_two_processes_may_fill_one_cache(tmp_path):
    """Forty of each one's eighty rows are the other's too."""
    commands = [[sys.executable, "-c", _FILL, str(tmp_path), str(start)] for start in (0, 40)]
    processes = [subprocess.Popen(command) for command in commands]
    while not all((tmp_path / f"ready{start}").exists() for start in (0, 40)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in processes] == [0, 0]
    with FeatureCache(tmp_path, {"encoder": "x"}, 4) as cache:
        for number in range(120):
            row = cache.get(f"{number:064x}", 0)
            assert row is not None
            assert (row == number).all()
