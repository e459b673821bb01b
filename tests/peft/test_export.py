"""What is tuned runs in the bundle's graph as it runs here."""

import numpy as np
import onnxruntime
import pytest
import torch

from fastfsl.export.visual_graph import visual_graph
from fastfsl.peft import CLIPAdapter, CLIPLoRA


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda e: CLIPAdapter(e, np.eye(3, 32)), lambda e: CLIPLoRA(e, ("a", "b"), "{}")])
def test_tuned_encoder_as_a_graph(toy, randomised, make):
    tuned = randomised(make(toy)).tuned_encoder()
    session = onnxruntime.InferenceSession(visual_graph(tuned).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        (embeddings,) = session.run(None, {session.get_inputs()[0].name: images})
        np.testing.assert_allclose(embeddings, tuned.encode_images(pixels), rtol=0, atol=1e-5)
