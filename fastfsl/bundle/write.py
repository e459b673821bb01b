"""Writing a bundle whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastfsl.bundle.manifest import FORMAT_VERSION, Manifest
from fastfsl.bundle.paths import CARD, MANIFEST_NAME
from fastfsl.bundle.untrusted import MAX_FILE_BYTES, hash_regular
from fastfsl.errors import BundleError
from fastfsl.files import staged_directory


@contextlib.contextmanager
def staging_folder(directory: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """An empty folder to put a bundle's files in; it becomes ``directory`` when the block ends, sealed.

    Enter it before the long work: an output that exists or cannot be written is refused here. An error inside the
    block, or a block that ends without ``seal_bundle``, leaves nothing behind.

    Args:
        directory: where the bundle goes.
        force: replace a bundle (or an empty folder) that is there. Anything else is never deleted.

    Raises:
        ConfigError: the output exists, or cannot be written.
        BundleError: the block did not seal the bundle.
    """
    with staged_directory(Path(directory), marker=MANIFEST_NAME, force=force) as staging:
        yield staging
        if not (staging / MANIFEST_NAME).is_file():
            raise BundleError(f"{directory}: nothing was written, because the bundle was not sealed")


def seal_bundle(staging: Path, manifest_fields: Mapping[str, Any]) -> Manifest:
    """Hash the staged files and write the manifest, the last thing that happens to a bundle.

    Args:
        staging: the folder that ``staging_folder`` gave, with the bundle's other files. The model card is not hashed.
        manifest_fields: the fields of ``Manifest`` but ``format_version`` and ``files``; ``created`` may be left out.

    Raises:
        BundleError: the fields do not make a valid manifest, or a staged file is not a regular file.
    """
    values = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **manifest_fields,
        "format_version": FORMAT_VERSION,
        "files": _hash_folder(staging),
    }
    try:
        encoded = json.dumps(values, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest's fields must be finite JSON values: {error}") from error
    manifest = Manifest.from_json(encoded)
    (staging / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise BundleError(f"{path}: only regular files and folders can be part of a bundle")
        if path.is_file() and path not in (folder / MANIFEST_NAME, folder / CARD):
            size, sha256 = hash_regular(path, MAX_FILE_BYTES)
            entries[path.relative_to(folder).as_posix()] = {"sha256": sha256, "size": size}
    return entries
