import numpy as np
import pytest

NUM_CLASSES, DIM = 5, 12


class Problem:
    """Unit features about class means that the class texts only half know, in a random order."""

    def __init__(self, counts, seed=0, num_views=0):
        rng = np.random.default_rng(seed)
        counts = [counts] * NUM_CLASSES if isinstance(counts, int) else counts
        means = unit(rng.normal(size=(len(counts), DIM)))
        self.class_embeddings = unit(means + 0.5 * rng.normal(size=means.shape)).astype(np.float32)
        self.labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        shape = (len(self.labels), num_views, DIM) if num_views else (len(self.labels), DIM)
        centre = means[self.labels][:, None] if num_views else means[self.labels]
        self.features = unit(centre + 0.25 * rng.normal(size=shape)).astype(np.float32)
        self.test_labels = np.repeat(np.arange(len(counts)), 40)
        noise = 0.25 * rng.normal(size=(len(self.test_labels), DIM))
        self.test_features = unit(means[self.test_labels] + noise).astype(np.float32)
        self.arrays = (self.features, self.labels, self.class_embeddings)


def unit(array):
    array = np.asarray(array, dtype=np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.fixture(scope="session")
def make_problem():
    return Problem


@pytest.fixture(scope="session")
def to_unit():
    return unit
