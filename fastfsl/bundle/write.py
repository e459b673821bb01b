"""Writing a bundle whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastfsl.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from fastfsl.bundle.untrusted import hash_file
from fastfsl.errors import BundleError, ConfigError
from fastfsl.files import check_output, staged_directory


@contextlib.contextmanager
def staging_folder(directory: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A hidden, empty sibling of ``directory`` to prepare a bundle in; removed at the end unless it was moved.

    Enter it before the long work: an output that exists or cannot be written is refused here.

    Raises:
        ConfigError: see ``write_bundle``.
    """
    target = Path(os.path.normpath(Path(directory).absolute()))
    check_output(target, marker=MANIFEST_NAME, force=force)
    staging = target.with_name(f".{target.name}.staging-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}; choose another output") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_bundle(
    directory: str | os.PathLike[str], manifest_fields: Mapping[str, Any], staging: Path, *, force: bool = False
) -> Manifest:
    """Hash the staged files, write the manifest last, and move everything onto ``directory`` in one rename.

    Args:
        directory: where the bundle goes.
        manifest_fields: the fields of ``Manifest`` but ``format_version`` and ``files``; ``created`` may be left out.
        staging: folder with the bundle's other files, on the same file system (``staging_folder`` makes one). It is
            moved away.
        force: replace a bundle (or an empty folder) that is there. Anything else is never deleted.

    Raises:
        ConfigError: the output exists, or cannot be written.
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
    with staged_directory(Path(directory), marker=MANIFEST_NAME, force=force) as complete:
        try:
            (staging / MANIFEST_NAME).write_bytes(manifest.to_json())
            complete.rmdir()
            staging.rename(complete)
        except OSError as error:
            raise ConfigError(f"cannot write {directory}: {error.strerror or error}; choose another output") from error
    return manifest


def _hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise BundleError(f"{path}: only regular files and folders can be part of a bundle")
        if path.is_file() and path != folder / MANIFEST_NAME:
            size, sha256 = hash_file(path)
            entries[path.relative_to(folder).as_posix()] = {"sha256": sha256, "size": size}
    return entries
