from typing import Any

import numpy as np
import pytest

from fastfsl.images import Preprocessing
from fastfsl.runtime.image_encoder import ImageEncoder
from fastfsl.runtime.image_reader import ImageReader


class _Means:
    """A tower whose embedding is the mean of each channel."""

    def __init__(self, provider):
        self.provider = provider
        self.batches = []

    def run(self, output_names, input_feed):
        images = input_feed["images"]
        self.batches.append(len(images))
        return [images.mean(axis=(1, 2)).astype(np.float32)]

    def get_providers(self):
        return [self.provider]


@pytest.mark.parametrize(
    ("provider", "batches"), [("CPUExecutionProvider", [16, 16, 5]), ("CUDAExecutionProvider", [37])]
)
def test_a_processor_gets_as_many_images_at_once_as_its_caches_hold(provider, batches):
    preprocessing = Preprocessing((4, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    session: Any = _Means(provider)
    encoder = ImageEncoder(session, ImageReader(preprocessing), 3, None, num_threads=2)
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(encoder.embed(images), images.mean(axis=(1, 2)).astype(np.float32))
    assert session.batches == batches
    assert encoder.embed(images[:0]).shape == (0, 3)
