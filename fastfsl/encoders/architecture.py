"""Fit a checkpoint to an open_clip model, or say why it does not fit and which model it looks like."""

import re
from collections.abc import Mapping
from typing import Any

import open_clip
import torch

from fastfsl.encoders.checkpoint_file import Checkpoint
from fastfsl.errors import ConfigError

_SCALARS = ("logit_scale", "logit_bias")  # stored as () or (1,), depending on the version


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, backbone: str) -> None:
    """Put a checkpoint's weights into a model: every entry or an error.

    State dicts in other layouts that open_clip knows (separate text tower, MobileCLIP, ...) go through its converter. A
    position embedding of another size is refused: open_clip would interpolate it without a word.

    Args:
        model: Model as open_clip made it.
        checkpoint: What was read from the file.
        backbone: The model's name, for messages.

    Raises:
        ConfigError: Missing or unexpected entries, or shapes that differ; counts, examples and the likely model.
    """
    expected = model.state_dict()
    state_dict = dict(checkpoint.state_dict)
    for name in _SCALARS:
        if name in state_dict and name in expected and state_dict[name].numel() == 1:
            state_dict[name] = state_dict[name].reshape(expected[name].shape)
    misshapen = [name for name in state_dict if name in expected and state_dict[name].shape != expected[name].shape]
    missing, unexpected = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    if not (misshapen or missing or unexpected):
        model.load_state_dict(state_dict)
        return
    message = _misfit(checkpoint, backbone, expected, state_dict)
    if misshapen or checkpoint.is_torchscript:
        raise ConfigError(message)
    try:
        open_clip.load_checkpoint(model, str(checkpoint.path), strict=True, weights_only=True)
    except Exception as error:  # its converters expect particular models and raise all kinds on others
        raise ConfigError(message) from error


def models_like(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names of the open_clip models whose sizes are those of a state dict; plain names before -quickgelu ones."""
    try:
        measures = _measures(state_dict)
    except (KeyError, IndexError, ValueError):
        return ()
    names = [name for name in open_clip.list_models() if _config_measures(open_clip.get_model_config(name)) == measures]
    return tuple(sorted(names, key=lambda name: (name.endswith("-quickgelu"), len(name), name)))


def _misfit(
    checkpoint: Checkpoint,
    backbone: str,
    expected: Mapping[str, torch.Tensor],
    state_dict: Mapping[str, torch.Tensor],
) -> str:
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    parts = [
        _counted([name for name in expected if name not in state_dict], "missing entries"),
        _counted([name for name in state_dict if name not in expected], "unexpected entries"),
        _counted(misshapen, "entries of another shape"),
    ]
    message = f"checkpoint {checkpoint.path} does not fit {backbone}: {'; '.join(part for part in parts if part)}"
    if any(name.startswith(("vision_model.", "text_model.")) for name in state_dict):
        return f"{message}. It is in the layout of transformers: get the open_clip version of these weights"
    alike = [name for name in models_like(state_dict) if name != backbone]
    if checkpoint.quick_gelu:
        alike = [name for name in alike if name.endswith("-quickgelu")] or alike
    if alike:
        return f"{message}. It looks like {alike[0]}: --backbone {alike[0]}"
    return f"{message}. Name the model that it was saved from"


def _counted(names: list[str], what: str) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _measures(state_dict: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Embedding width, image tower, text tower; what a state dict of open_clip's own towers shows of them."""
    text = {name.removeprefix("text."): tensor for name, tensor in state_dict.items() if not name.startswith("visual.")}
    text_measures = (
        *text["positional_embedding"].shape,
        text["token_embedding.weight"].shape[0],
        _count(text, r"transformer\.resblocks\.(\d+)\."),
    )
    if "visual.proj" in state_dict:
        width, embed_dim = state_dict["visual.proj"].shape
        patch_size = state_dict["visual.conv1.weight"].shape[-1]
        grid = round((state_dict["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        layers: Any = _count(state_dict, r"visual\.transformer\.resblocks\.(\d+)\.")
        return embed_dim, (width, layers, patch_size, patch_size * grid), text_measures
    layers = tuple(_count(state_dict, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    width = state_dict["visual.layer1.0.conv1.weight"].shape[0]
    positions = state_dict["visual.attnpool.positional_embedding"].shape[0]
    embed_dim = state_dict["visual.attnpool.c_proj.weight"].shape[0]
    return embed_dim, (width, layers, None, round((positions - 1) ** 0.5) * 32), text_measures


def _config_measures(config: Mapping[str, Any]) -> tuple[Any, ...]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text:
        return ()
    layers = vision.get("layers", 12)
    is_resnet = isinstance(layers, list)
    return (
        config["embed_dim"],
        (
            vision.get("width", 64 if is_resnet else 768),
            tuple(layers) if is_resnet else layers,
            None if is_resnet else vision.get("patch_size", 16),
            vision.get("image_size", 224),
        ),
        (text.get("context_length", 77), text.get("width", 512), text.get("vocab_size", 49408), text.get("layers", 12)),
    )


def _count(names: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})
