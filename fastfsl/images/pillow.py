"""Pillow, imported on first use so that importing the runtime stays cheap."""

from types import ModuleType

from fastfsl.errors import ConfigError


def pillow() -> ModuleType:
    """The module PIL.Image.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images need Pillow: pip install 'fastfsl[cpu]' or 'fastfsl[gpu]'") from error
    return Image
