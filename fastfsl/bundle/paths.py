"""The paths that a manifest may list: inside the bundle, and the same file on every operating system."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from fastfsl.errors import BundleError

MANIFEST_NAME = "manifest.json"

# The model card, which its readers may edit: no part of what is listed and verified.
CARD = "README.md"

# A part of a listed path, and those that some system takes for a device whatever follows the dot.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(?<!\.)", re.ASCII)
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.ASCII | re.IGNORECASE)


def check_relative_path(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse whatever could mean a file outside the bundle, or another one than it seems to, on any operating system.

    That leaves parts of ASCII letters, digits, and ``. _ + -`` in between: no signs that look alike or that a file
    system folds together, no name of a device, nothing that ends in a dot.
    """
    harmless = len(name) <= 255 and name != MANIFEST_NAME
    if not harmless or not all(_PART.fullmatch(part) and not _DEVICE.fullmatch(part) for part in name.split("/")):
        raise BundleError(
            f"{path}: the listed file {name!r:.80} is no path inside the bundle; do not trust this bundle"
        )


def check_paths(names: Collection[str], path: str | os.PathLike[str]) -> None:
    """Each name is harmless, and together they can lie on a file system that ignores capitals."""
    for name in names:
        check_relative_path(name, path)
    folded = {name.casefold(): name for name in (*names, MANIFEST_NAME)}
    if len(folded) <= len(names):
        raise BundleError(f"{path}: two listed files differ in capitals alone; do not trust this bundle")
    for name in names:
        parts = name.casefold().split("/")
        if any("/".join(parts[:end]) in folded for end in range(1, len(parts))):
            raise BundleError(f"{path}: the listed file {name!r} lies below another one; do not trust this bundle")
