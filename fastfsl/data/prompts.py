"""Prompt templates: what is put around a class name before CLIP's text encoder reads it."""

import difflib
from collections.abc import Sequence
from types import MappingProxyType

from fastfsl.errors import ConfigError, DataError

TEMPLATES = MappingProxyType(
    {
        "generic": ("a photo of a {}.",),
        # Seven of the eighty ImageNet prompts, which OpenAI found to do nearly as well as all of them
        # (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", prompt notebook).
        "ensemble": (
            "itap of a {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
        ),
        # The single prompts of the eleven standard sets (Zhou et al., "Learning to Prompt for Vision-Language Models").
        "imagenet": ("a photo of a {}.",),
        "caltech101": ("a photo of a {}.",),
        "oxford-pets": ("a photo of a {}, a type of pet.",),
        "stanford-cars": ("a photo of a {}.",),
        "flowers102": ("a photo of a {}, a type of flower.",),
        "food101": ("a photo of {}, a type of food.",),
        "fgvc-aircraft": ("a photo of a {}, a type of aircraft.",),
        "sun397": ("a photo of a {}.",),
        "dtd": ("{} texture.",),
        "eurosat": ("a centered satellite photo of {}.",),
        "ucf101": ("a photo of a person doing {}.",),
    }
)


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Turn a preset's name or the user's own templates into checked templates.

    Args:
        templates: A key of `TEMPLATES`, one template, or several.

    Returns:
        The templates; each holds "{}" exactly once, where the class name goes.

    Raises:
        ConfigError: Unknown preset, no template at all, or a template without exactly one "{}".
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{" not in templates and "}" not in templates:
            close = difflib.get_close_matches(templates, TEMPLATES, n=3)
            guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
            raise ConfigError(
                f"unknown prompt preset {templates!r}{guess} Presets: {', '.join(TEMPLATES)}; "
                'or write your own with "{}" where the class name goes'
            )
        templates = (templates,)
    checked = tuple(templates)
    if not checked:
        raise ConfigError('no prompt template given: expected at least one, such as "a photo of a {}."')
    for template in checked:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise ConfigError(f'prompt template {template!r}: expected "{{}}" exactly once and no other braces')
    return checked


def clean_class_name(name: str) -> str:
    """A folder's or file's class name as words: underscores turn into spaces, runs of blanks into one.

    Raises:
        DataError: Nothing is left.
    """
    words = " ".join(name.replace("_", " ").split())
    if not words:
        raise DataError(f"class name {name!r} holds no word")
    return words


def fill(templates: Sequence[str], class_name: str) -> tuple[str, ...]:
    """One prompt per template, with the cleaned class name in place of "{}"."""
    words = clean_class_name(class_name)
    return tuple(template.replace("{}", words) for template in templates)
