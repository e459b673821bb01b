"""Small models of open_clip's families, with random weights that leave nothing at zero, as folders it can load."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from torch import nn

_TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
_VIT: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
_CUSTOM = {"embed_dim": 16, "custom_text": True}


@register_model
def toy_eva(**options: Any) -> nn.Module:
    """EVA-02 in small: rotary positions, SwiGLU."""
    own = {name: options[name] for name in ("num_classes", "global_pool") if name in options}
    return Eva(
        img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2, swiglu_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(16, 16), **own,
    )  # fmt: skip


@register_model
def toy_fastvit(**options: Any) -> nn.Module:
    """MobileCLIP's image tower in small: branches to be merged, convolutions, attention in the last stage."""
    own = {name: options[name] for name in ("num_classes", "global_pool") if name in options}
    positions: Any = (None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7)))
    model: Any = FastVit(
        layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), mlp_ratios=(2, 2, 2, 2),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"), se_downsamples=(False, False, True, True),
        pos_embs=positions, **own,
    )  # fmt: skip
    model.default_cfg = {"input_size": (3, 64, 64)}
    made: nn.Module = model
    return made


def _timm(name: str, size: int, pool: str, proj: str | None = "linear") -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}


FAMILIES: dict[str, dict[str, Any]] = {
    "openai-vit": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "timm-vit": {"embed_dim": 16, "vision_cfg": _timm("test_vit", 160, "token"), "text_cfg": _TEXT},
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "convnext": {"embed_dim": 16, "vision_cfg": _timm("test_convnext", 32, ""), "text_cfg": _TEXT},
    "siglip": {
        **_CUSTOM,
        "embed_dim": 96,
        "init_logit_bias": -10,
        "vision_cfg": _timm("test_vit3", 160, "map", "none"),
        "text_cfg": {**_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "eva": {**_CUSTOM, "vision_cfg": _timm("toy_eva", 28, "token", None), "text_cfg": _TEXT},
    "mobileclip": {
        **_CUSTOM,
        "vision_cfg": _timm("toy_fastvit", 64, "avg"),
        "text_cfg": {**_TEXT, "no_causal_mask": True},
    },
    "coca": {
        **_CUSTOM,
        "vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "attn_pooler_heads": 2},
    },
}

# As the families' own tags prepare images.
_SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
_OPENAI = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
PREPROCESSING = {
    "siglip": _SIGLIP,
    "mobileclip": {**_OPENAI, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
}


def randomise(model: nn.Module) -> nn.Module:
    """The model, every weight moved: zero-initialised layers and fresh statistics would hide what is left out."""
    with torch.no_grad():
        for parameter in model.parameters():  # some are left uninitialised until weights are loaded
            parameter.copy_(
                torch.nan_to_num(parameter, 0.0, 0.0, 0.0).clamp(-9, 9) + 0.05 * torch.randn_like(parameter)
            )
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def family_folder(family: str, folder: Path) -> str:
    """Writes a family's small model; the name that loads it."""
    config = FAMILIES[family]
    size = config["vision_cfg"]["image_size"]
    preprocess = {**PREPROCESSING.get(family, _OPENAI), "size": [size, size]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
