"""Tiny open_clip models with random weights, and a few images, made on the spot."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


class ToyClip:
    """A CLIP of two small blocks."""

    config: ClassVar[dict[str, Any]] = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocessing: ClassVar[dict[str, Any]] = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2]}

    def model(self, *, quick_gelu: bool = False, seed: int = 0) -> torch.nn.Module:
        """Random weights, large enough that GELU and QuickGELU give visibly different features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = open_clip.CLIP(**self.config, quick_gelu=quick_gelu)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("weight") and parameter.ndim == 2 and "token" not in name:
                        parameter.normal_(std=0.3)
        module: torch.nn.Module = model.eval()
        return module

    def folder(self, folder: Path, model: torch.nn.Module | None, **changes: Any) -> Path:
        """A model folder as open_clip publishes it; `changes` go into its model configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": self.config | changes, "preprocess_cfg": self.preprocessing}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if model is not None:
            save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder


@pytest.fixture(scope="session")
def toy() -> ToyClip:
    return ToyClip()


@pytest.fixture(scope="session")
def model_folder(toy, tmp_path_factory) -> Path:
    """A tiny GELU model with its weights."""
    folder: Path = toy.folder(tmp_path_factory.mktemp("models") / "tiny", toy.model())
    return folder


@pytest.fixture(scope="session")
def bare_folder(toy, tmp_path_factory) -> Path:
    """The same architecture without weights."""
    folder: Path = toy.folder(tmp_path_factory.mktemp("models") / "bare", None)
    return folder


@pytest.fixture
def image_files(tmp_path) -> list[Path]:
    """Six images of different sizes and formats, all with different content."""
    rng = np.random.default_rng(0)
    files = []
    for number, (width, height) in enumerate([(40, 40), (64, 33), (20, 50), (32, 32), (100, 41), (35, 36)]):
        path = tmp_path / "images" / f"{number}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
        files.append(path)
    return files
