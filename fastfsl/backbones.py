"""Which backbones and weights open_clip knows, asked without importing it: a wrong name is answered at once.

open_clip imports torch, which takes seconds. Its names of models are the names of its configuration files, and its tags
stand in one dictionary of its source. `fastfsl.encoders` asks open_clip itself, with the same checks.
"""

import ast
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastfsl.errors import ConfigError

TINY_CLIP = "tiny-clip"
LOCAL, HUB, QUICK = "local-dir:", "hf-hub:", "-quickgelu"


@dataclass(frozen=True)
class Catalogue:
    """Models and their published weights.

    Attributes:
        models: Names.
        tags: Of a model's name: by tag where its weights lie (`url`, `hf_hub`) and whether they need QuickGELU.
    """

    models: Sequence[str]
    tags: Callable[[str], Mapping[str, Mapping[str, Any]]]


@cache
def installed_catalogue() -> Catalogue | None:
    """The catalogue of the open_clip that is installed; None if its files are not as expected."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    models = sorted(file.stem for file in (folder / "model_configs").glob("*.json"))
    try:
        tags = _read_tags(ast.parse((folder / "pretrained.py").read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return None
    if not models or not tags:
        return None
    for name, known in list(tags.items()):  # as open_clip registers them
        quick = {tag: where for tag, where in known.items() if where.get("quick_gelu")}
        if quick:
            tags[name + QUICK] = quick
    return Catalogue(models, lambda name: tags.get(name, {}))


def check_backbone(backbone: str, pretrained: str | None, catalogue: Catalogue) -> None:
    """Refuse a backbone or weights that there are not. Nothing is loaded.

    Args:
        backbone: A model's name, "hf-hub:ORG/REPO", "local-dir:PATH" or "tiny-clip".
        pretrained: A tag of the model, a checkpoint file, or None.
        catalogue: What there is.

    Raises:
        ConfigError: Naming what was probably meant.
    """
    if backbone == TINY_CLIP or backbone.startswith((LOCAL, HUB)):
        _check_source(backbone, pretrained)
        return
    name = model_name(backbone)
    if name not in catalogue.models:
        advice = _close(name, catalogue.models)
        if is_file(Path(backbone) / "open_clip_config.json"):
            advice = f"it is a model folder; write {LOCAL}{backbone}"
        raise ConfigError(f"unknown backbone {backbone!r}: {advice}")
    tags = list(catalogue.tags(name))
    if pretrained is None:
        known = f"a tag ({', '.join(tags[:6])}{', ...' if len(tags) > 6 else ''})" if tags else "a tag (it has none)"
        raise ConfigError(f"backbone {name} needs weights: --pretrained with {known} or a local checkpoint file")
    if clean_tag(pretrained) not in tags and not is_file(pretrained):
        raise ConfigError(_unknown_weights(name, pretrained, catalogue))


def model_name(backbone: str) -> str:
    """open_clip's name of a backbone: OpenAI writes ViT-B/16."""
    return backbone.replace("/", "-")


def clean_tag(tag: str) -> str:
    """A tag as open_clip spells it."""
    return tag.lower().replace("-", "_")


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False for what cannot be a path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL
        return False


def _check_source(backbone: str, pretrained: str | None) -> None:
    """A backbone that says itself where its configuration, and by default its weights, lie."""
    if backbone.startswith(LOCAL):
        config_file = Path(backbone.removeprefix(LOCAL)) / "open_clip_config.json"
        if not is_file(config_file):
            raise ConfigError(f"backbone {backbone}: {config_file} is missing; expected a model folder of open_clip")
    if pretrained is not None and not is_file(pretrained):
        raise ConfigError(
            f"backbone {backbone} has its own weights; {pretrained!r} is no local checkpoint file to take instead, "
            "and tags go with open_clip's model names"
        )


def _unknown_weights(name: str, pretrained: str, catalogue: Catalogue) -> str:
    looks_like_file = (
        "/" in pretrained
        or "\\" in pretrained
        or Path(pretrained).suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}
    )
    if looks_like_file:
        return f"checkpoint file {pretrained} does not exist"
    plain, tags = name.removesuffix(QUICK), list(catalogue.tags(name))
    if plain != name and clean_tag(pretrained) in catalogue.tags(plain):
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


def _read_tags(module: ast.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """The dictionary `_PRETRAINED`: by model, by tag, the plain values that its entry is made with."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for node in module.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if isinstance(node.value, ast.Call):
            groups[node.targets[0].id] = _group(node.value)
        elif node.targets[0].id == "_PRETRAINED" and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if not isinstance(key, ast.Constant):
                    continue
                if isinstance(value, ast.Name) and value.id in groups:
                    found[str(key.value)] = dict(groups[value.id])
                elif isinstance(value, ast.Call):
                    found[str(key.value)] = _group(value)
    return found


def _group(call: ast.Call) -> dict[str, dict[str, Any]]:
    """`dict(tag=_pcfg(url=..., quick_gelu=True), ...)` as tag -> plain keyword arguments."""
    return {
        tag.arg: {
            option.arg: option.value.value
            for option in tag.value.keywords
            if option.arg is not None and isinstance(option.value, ast.Constant)
        }
        for tag in call.keywords
        if tag.arg is not None and isinstance(tag.value, ast.Call)
    }
