"""The command that comes next, as it can be pasted into a shell."""

import os
import shlex
from collections.abc import Mapping
from typing import Any


def command(*words: object) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(map(str, words))


def free_name(name: str) -> str:
    """A folder's name that is not taken in the working folder, for a command that makes it."""
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next((candidate for candidate in names if not os.path.lexists(candidate)), name)


def data_options(config: Mapping[str, Any]) -> list[str]:
    """How the data were read, as options of every command that reads them.

    Args:
        config: fields of `TrainConfig`, by name; one that is not there has its default.
    """
    options = {
        "--classes": None if config.get("classes") == "all" else config.get("classes"),
        "--image-root": config.get("image_root"),
        "--path-column": config.get("path_column"),
        "--label-column": config.get("label_column"),
        "--split-column": config.get("split_column"),
    }
    return [str(word) for option, value in options.items() if value is not None for word in (option, value)]


def encoder_options(config: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """Which encoder it was, as options of train and compare.

    Args:
        config: fields of `TrainConfig`, by name.
        default: those that need not be said.
    """
    words = []
    for option, field in (("--backbone", "backbone"), ("--pretrained", "pretrained"), ("--template", "templates")):
        value = config.get(field)
        if value is not None and value != default.get(field):
            words += [word for one in ([value] if isinstance(value, str) else value) for word in (option, one)]
    return words
