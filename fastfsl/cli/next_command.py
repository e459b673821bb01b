"""The command that comes next, as it can be pasted into a shell."""

import os
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastfsl.fit.config import TrainConfig


def command(*words: object) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(map(str, words))


def free_name(name: str) -> str:
    """A folder's name that is not taken in the working folder, for a command that makes it."""
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next((candidate for candidate in names if not os.path.lexists(candidate)), name)


def data_options(config: "TrainConfig") -> list[str]:
    """How the data were read, as options of every command that reads them."""
    given = {
        "--classes": None if config.classes == "all" else config.classes,
        "--image-root": config.image_root,
        "--path-column": config.path_column,
        "--label-column": config.label_column,
        "--split-column": config.split_column,
    }
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def encoder_options(config: "TrainConfig") -> list[str]:
    """Which encoder it was, as options of train and compare; the defaults are left out."""
    default = type(config)()
    templates = [config.templates] if isinstance(config.templates, str) else config.templates
    words = [] if config.backbone == default.backbone else ["--backbone", config.backbone]
    words += [] if config.pretrained is None else ["--pretrained", config.pretrained]
    if config.templates != default.templates:
        words += [word for template in templates for word in ("--template", template)]
    return words
