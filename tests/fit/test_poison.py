"""Nothing that is fitted or chosen depends on the val or the test split: poisoned, they change no byte of it."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fastfsl.fit.deployment import deployment
from fastfsl.fit.methods import METHODS

RNG = np.random.default_rng(0)


def fitted(run):
    """All that a training decides, in a form whose equality is that of every byte."""
    return frozen(run.estimator.state()), run.estimator.selection_record(), frozen(deployment(run.estimator))


def frozen(value):
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: frozen(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(frozen, value))
    if is_dataclass(value):
        return {field.name: frozen(getattr(value, field.name)) for field in fields(value)}
    return value


def noise(num_samples):
    return RNG.normal(size=(num_samples, 16)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_val_and_test_of_a_feature_file_change_nothing(train_quickly, write_features, make_problem, tmp_path, method):
    options = {"target_precision": 0.9} if method == "auto" else {}

    def train(**changes):
        # in one place, so that the path cannot make a difference
        data = write_features(tmp_path / "features.npz", **changes)
        return fitted(train_quickly(data, method, shots=3, **options))

    clean = train()
    labels = np.repeat(np.arange(4), 12)
    poisons = {
        "labels": {"val_labels": RNG.integers(0, 4, 50), "test_labels": RNG.integers(0, 4, 50)},
        "features": {"val_features": noise(50), "test_features": noise(50)},
        "other samples": {
            "val_features": noise(48), "val_labels": labels, "test_features": noise(48), "test_labels": labels[::-1]
        },
        "no splits": dict.fromkeys(("val_features", "val_labels", "test_features", "test_labels")),
    }  # fmt: skip
    for what, changes in poisons.items():
        assert train(**changes) == clean, what
    if method != "zero-shot":  # which takes nothing from the support
        assert train(train_features=make_problem(shots=4).features + 0.01 * noise(16)) != clean


def test_the_test_folder_changes_nothing(train_quickly, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))

    def write(split):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(3):
                pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")

    def train():
        return fitted(train_quickly(tmp_path / "data", "gda", backbone="tiny-clip", num_views=2))

    write("train")
    write("test")
    clean = train()
    write("test")
    assert train() == clean
    write("train")
    assert train() != clean
