from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastfsl.fit.config import load_config
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.methods import METHODS
from fastfsl.fit.train import train

NUM_CLASSES, DIM = 4, 16


class Problem:
    """A small classification problem: class means in one place, class texts in another, unit length."""

    def __init__(self, shots: int, num_views: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.class_embeddings = _unit(rng.normal(size=(NUM_CLASSES, DIM)))
        means = _unit(rng.normal(size=(NUM_CLASSES, DIM)))
        self.labels = np.repeat(np.arange(NUM_CLASSES), shots)
        shape = (len(self.labels), num_views, DIM) if num_views else (len(self.labels), DIM)
        centre = means[self.labels][:, None] if num_views else means[self.labels]
        self.features = _unit(centre + 0.08 * rng.normal(size=shape))
        self.test_labels = np.repeat(np.arange(NUM_CLASSES), 25)
        self.test_features = _unit(means[self.test_labels] + 0.08 * rng.normal(size=(len(self.test_labels), DIM)))


def _unit(array: NDArray[np.float64]) -> NDArray[np.float32]:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def make_problem():
    return Problem


@pytest.fixture(scope="session")
def quick():
    """Parameters that train in about a second."""
    return {"num_blocks": 1, "epochs": 60, "batch_size": 8, "learning_rate": 3e-3, "num_folds": 2}


BRIEF = {"num_blocks": 1, "epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "num_folds": 2}


@pytest.fixture
def train_quickly(monkeypatch):
    """Trains a method of the registry on a data set, its flow for a few updates only; gives the run."""
    for name, value in BRIEF.items():  # of a flow inside auto
        monkeypatch.setitem(FlowMatchingAlignment.__init__.__kwdefaults__, name, value)

    def run(data, method, **flags):
        known = METHODS[method].parameters()
        params: dict[str, Any] = {name: value for name, value in BRIEF.items() if name in known}
        return train(data, load_config(flags={"method": method, "device": "cpu", **params, **flags}))

    return run


@pytest.fixture(scope="session")
def write_features(make_problem):
    """Writes a feature file with the splits train, val and test; options replace arrays, None leaves them out."""

    def write(path, **changes):
        problem = make_problem(shots=4)
        means = problem.features.reshape(NUM_CLASSES, -1, DIM).mean(axis=1)
        arrays = {
            "train_features": problem.features,
            "train_labels": problem.labels,
            "val_features": problem.test_features[::2],
            "val_labels": problem.test_labels[::2],
            "test_features": problem.test_features[1::2],
            "test_labels": problem.test_labels[1::2],
            # texts that know the classes in part, so that every method gives them some weight
            "class_embeddings": means + 1.5 * problem.class_embeddings,
        }
        np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
        return path

    return write
