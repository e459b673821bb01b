"""Read the weights out of a checkpoint file without running anything in it.

Recognised by content, never by file name: safetensors; torch's own format, loaded weights-only, bare or wrapped in
{"state_dict": ...}; and the TorchScript archives that OpenAI published CLIP in, which `torch.load` cannot read.
"""

import json
import pickle  # noqa: TID251  # only for the type of its exception: nothing is unpickled here
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastfsl.errors import ConfigError, resource_error

# OpenAI's archives carry these three numbers beside the weights; open_clip's own models have no such entries.
OPENAI_EXTRAS = frozenset({"input_resolution", "context_length", "vocab_size"})

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, training frameworks
_NAME_KEYS = ("model", "model_name", "arch", "architecture", "backbone", "name")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        path: The file.
        state_dict: Tensors by name, prefixes of wrappers removed.
        quick_gelu: The file itself says that its model was trained with QuickGELU: it is OpenAI's, its metadata name
            such a model, or the `open_clip_config.json` beside it says so. False only means that it does not say: a
            bare state dict cannot.
        reason: How `quick_gelu` is known, for messages.
        is_torchscript: It was a TorchScript archive.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    quick_gelu: bool
    reason: str
    is_torchscript: bool


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file.

    Args:
        path: safetensors file, torch file (.pt, .pth, .bin) or one of OpenAI's TorchScript archives.

    Raises:
        ConfigError: Missing, empty or damaged file, a pickle that holds more than tensors, no tensors in it, or NaN or
            infinite weights.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise resource_error(error, f"read {path}") or ConfigError(
            f"checkpoint {path} cannot be read: {error.strerror or error}"
        ) from error
    is_torchscript = False
    metadata: dict[str, Any] = {}
    content: object
    if head.startswith(b"PK") and _is_torchscript(path):
        is_torchscript = True
        content = _read_torchscript(path)
    elif len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        content, metadata = _read_safetensors(path)
    elif size:
        content = _read_torch(path)
    else:
        raise ConfigError(f"checkpoint {path} is empty: download or save it again")
    state_dict, outer = _unwrap(path, content)
    reason = _quick_gelu_reason(path, state_dict, metadata | outer)
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in OPENAI_EXTRAS}
    _check_finite(path, state_dict)
    return Checkpoint(path, state_dict, bool(reason), reason, is_torchscript)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"checkpoint {path} is a damaged archive ({error}): download or save it again") from error
    # torch.save writes neither; torch.jit.save writes both.
    return any("/code/" in name for name in names) and any(name.endswith("/constants.pkl") for name in names)


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    remedy = (
        "in an environment whose torch reads it, run safetensors.torch.save_file(torch.jit.load(file).state_dict(), "
        "'weights.safetensors') and pass that with a -quickgelu backbone"
    )
    load = getattr(getattr(torch, "jit", None), "load", None)
    if load is None:
        raise ConfigError(f"{path} is a TorchScript archive, which torch {torch.__version__} no longer reads: {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit announces its retirement
            state_dict: dict[str, torch.Tensor] = dict(load(str(path), map_location="cpu").state_dict())
    except Exception as error:  # TorchScript's reader raises many types on damaged archives
        raise resource_error(error, f"read {path}") or ConfigError(
            f"{path} is a TorchScript archive that cannot be read ({_first_line(error)}): {remedy}"
        ) from error
    if not state_dict.keys() >= OPENAI_EXTRAS:
        raise ConfigError(
            f"{path} is a TorchScript archive, but not one of OpenAI's, so nothing tells which activation (GELU or "
            "QuickGELU) its weights need: save the state dict of the model it was traced from and pass that"
        )
    return state_dict


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise resource_error(error, f"read {path}") or ConfigError(
            f"{path} is a damaged safetensors file ({_first_line(error)}): download or save it again"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        # An open file, because torch.load would choose the format by a path's extension.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # remarks on old pickle protocols
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} is no weights-only checkpoint: it is damaged, something else, or a pickle that holds more than "
            "tensors, which is never unpickled because that can run code; save model.state_dict(), best as safetensors"
        ) from error
    except Exception as error:  # torch.load raises many types on damaged files
        raise resource_error(error, f"read {path}") or ConfigError(
            f"checkpoint {path} cannot be read ({_first_line(error)}): expected safetensors or a torch state dict; "
            "download or save it again"
        ) from error


def _unwrap(path: Path, content: object) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The innermost dictionary of tensors with bare names, and what was beside it."""
    outer: dict[str, Any] = {}
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        outer |= {key: value for key, value in content.items() if isinstance(key, str)}
        content = inner
    if not isinstance(content, Mapping):
        raise ConfigError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of tensors")
    state_dict = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not state_dict:
        raise ConfigError(f"checkpoint {path} holds no tensors: expected a state dict of a CLIP model")
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state_dict)), None):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict, outer


def _quick_gelu_reason(path: Path, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    if state_dict.keys() >= OPENAI_EXTRAS:
        return "it is one of OpenAI's"
    if str(metadata.get("quick_gelu", "")).lower() in {"true", "1"}:
        return "its metadata say quick_gelu"
    for key in _NAME_KEYS:
        if isinstance(name := metadata.get(key), str) and "quickgelu" in name.lower():
            return f"its metadata name the model {name!r}"
    beside = path.parent / "open_clip_config.json"
    try:
        config = json.loads(beside.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return ""
    model_config = config.get("model_cfg") if isinstance(config, dict) else None
    if isinstance(model_config, dict) and model_config.get("quick_gelu") is True:
        return f"{beside} says quick_gelu"
    return ""


def _check_finite(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"checkpoint {path}: {name} has NaN or infinite values; download or save it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
