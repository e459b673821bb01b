"""Encoders to tune: the tiny CLIP of the package, and toys of other forms with random weights."""

from functools import cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from sklearn.datasets import load_digits

from fastfsl.encoders import Encoder, load_encoder, weights_digest
from fastfsl.images import Preprocessing

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
END_TOKEN = 49407


@cache
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=TEXT["context_length"])


def make_encoder(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Encoder:
    """Random weights, strong enough that every part shows in the features; a flat CLIP, or another with `text`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        form = open_clip.CLIP if text is None else open_clip.CustomTextCLIP
        model = form(32, VISION | (vision or {}), TEXT | (text or {}))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "token" not in name and "trunk" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.eval().requires_grad_(False)
    size = int(VISION["image_size"])
    return Encoder(
        model=model,
        tokenizer=tokenizer(),
        preprocessing=Preprocessing((size, size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest", 0),
        transform=lambda image: torch.zeros(3, size, size),
        backbone="toy",
        pretrained=None,
        digest=weights_digest(model, {}),
        embed_dim=32,
        logit_scale=10.0,
        device=torch.device("cpu"),
    )


# What open_clip's text towers differ in: mask, pooled token, projection.
TEXT_FORMS: dict[str, dict[str, Any] | None] = {
    "clip": None,
    "argmax": {},
    "last": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "last, causal": {"pool_type": "last"},
    "first": {"no_causal_mask": True, "pool_type": "first"},
    "eos": {"pool_type": "eos", "eos_id": END_TOKEN},
    "no projection": {"proj_type": "none"},
}


@pytest.fixture(scope="session")
def toy_encoder():
    return make_encoder


@pytest.fixture(scope="session", params=TEXT_FORMS)
def text_form(request) -> Encoder:
    return make_encoder(TEXT_FORMS[request.param])


@pytest.fixture(scope="session")
def toy() -> Encoder:
    """A flat CLIP of two small blocks a tower."""
    return make_encoder()


@pytest.fixture(scope="session")
def tiny() -> Encoder:
    """The trained CLIP of the package."""
    return load_encoder("tiny-clip")


@pytest.fixture(scope="session")
def digits():
    """Four scans of each of three digits as the tiny CLIP's pixels (12, 3, 32, 32), labels (12,), class names."""
    scans = load_digits(n_class=3)
    chosen = np.concatenate([np.flatnonzero(scans.target == digit)[:4] for digit in range(3)])
    images = np.kron(scans.images[chosen] / 8 - 1, np.ones((4, 4))).astype(np.float32)
    pixels = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)
    return pixels, torch.from_numpy(scans.target[chosen]), ("zero", "one", "two")


@pytest.fixture
def pixels() -> torch.Tensor:
    """Three images, (3, 3, 32, 32)."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def features() -> torch.Tensor:
    """Unit features (6, 32)."""
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.fixture
def randomised():
    """Give every trained tensor of a source random values, zeros among them included."""

    def randomise(source: torch.nn.Module, std: float = 0.5) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in source.parameters():
                if parameter.requires_grad:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        return source

    return randomise
