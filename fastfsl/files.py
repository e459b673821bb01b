"""Outputs that are never half there: written under a temporary name beside the target, then renamed onto it."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastfsl.errors import ConfigError, FastFSLError, resource_error
from fastfsl.leftovers import NEW, OLD, staging_area, sweep_leftovers

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
        The path to write to; it does not exist yet. It has the name of `target`, in a folder of its own.

    Raises:
        ConfigError: if the file cannot be written.
        ResourceError: if the machine, not the place, is the reason.
    """
    target = _absolute(target)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(target.parent)
        with staging_area(target) as area:
            staging = area / target.name
            yield staging
            staging.replace(target)


@contextmanager
def staged_directory(target: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` to fill; renamed onto `target` when the block ends without an error.

    An error or Ctrl-C inside the block leaves `target` as it was and removes the temporary folder. After `kill -9`
    the next run with an output in the same folder does both.

    Args:
        target: the folder to make.
        marker: the file that tells one of our folders from the user's; only such a folder (or an empty one) is ever
            replaced.
        force: replace an existing `target`; it stays in place until the new one is complete.

    Yields:
        An empty folder.

    Raises:
        ConfigError: if `target` exists and may not be replaced, or it cannot be written.
        ResourceError: if the machine, not the place, is the reason.
    """
    target = _absolute(target)
    check_output(target, marker=marker, force=force)
    with ExitStack() as stack:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            area = stack.enter_context(staging_area(target))
            staging = area / NEW
            staging.mkdir()
        try:
            yield staging
        except OSError as error:
            if error.errno not in _DISK_ERRORS and not str(error.filename).startswith(str(staging)):
                raise
            raise _cannot_write(target, error) from error
        check_output(target, marker=marker, force=force)
        with _writing(target):
            _replace(staging, target, area / OLD)


def check_output(target: Path, *, marker: str, force: bool = False) -> None:
    """Refuse, before any work is done, an output folder that exists or could not be written.

    What killed runs left beside it is removed first, and an output that one of them had moved aside comes back.

    Raises:
        ConfigError: naming the path and what to do.
    """
    sweep_leftovers(_absolute(target).parent)
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


def _cannot_write(target: Path, error: OSError) -> FastFSLError:
    if error.errno in _DISK_ERRORS:
        return ConfigError(
            f"cannot write {target}: {error.strerror or error}; free some space, or choose another output"
        )
    return resource_error(error, f"write {target}") or ConfigError(
        f"cannot write {target}: {error.strerror or error}; choose another output"
    )


def _replace(staging: Path, target: Path, old: Path) -> None:
    """Rename `staging` onto `target`; an old target is moved to `old` first and comes back if that fails."""
    if not target.is_dir():
        staging.rename(target)
        return
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        try:
            old.rename(target)
        except OSError as error:
            raise ConfigError(
                f"cannot write {target}, nor put back what was there ({error.strerror or error}): it lies in "
                f"{old}, and the next run puts it back"
            ) from error
        raise


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))
