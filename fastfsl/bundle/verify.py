"""Checking that the files of a bundle are the ones its manifest lists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastfsl.bundle.links import resolve
from fastfsl.bundle.manifest import Manifest, read_manifest
from fastfsl.bundle.paths import CARD, MANIFEST_NAME, check_relative_path
from fastfsl.bundle.untrusted import AGAIN, MAX_FILE_BYTES, hash_regular, read_regular, wrong_size
from fastfsl.errors import BundleError

# Kubernetes' link to the folder that holds a volume's files.
_MOUNTED = "..data"


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

    The model card, which bundles of older versions list, may be edited or missing.

    Raises:
        BundleError: as ``check_bundle``.
    """
    if name == CARD:
        return
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    found = hash_regular(path, MAX_FILE_BYTES, expected_size=size, lies_at=resolve(bundle_dir, name))
    _compare(path, (size, sha256), found)


def read_file(bundle_dir: str | os.PathLike[str], manifest: Manifest, name: str) -> bytes:
    """The contents of one listed file, checked: what is returned is what was hashed, even if the disk changes.

    Raises:
        BundleError: as ``check_bundle``; or the manifest does not list the file.
    """
    path, size, sha256 = _locate(Path(bundle_dir), manifest, name)
    data = read_regular(path, MAX_FILE_BYTES, expected_size=size, lies_at=resolve(bundle_dir, name))
    _compare(path, (size, sha256), (len(data), hashlib.sha256(data).hexdigest()))
    return data


def unlisted_files(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """What lies in a bundle's folder without being a part of it, in order. None of it is ever loaded.

    The model card does not count. Of hidden folders, such as ``.git``, and of linked ones that hold nothing of the
    bundle, the name alone is given.
    """
    return sorted(_unlisted(Path(bundle_dir), "", {CARD, MANIFEST_NAME, *manifest.files}))


def unverified_files(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """``unlisted_files``, and the model card if there is one: what may change without a word from ``check_bundle``."""
    card = [CARD] if os.path.lexists(Path(bundle_dir, CARD)) else []
    return sorted([*card, *unlisted_files(bundle_dir, manifest)])


def _unlisted(folder: Path, prefix: str, known: set[str]) -> Iterator[str]:
    with os.scandir(folder) as found:
        entries = list(found)
    mounted = not prefix and any(entry.name == _MOUNTED and entry.is_symlink() for entry in entries)
    for entry in entries:
        name = prefix + entry.name
        if mounted and entry.name.startswith(".."):  # what a mounted volume's links lead to
            continue
        holds_known = any(one.startswith(f"{name}/") for one in known)
        if _is_folder(entry) and (holds_known or not (entry.is_symlink() or entry.name.startswith("."))):
            yield from _unlisted(Path(entry.path), f"{name}/", known)
        elif name not in known:
            yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _locate(bundle_dir: Path, manifest: Manifest, name: str) -> tuple[Path, int, str]:
    """Path, size and sha256 of a listed file."""
    if name not in manifest.files:
        raise BundleError(f"{bundle_dir}: the manifest lists no {name}; {AGAIN}")
    check_relative_path(name, bundle_dir / MANIFEST_NAME)
    entry = manifest.files[name]
    return Path(bundle_dir, *name.split("/")), entry["size"], entry["sha256"]


def _compare(path: Path, expected: tuple[int, str], found: tuple[int, str]) -> None:
    if found[0] != expected[0]:
        raise wrong_size(path, expected[0], found[0])
    if found[1] != expected[1]:
        raise BundleError(f"{path}: altered: expected sha256 {expected[1]}, got {found[1]}; {AGAIN}")
