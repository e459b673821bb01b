"""Pillow, imported on first use so that importing the runtime stays cheap."""

import errno
import os
from importlib import import_module
from threading import Lock
from types import ModuleType

from fastfsl.errors import ConfigError, ResourceError, resource_error

# Pillow's modules that read files. The compiled ones come first: where one of them cannot be imported, whatever the
# reason, the module that needs it takes its format for one that this build of Pillow lacks.
_COMPILED = ("_webp", "_avif")
_READERS = ("Jpeg", "Mpo", "Png", "WebP", "Bmp", "Gif", "Tiff", "Ppm", "Jpeg2K", "Avif")
_SHORTAGES = os.strerror(errno.EMFILE), os.strerror(errno.ENFILE), os.strerror(errno.ENOMEM)

_loading = Lock()
_loaded: list[bool] = []


def pillow() -> ModuleType:
    """The module PIL.Image.

    Raises:
        ConfigError: Pillow is not installed.
        ResourceError: the machine has no file handles or memory left to import it.
    """
    try:
        from PIL import Image
    except (ImportError, OSError, MemoryError) as error:
        raise _shortage(error, "Pillow") or ConfigError(
            "images need Pillow: pip install 'fastfsl[cpu]' or 'fastfsl[gpu]'"
        ) from error
    return Image


def load_formats() -> None:
    """Import, once, Pillow's modules that read files.

    Pillow itself passes over a format whose module cannot be imported, and would then take its files for damaged ones
    as long as the process lives.

    Raises:
        ResourceError: the machine has no file handles or memory left to import one.
    """
    if _loaded:
        return
    with _loading:
        for name in (*_COMPILED, *(f"{reader}ImagePlugin" for reader in _READERS)):
            try:
                import_module(f"PIL.{name}")
            except (ImportError, OSError, MemoryError) as error:
                fault = _shortage(error, f"PIL.{name}")
                if fault is not None:
                    raise fault from error
                # This build of Pillow lacks it, or a library that it needs.
        _loaded.append(True)


def load_optional(name: str) -> ModuleType | None:
    """A module that reads one more format; None where it is not installed or cannot be imported.

    Raises:
        ResourceError: the machine has no file handles or memory left to import it.
    """
    try:
        return import_module(name)
    except (ImportError, OSError, MemoryError) as error:
        fault = _shortage(error, name)
        if fault is not None:
            raise fault from error
        return None


def _shortage(error: BaseException, module: str) -> ResourceError | None:
    if isinstance(error, ImportError):
        short = any(reason in str(error) for reason in _SHORTAGES)
        return ResourceError(f"cannot load {module}: {error}; raise the limit (ulimit -n, -v)") if short else None
    return resource_error(error, f"load {module}")
