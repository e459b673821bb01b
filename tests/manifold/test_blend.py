"""The blend of the tuned and the frozen tower's features, as torch and as an ONNX graph."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfsl.errors import ConfigError
from fastfsl.manifold import BlendedCLIP, TunedTower


@pytest.fixture
def clip(make_tower, randomise) -> nn.Module:
    """A CLIP model whose visual tower is tuned; float32."""
    text = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 1}
    model = open_clip.CLIP(24, {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}, text)
    randomise(model, 5)
    model.visual = make_tower()
    return model.float().eval().requires_grad_(False)


@pytest.fixture
def blended(clip, randomise) -> BlendedCLIP:
    tower = TunedTower(clip.visual)
    randomise(tower.parallel, 1)
    randomise(tower.upper, 2)
    return BlendedCLIP(clip, tower, 0.3)


@pytest.fixture
def images(clip, pixels) -> torch.Tensor:
    return pixels(clip.visual, 4).float()


def test_the_blend_is_that_of_the_two_branches(blended, clip, images):
    tuned, frozen = (F.normalize(features, dim=-1) for features in blended.tower(images))
    torch.testing.assert_close(frozen, F.normalize(clip.encode_image(images), dim=-1))
    torch.testing.assert_close(blended.branches(images), (tuned, frozen))
    torch.testing.assert_close(blended.encode_image(images), 0.3 * tuned + 0.7 * frozen)
    assert blended.encode_image(images).norm(dim=-1).max() < 0.999  # its length is left as it is


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_is_set_or_passed(blended, images, alpha):
    tuned, frozen = blended.branches(images)
    expected = alpha * tuned + (1 - alpha) * frozen
    torch.testing.assert_close(blended.encode_image(images, torch.tensor(alpha)), expected)
    blended.alpha.fill_(alpha)
    torch.testing.assert_close(blended.encode_image(images), expected)


def test_the_blended_logits_are_the_blend_of_the_logits(blended, images):
    class_embeddings = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = blended.logit_scale.exp()
    tuned, frozen = (scale * branch @ class_embeddings.T for branch in blended.branches(images))
    logits = scale * blended.encode_image(images) @ class_embeddings.T
    torch.testing.assert_close(logits, 0.3 * tuned + 0.7 * frozen)


def test_texts_and_temperature_are_those_of_the_model(blended, clip):
    tokens = torch.tensor([[1, 5, 7, 63, 0, 0, 0, 0], [1, 2, 63, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(blended.encode_text(tokens), clip.encode_text(tokens))
    assert blended.logit_scale is clip.logit_scale
    assert blended.alpha.dtype == torch.float32
    trained = {name for name, parameter in blended.named_parameters() if parameter.requires_grad}
    assert trained == {f"tower.{name}" for name in blended.tower.state()}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(clip, alpha):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        BlendedCLIP(clip, TunedTower(clip.visual), alpha)


class _Graph(nn.Module):
    def __init__(self, blended: BlendedCLIP) -> None:
        super().__init__()
        self.blended = blended

    def forward(self, images: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return self.blended.encode_image(images, alpha)


@pytest.mark.slow  # seconds a tower
def test_the_onnx_graph_has_a_free_batch_and_a_free_alpha(visual, clip, pixels, randomise, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    tower = TunedTower(visual.float())
    randomise(tower.parallel, 1)
    blended = BlendedCLIP(clip, tower, 0.3)
    images = pixels(visual, 5).float()
    with torch.no_grad():
        program = torch.onnx.export(
            _Graph(blended).eval(),
            (images[:2], blended.alpha),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")}, None),
            input_names=["images", "alpha"],
            verbose=False,
        )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (images[:1], images[:2], images):
        for alpha in (0.0, 0.3, 1.0):
            inputs = {"images": batch.numpy(), "alpha": torch.tensor(alpha).numpy()}
            (result,) = session.run(None, inputs)
            expected = blended.encode_image(batch, torch.tensor(alpha))
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-5, check_dtype=False)
