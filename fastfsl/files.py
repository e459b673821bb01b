"""Outputs that are never half there: written under a temporary name beside the target, then renamed onto it."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastfsl.errors import ConfigError

# File systems allow 255 bytes a name; the temporary name adds some of its own.
_MAX_NAME = 230

# A full disk is met wherever something is written, and does not name the file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` to write to; renamed onto `target` when the block ends without an error.

    Args:
        target: the file to make or replace.

    Yields:
        The path to write to; it does not exist yet.

    Raises:
        ConfigError: if the file cannot be written.
    """
    target = _absolute(target)
    staging = _sibling(target, "partial")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _writing(target):
            yield staging
            staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def staged_directory(target: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` to fill; renamed onto `target` when the block ends without an error.

    An error or Ctrl-C inside the block leaves `target` as it was and removes the temporary folder.

    Args:
        target: the folder to make.
        marker: the file that tells one of our folders from the user's; only such a folder (or an empty one) is ever
            replaced.
        force: replace an existing `target`; it stays in place until the new one is complete.

    Yields:
        An empty folder.

    Raises:
        ConfigError: if `target` exists and may not be replaced, or it cannot be written.
    """
    target = _absolute(target)
    check_output(target, marker=marker, force=force)
    staging = _sibling(target, "partial")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        try:
            yield staging
        except OSError as error:
            if error.errno not in _DISK_ERRORS and not str(error.filename).startswith(str(staging)):
                raise
            raise _cannot_write(target, error) from error
        check_output(target, marker=marker, force=force)
        with _writing(target):
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(target: Path, *, marker: str, force: bool = False) -> None:
    """Refuse, before any work is done, an output folder that exists or could not be written.

    Raises:
        ConfigError: naming the path and what to do.
    """
    if os.path.lexists(target):
        if not force:
            raise ConfigError(f"expected a new output, but {target} exists: choose another name or pass --force")
        ours = target.is_dir() and not target.is_symlink() and (target / marker).is_file()
        if not ours and not (target.is_dir() and not any(target.iterdir())):
            raise ConfigError(f"{target} exists and holds no {marker}, so it is not replaced: choose another output")
    if len(os.fsencode(target.name)) > _MAX_NAME:
        raise ConfigError(f"cannot write {target}: its name is too long for a file system; choose another output")
    parent = next(folder for folder in _absolute(target).parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {target}: {parent} is not a writable folder; choose another output")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {target}: {error.strerror or error}; choose another output")


def _replace(staging: Path, target: Path) -> None:
    """Rename `staging` onto `target`; an old target is moved aside first and comes back if that fails."""
    if not target.is_dir():
        staging.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))


def _sibling(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}-{secrets.token_hex(4)}")
