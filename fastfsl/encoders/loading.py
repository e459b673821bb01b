"""Load any open_clip model by name, and its weights by tag or from a file.

QuickGELU. OpenAI's weights (and a few others) were trained with x·sigmoid(1.702x) in place of GELU. A model with the
wrong one runs without an error and is several points worse, and the weights themselves do not show it. open_clip 3.3
only warns (`pretrained="openai"` with the plain name "ViT-B-32" gives the GELU model), so the choice is made here:
whenever a tag or a file says that it needs QuickGELU, the -quickgelu architecture is loaded, for a file with a warning
if the plain one was named. A bare state dict says nothing; name the -quickgelu backbone for it.
"""

import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from fastfsl.backbones import HUB, LOCAL, QUICK, TINY_CLIP, Catalogue, check_backbone, clean_tag, model_name
from fastfsl.devices import resolve_device
from fastfsl.downloads import cached_only_if_offline, require_repository, require_weights
from fastfsl.encoders.architecture import load_weights
from fastfsl.encoders.checkpoint_file import Checkpoint, read_checkpoint
from fastfsl.encoders.encoder import Encoder, weights_digest
from fastfsl.errors import ConfigError, memory_error, resource_error
from fastfsl.images import Preprocessing

_log = logging.getLogger(__name__)

_TINY_CLIP_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "tiny_clip"


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
    check_backbone(backbone, pretrained, Catalogue(open_clip.list_models(), _tags))
    if backbone == TINY_CLIP or backbone.startswith((LOCAL, HUB)):
        return _plan_from_source(backbone, pretrained)
    name, weights = model_name(backbone), str(pretrained)
    tag = clean_tag(weights)
    if tag in _tags(name):
        require_weights(name, tag, _tags(name)[tag])
        return _with_quick_gelu(_Plan(name, name, tag=tag), needed=_tag_needs_quick_gelu(name, tag))
    checkpoint = read_checkpoint(weights)
    plan = _Plan(name, name, checkpoint=checkpoint)
    return _with_quick_gelu(plan, needed=checkpoint.quick_gelu)


def _tags(name: str) -> dict[str, dict[str, Any]]:
    return {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}


def _plan_from_source(backbone: str, pretrained: str | None) -> _Plan:
    """A backbone that says itself where its configuration, and by default its weights, lie."""
    source = f"{LOCAL}{_TINY_CLIP_FOLDER}" if backbone == TINY_CLIP else backbone
    if pretrained is None and source.startswith(LOCAL):
        pretrained = str(_weights_in(Path(source.removeprefix(LOCAL))))
    if source.startswith(HUB):
        require_repository(source, with_weights=pretrained is None)
    if pretrained is None:
        return _Plan(backbone, source)
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
    quick = plan.source + QUICK
    if plan.checkpoint is None:
        _log.info("weights %s were trained with QuickGELU: loading %s%s", plan.tag, plan.backbone, QUICK)
    else:
        warnings.warn(
            f"weights {plan.checkpoint.path} were trained with QuickGELU ({plan.checkpoint.reason}): "
            f"loading them as {plan.backbone}{QUICK}, not {plan.backbone}",
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
        with _quiet(), _network(plan):
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
    if plan.source.startswith(HUB):
        return (
            f"{plan.backbone} could not be downloaded or loaded ({reason}): check the name and the network, or fetch "
            f"the repository elsewhere and pass it as --backbone {LOCAL}FOLDER"
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
            f"beside the file and load it as {LOCAL}FOLDER",
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
        with _quiet(), _network(plan):
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


@contextmanager
def _network(plan: _Plan) -> Iterator[None]:
    """Without a network take what is cached, and do not retry; asked only where something may have to be fetched."""
    with ExitStack() as stack:
        text = _config(plan).get("text_cfg", {})
        if plan.tag is not None or plan.source.startswith(HUB) or any(key.startswith("hf_") for key in text):
            stack.enter_context(cached_only_if_offline())
        yield


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
