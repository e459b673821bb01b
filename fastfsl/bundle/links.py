"""Which file a path of a bundle is, where caches and clusters put links in its place.

The Hugging Face hub's cache keeps files under ``REPOSITORY/blobs`` and makes ``REPOSITORY/snapshots/REVISION`` of links
to them. Kubernetes mounts a volume as links into ``..data``, itself a link to a folder beside it. A link is followed as
long as its target lies in the bundle's own folder or in those blobs; what is read there is held to the manifest's size
and hash as any other file is. Another link could name any file of the machine, and is refused.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fastfsl.errors import BundleError, resource_error

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def resolve(bundle_dir: str | os.PathLike[str], name: str) -> Path:
    """Where a bundle's file really lies; the path itself where no part of it below the bundle is a link.

    The caller opens it without following a link, so one that takes the file's place in between is not followed.

    Args:
        bundle_dir: the bundle's folder, which may be a link itself.
        name: relative path, with slashes.

    Raises:
        BundleError: a link leads nowhere, to itself or elsewhere. A file that is missing is not looked for here.
        ResourceError: the machine cannot say.
    """
    path = Path(bundle_dir, *name.split("/"))
    if not _has_link(Path(bundle_dir), name):
        return path
    try:
        root = Path(os.path.realpath(bundle_dir, strict=True))
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise BundleError(
                f"{path}: a symbolic link that leads nowhere; download the bundle again (git annex get, git lfs pull)"
            ) from error
        raise resource_error(error, f"read {path}") or BundleError(
            f"{path}: a symbolic link that cannot be followed ({error.strerror or error}); copy the file itself "
            "(cp -rL)"
        ) from error
    if not any(target.is_relative_to(folder) for folder in (root, *_blobs_of(root))):
        raise BundleError(f"{path}: a symbolic link that leaves the bundle, to {target}; copy the file itself (cp -rL)")
    return target


def _blobs_of(root: Path) -> tuple[Path, ...]:
    """The blobs that a snapshot's links may lead to: those of the same repository."""
    for folder in root.parents:
        if folder.name == _SNAPSHOTS:
            return (folder.parent / _BLOBS,)
    return ()


def _has_link(folder: Path, name: str) -> bool:
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            return True
    return False
