"""Checking that the files of a bundle are the ones its manifest lists."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fastfsl.bundle.manifest import Manifest, read_manifest
from fastfsl.bundle.paths import MANIFEST_NAME, check_relative_path
from fastfsl.bundle.untrusted import AGAIN, MAX_FILE_BYTES, hash_regular, read_regular, wrong_size
from fastfsl.errors import BundleError


def check_bundle(bundle_dir: str | os.PathLike[str], manifest: Manifest | None = None) -> Manifest:
    """Check the manifest, and that every file it lists lies in the bundle with the recorded size and sha256.

    Returns:
        The manifest.

    Raises:
        BundleError: names the first file that is missing, truncated, altered or outside the bundle.
    """
    manifest = read_manifest(bundle_dir) if manifest is None else manifest
    for name in manifest.files:
        check_file(bundle_dir, manifest, name)
    return manifest


def check_file(bundle_dir: str | os.PathLike[str], manifest: Manifest, name: str) -> None:
    """Check one listed file's place, size and sha256 without holding it in memory.

    Raises:
        BundleError: as ``check_bundle``.
    """
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    _compare(path, (size, sha256), hash_regular(path, MAX_FILE_BYTES, expected_size=size))


def read_file(bundle_dir: str | os.PathLike[str], manifest: Manifest, name: str) -> bytes:
    """The contents of one listed file, checked: what is returned is what was hashed, even if the disk changes.

    Raises:
        BundleError: as ``check_bundle``; or the manifest does not list the file.
    """
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    data = read_regular(path, MAX_FILE_BYTES, expected_size=size)
    _compare(path, (size, sha256), (len(data), hashlib.sha256(data).hexdigest()))
    return data


def unlisted_files(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """What lies in a bundle's folder without being a part of it, in order. None of it is ever loaded."""
    folder, known = Path(bundle_dir), {MANIFEST_NAME, *manifest.files}
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(set(found) - known)


def _locate(bundle_dir: Path, manifest: Manifest, name: str) -> tuple[Path, int, str]:
    """Path, size and sha256 of a listed file. No part of the path below the bundle may be a link."""
    if name not in manifest.files:
        raise BundleError(f"{bundle_dir}: the manifest lists no {name}; {AGAIN}")
    check_relative_path(name, bundle_dir / MANIFEST_NAME)
    path = bundle_dir
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path}: a symbolic link, which could leave the bundle; copy the file itself (cp -rL)")
    entry = manifest.files[name]
    return path, entry["size"], entry["sha256"]


def _compare(path: Path, expected: tuple[int, str], found: tuple[int, str]) -> None:
    if found[0] != expected[0]:
        raise wrong_size(path, expected[0], found[0])
    if found[1] != expected[1]:
        raise BundleError(f"{path}: altered: expected sha256 {expected[1]}, got {found[1]}; {AGAIN}")
