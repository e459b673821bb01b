import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.data import Episode, FeatureDataset, draw_episode, read_folder, sample_episode
from fastfsl.errors import ConfigError, DataError, FastFSLError, ShapeError

_LABELS = np.array([2, 0, 1, 0, 2, 1, 0, 1, 2, 0, 1, 2])


def test_the_draw_of_a_seed_is_fixed_for_good():
    """Golden indices: another numpy, machine or refactoring must not change anybody's episodes."""
    assert sample_episode(_LABELS, 2, 0, 3).indices == (6, 9, 5, 7, 0, 11)
    assert sample_episode(_LABELS, 2, 7, 3).indices == (1, 9, 5, 10, 0, 4)


@given(
    st.lists(st.integers(0, 4), min_size=5, max_size=60),
    st.integers(1, 4),
    st.integers(0, 2**40),
)
def test_stratified_without_repeats_and_nested(labels, num_shots, seed):
    labels = np.array([*range(5), *labels])
    counts = np.bincount(labels, minlength=5)
    if counts.min() < num_shots:
        with pytest.raises(DataError, match=f"fewer than {num_shots} train images"):
            sample_episode(labels, num_shots, seed, 5, exact=True)
    episode = sample_episode(labels, num_shots, seed, 5)
    assert np.bincount(labels[list(episode.indices)], minlength=5).tolist() == np.minimum(counts, num_shots).tolist()
    assert len(set(episode.indices)) == len(episode.indices)
    assert episode == sample_episode(labels, num_shots, seed, 5)
    assert labels[list(episode.indices)].tolist() == sorted(labels[list(episode.indices)])
    assert set(sample_episode(labels, 1, seed, 5).indices) <= set(episode.indices)
    assert set(sample_episode(labels, None, seed, 5).indices) == set(range(len(labels)))


def test_seeds_give_different_draws_and_every_image_a_fair_chance():
    labels = np.repeat([0, 1], 10)
    draws = [sample_episode(labels, 2, seed, 2).indices for seed in range(500)]
    assert len(set(draws)) > 400
    frequency = np.bincount(np.concatenate([np.array(draw) for draw in draws]), minlength=20) / 500
    # Each image is drawn with probability 0.2; over 500 draws the standard deviation is 0.018.
    assert np.abs(frequency - 0.2).max() < 0.09


def test_too_few_images_names_classes_and_counts():
    with pytest.raises(
        DataError, match=r"fewer than 3 train images in 2 of 3 classes: 'bee' \(1\), 'cat' \(2\); ask for at most 1"
    ):
        sample_episode([0, 0, 0, 1, 2, 2], 3, 0, 3, class_names=["ant", "bee", "cat"], exact=True)
    assert len(sample_episode([0, 0, 0, 1, 2, 2], 3, 0, 3).indices) == 6
    with pytest.raises(
        DataError, match=r"fewer than 1 train images in 1 of 2 classes: 'class 1' \(0\); add images or remove"
    ):
        sample_episode([0, 0], None, 0, 2)


@pytest.mark.parametrize(
    ("labels", "num_shots", "seed", "kind"),
    [
        ([0, 1], 0, 0, ConfigError),
        ([0, 1], -1, 0, ConfigError),
        ([0, 1], 1, -1, ConfigError),
        ([0, 2], 1, 0, DataError),
        ([-1, 1], 1, 0, DataError),
        ([0.0, 1.0], 1, 0, ShapeError),
        ([[0, 1]], 1, 0, ShapeError),
        ([], 1, 0, DataError),
    ],
)
def test_bad_arguments(labels, num_shots, seed, kind):
    with pytest.raises(kind):
        sample_episode(labels, num_shots, seed, 2)


def test_of_an_image_folder(make_images, tmp_path):
    root = make_images(*(f"{name}/{number}.png" for name in ("ant", "bee") for number in range(4)), root=tmp_path / "d")
    dataset = read_folder(root)
    episode = draw_episode(dataset, 2, 3)
    assert episode.class_names == ("ant", "bee")
    assert all(
        episode.items[i] == dataset.item(dataset.split("train")[index]) for i, index in enumerate(episode.indices)
    )
    episode.save(tmp_path / "episode.json")
    assert Episode.load(tmp_path / "episode.json") == episode
    episode.check(dataset)
    (root / episode.items[0]).rename(root / "ant" / "renamed.png")
    with pytest.raises(DataError, match="train split has changed"):
        episode.check(read_folder(root))


def test_of_a_feature_data_set():
    dataset = FeatureDataset(
        ("a", "b"), {"train": (np.ones((12, 2), np.float32), _LABELS % 2)}, np.eye(2, dtype=np.float32)
    )
    episode = draw_episode(dataset, 3, 0)
    assert episode.items == tuple(map(str, episode.indices))
    episode.check(dataset)
    with pytest.raises(DataError, match="other classes"):
        sample_episode([0, 1], 1, 0, 2).check(dataset)


_valid = {
    "format": "fastfsl-episode", "version": 1, "num_shots": None, "seed": 0,
    "class_names": ["a", "b"], "indices": [0, 1], "items": ["x", "y"],
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 2},
        {"num_shots": "4"},
        {"seed": None},
        {"seed": -1},
        {"seed": True},
        {"class_names": "ab"},
        {"indices": [0, 1.0]},
        {"indices": [0, -1]},
        {"indices": [0, 0]},
        {"indices": [0]},
        {"items": ["x", 1]},
    ],
)
def test_altered_episode_files(tmp_path, changes):
    path = tmp_path / "episode.json"
    path.write_text(json.dumps(_valid))
    Episode.load(path)
    path.write_text(json.dumps(_valid | changes))
    with pytest.raises(DataError, match=r"episode.json"):
        Episode.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_files_that_are_no_episode(tmp_path, content):
    (tmp_path / "episode.json").write_bytes(content)
    with pytest.raises(DataError, match="not an episode file"):
        Episode.load(tmp_path / "episode.json")
    with pytest.raises(DataError, match="cannot be read"):
        Episode.load(tmp_path / "nowhere.json")


def test_saving_replaces_whole_files_only(tmp_path):
    episode = sample_episode(_LABELS, 1, 0, 3)
    episode.save(tmp_path / "run" / "episode.json")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["episode.json"]
    (tmp_path / "file").touch()
    with pytest.raises(FastFSLError):
        episode.save(tmp_path / "file" / "episode.json")
