"""Load any open_clip model by name, and its weights by tag or from a file.

QuickGELU. OpenAI's weights (and a few others) were trained with x·sigmoid(1.702x) in place of GELU. A model with the
wrong one runs without an error and is several points worse, and the weights themselves do not show it. open_clip 3.3
only warns (`pretrained="openai"` with the plain name "ViT-B-32" gives the GELU model), so the choice is made here:
whenever a tag or a file says that it needs QuickGELU, the -quickgelu architecture is loaded, for a file with a warning
if the plain one was named. A bare state dict says nothing; name the -quickgelu backbone for it.
"""

import difflib
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from fastfsl.devices import resolve_device
from fastfsl.encoders.architecture import load_weights
from fastfsl.encoders.checkpoint_file import Checkpoint, read_checkpoint
from fastfsl.encoders.encoder import Encoder, weights_digest
from fastfsl.errors import ConfigError, memory_error, resource_error
from fastfsl.images import Preprocessing

TINY_CLIP = "tiny-clip"

_log = logging.getLogger(__name__)

_TINY_CLIP_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "tiny_clip"
_LOCAL, _HUB = "local-dir:", "hf-hub:"
_QUICK = "-quickgelu"


@dataclass(frozen=True)
class _Plan:
    """What to ask of open_clip."""

    backbone: str  # as the encoder will be called
    source: str  # open_clip's model name
    tag: str | None = None
    checkpoint: Checkpoint | None = None
    force_quick_gelu: bool = False


def load_encoder(backbone: str, pretrained: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """Load a CLIP model, frozen, in fp32 and evaluation mode.

    Args:
        backbone: An open_clip model name ("ViT-B-16"), "hf-hub:ORG/REPO", "local-dir:PATH" (a folder with
            open_clip_config.json and weights), or "tiny-clip", the one in this package.
        pretrained: A tag of that model ("openai", "laion2b_s34b_b79k") or a local checkpoint file. None for backbones
            that bring their weights along.
        device: "cpu", "cuda", "cuda:1", or "auto".

    Returns:
        The encoder.

    Raises:
        ConfigError: Unknown model or tag, weights that cannot be downloaded, read or fitted, or no weights named.
        DeviceError: The device is not there.
    """
    target = resolve_device(device)
    plan = _plan(backbone, None if pretrained is None else str(pretrained))
    model, transform = _create(plan)
    if plan.checkpoint is not None:
        load_weights(model, plan.checkpoint, plan.backbone)
    model.eval().requires_grad_(requires_grad=False)
    config = open_clip.get_model_config(plan.source)
    if plan.force_quick_gelu:
        config["quick_gelu"] = True
    encoder = Encoder(
        model=model,
        tokenizer=_tokenizer(plan),
        preprocessing=_preprocessing(open_clip.get_model_preprocess_cfg(model)),
        transform=transform,
        backbone=plan.backbone,
        pretrained=None if pretrained is None else str(pretrained),
        digest=weights_digest(model, config),
        embed_dim=int(config["embed_dim"]),
        logit_scale=float(model.get_parameter("logit_scale").exp()),
        device=torch.device("cpu"),
    )
    return encoder.to(target)


def _plan(backbone: str, pretrained: str | None) -> _Plan:
    if backbone == TINY_CLIP or backbone.startswith((_LOCAL, _HUB)):
        return _plan_from_source(backbone, pretrained)
    name = backbone.replace("/", "-")  # OpenAI writes ViT-B/16
    models = open_clip.list_models()
    if name not in models:
        advice = _close(name, models)
        if _is_file(Path(backbone) / "open_clip_config.json"):
            advice = f"it is a model folder; write {_LOCAL}{backbone}"
        raise ConfigError(f"unknown backbone {backbone!r}: {advice}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"a tag ({', '.join(tags[:6])}{', ...' if len(tags) > 6 else ''})" if tags else "a tag (it has none)"
        raise ConfigError(f"backbone {name} needs weights: --pretrained with {known} or a local checkpoint file")
    tag = pretrained.lower().replace("-", "_")
    if tag in tags:
        return _with_quick_gelu(_Plan(name, name, tag=tag), needed=_tag_needs_quick_gelu(name, tag))
    if _is_file(pretrained):
        checkpoint = read_checkpoint(pretrained)
        plan = _Plan(name, name, checkpoint=checkpoint)
        return _with_quick_gelu(plan, needed=checkpoint.quick_gelu)
    raise ConfigError(_unknown_weights(name, pretrained, tags))


def _plan_from_source(backbone: str, pretrained: str | None) -> _Plan:
    """A backbone that says itself where its configuration, and by default its weights, lie."""
    source = f"{_LOCAL}{_TINY_CLIP_FOLDER}" if backbone == TINY_CLIP else backbone
    if source.startswith(_LOCAL):
        config_file = Path(source.removeprefix(_LOCAL)) / "open_clip_config.json"
        if not _is_file(config_file):
            raise ConfigError(f"backbone {backbone}: {config_file} is missing; expected a model folder of open_clip")
    if pretrained is None and source.startswith(_LOCAL):
        pretrained = str(_weights_in(Path(source.removeprefix(_LOCAL))))
    if pretrained is None:
        return _Plan(backbone, source)
    if not _is_file(pretrained):
        raise ConfigError(
            f"backbone {backbone} has its own weights; {pretrained!r} is no local checkpoint file to take instead, "
            "and tags go with open_clip's model names"
        )
    checkpoint = read_checkpoint(pretrained)
    plan = _Plan(backbone, source, checkpoint=checkpoint)
    return _with_quick_gelu(plan, needed=checkpoint.quick_gelu)


def _weights_in(folder: Path) -> Path:
    """The one weights file of a model folder, under open_clip's name or any other; safetensors before pickles."""
    for pattern in ("open_clip*.safetensors", "*.safetensors", "open_clip*.bin", "*.bin", "*.pth", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ConfigError(f"{folder} holds several checkpoints ({names}): choose one with --pretrained FILE")
    raise ConfigError(f"{folder} holds no weights: expected open_clip_model.safetensors beside open_clip_config.json")


def _with_quick_gelu(plan: _Plan, *, needed: bool) -> _Plan:
    if not needed or _config(plan).get("quick_gelu", False):
        return plan
    quick = plan.source + _QUICK
    if plan.checkpoint is None:
        _log.info("weights %s were trained with QuickGELU: loading %s%s", plan.tag, plan.backbone, _QUICK)
    else:
        warnings.warn(
            f"weights {plan.checkpoint.path} were trained with QuickGELU ({plan.checkpoint.reason}): "
            f"loading them as {plan.backbone}{_QUICK}, not {plan.backbone}",
            stacklevel=4,
        )
    if quick in open_clip.list_models():
        return replace(plan, backbone=quick, source=quick)
    return replace(plan, force_quick_gelu=True)


def _tag_needs_quick_gelu(name: str, tag: str) -> bool:
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))


def _create(plan: _Plan) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
    options: dict[str, Any] = {}
    if plan.checkpoint is not None:
        # Text towers of transformers would first fetch their own weights, only to lose them to the checkpoint's.
        options = {"load_weights": False, "pretrained_text": False, **_preprocessing_of_tags(plan)}
    else:
        options = {"require_pretrained": True}
    try:
        with _quiet():
            model, _, transform = open_clip.create_model_and_transforms(
                plan.source, plan.tag, precision="fp32", device="cpu", force_quick_gelu=plan.force_quick_gelu, **options
            )
    except Exception as error:  # a wrong configuration, the network, a missing package: open_clip raises all kinds
        if isinstance(error, MemoryError):
            raise memory_error(f"create {plan.backbone}") from error
        raise ConfigError(_why_not_created(plan, error)) from error
    return model, transform


def _why_not_created(plan: _Plan, error: Exception) -> str:
    reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
    if plan.tag is not None:
        return (
            f"weights {plan.tag!r} of {plan.source} could not be downloaded or loaded ({reason}): check the network, "
            "or fetch the file elsewhere and pass it with --pretrained FILE"
        )
    if plan.source.startswith(_HUB):
        return (
            f"{plan.backbone} could not be downloaded or loaded ({reason}): check the name and the network, or fetch "
            f"the repository elsewhere and pass it as --backbone {_LOCAL}FOLDER"
        )
    return f"the model {plan.backbone} could not be made ({reason}): check its configuration"


def _preprocessing_of_tags(plan: _Plan) -> dict[str, Any]:
    """How the images of a checkpoint *file* are prepared: as for the tags of that model.

    open_clip would take OpenAI's mean and standard deviation for any file, which is wrong for SigLIP and others.
    """
    tags = open_clip.list_pretrained_tags_by_model(plan.source)
    configs = [open_clip.get_pretrained_cfg(plan.source, tag) for tag in tags]
    if plan.checkpoint is not None and plan.checkpoint.is_torchscript:
        configs = [config for tag, config in zip(tags, configs, strict=True) if tag == "openai"]
    keys = ("mean", "std", "interpolation", "resize_mode")
    known = [{f"image_{key}": config[key] for key in keys if config.get(key) is not None} for config in configs]
    if not known:
        return {}
    if any(other != known[0] for other in known):
        warnings.warn(
            f"the published weights of {plan.source} do not all prepare images alike, and a file does not say how its "
            "own do: taking open_clip's default; if that is wrong, put an open_clip_config.json with a preprocess_cfg "
            f"beside the file and load it as {_LOCAL}FOLDER",
            stacklevel=5,
        )
        return {}
    return known[0]


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    return Preprocessing(
        image_size=config["size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        resize_mode=config["resize_mode"],
        fill_color=config["fill_color"],
    )


def _tokenizer(plan: _Plan) -> Callable[[Sequence[str]], torch.Tensor]:
    try:
        with _quiet():
            tokenizer: Callable[[Sequence[str]], torch.Tensor] = open_clip.get_tokenizer(plan.source)
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the tokenizer of {plan.backbone} could not be loaded ({error}): it may need the network or the package "
            "transformers"
        ) from error
    return tokenizer


def _config(plan: _Plan) -> dict[str, Any]:
    try:
        config = open_clip.get_model_config(plan.source)
    except (OSError, ValueError) as error:
        raise resource_error(error, f"read the configuration of {plan.backbone}") or ConfigError(
            f"the configuration of {plan.backbone} cannot be read: {error}"
        ) from error
    return config if isinstance(config, dict) else {}


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL
        return False


def _unknown_weights(name: str, pretrained: str, tags: Sequence[str]) -> str:
    looks_like_file = (
        "/" in pretrained
        or "\\" in pretrained
        or Path(pretrained).suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}
    )
    if looks_like_file:
        return f"checkpoint file {pretrained} does not exist"
    plain = name.removesuffix(_QUICK)
    if plain != name and pretrained.lower().replace("-", "_") in open_clip.list_pretrained_tags_by_model(plain):
        return f"weights {pretrained!r} were trained without QuickGELU: use --backbone {plain}"
    if not tags:
        return f"backbone {name} has no published weights, so no tag {pretrained!r}: pass a local checkpoint file"
    return f"backbone {name} has no weights {pretrained!r}, and no such file exists: {_close(pretrained, tags)}"


def _close(name: str, known: Iterable[str]) -> str:
    known = list(known)
    by_key = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_key, n=4, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(by_key[key] for key in close)}?"
    return f"expected one of {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's remarks off the root logger: what matters of them is an error or a warning of ours."""

    def not_from_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root = logging.getLogger()
    root.addFilter(not_from_open_clip)
    # Without a handler on the root logger, open_clip's logging.info() would install one for the whole program.
    silent = logging.NullHandler()
    root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        root.removeHandler(silent)
        root.removeFilter(not_from_open_clip)
