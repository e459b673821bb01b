"""Encoders that blend a tuned and a frozen tower, with weights that leave nothing where the tuning began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from fastfsl.encoders import Encoder, load_encoder
from fastfsl.images import Preprocessing
from fastfsl.manifold import BlendedCLIP, TunedTower

SIZE, WIDTH = 32, 24


class _CLIP(nn.Module):
    """As much of a CLIP model as image features need."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(3.0))


def _tower(kind: str) -> nn.Module:
    if kind == "open_clip":
        return VisionTransformer(SIZE, 8, width=32, layers=6, heads=2, mlp_ratio=2.0, output_dim=WIDTH)
    tower = TimmModel(kind, WIDTH, pool={"test_vit3": "map"}.get(kind, "token"), proj="linear")
    tower.set_input_size(SIZE)
    return tower


def _perturb(module: nn.Module) -> None:
    """Move every parameter that may be trained: matrices by as much as they are, vectors by a fifth."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.data += scale * torch.randn_like(parameter)


@pytest.fixture(scope="session")
def tiny_clip_graph() -> Any:
    """The demo's image tower as an ONNX model, exported once; nobody may alter it."""
    from fastfsl.export.visual_graph import visual_graph

    return visual_graph(load_encoder("tiny-clip"))


@pytest.fixture(scope="session")
def make_blended() -> Callable[..., Encoder]:
    """An encoder whose tuned branch is not its frozen one; `clip` replaces the small model."""

    def make(
        kind: str = "open_clip", *, clip: Any = None, alpha: float = 0.3, image_size: int = SIZE, **fields: Any
    ) -> Encoder:
        torch.manual_seed(0)
        clip = _CLIP(_tower(kind)).eval() if clip is None else clip
        _perturb(clip.visual)
        tower = TunedTower(clip.visual)
        _perturb(tower)
        preprocessing = Preprocessing(image_size=(image_size, image_size), mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))
        options = {"preprocessing": preprocessing, "embed_dim": WIDTH, "normalized": False, **fields}
        return replace(load_encoder("tiny-clip"), model=BlendedCLIP(clip, tower, alpha).eval(), **options)

    return make
