"""Hidden folders that outputs are made in, and what becomes of those whose process was killed.

An output ``NAME`` is made inside ``.NAME.partial-xxxxxxxx`` beside it, a folder with a lock file. The lock goes with
the process, however it ends, so a later run tells what is abandoned from what is being written. A folder is left alone
where the lock says nothing: another machine's on a shared disk, or one on a disk without locks; unless nothing in it
has changed for a week.
"""

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

# Names inside such a folder: its lock file, an output folder that is being made, and the one that it replaces.
_OWNER, NEW, OLD = ".fastfsl-owner", "new", "old"

_NAME = re.compile(r"\.(.+)\.(?:partial|old)-[0-9a-f]{8}", re.DOTALL)
_ABANDONED_SECONDS = 7 * 24 * 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# A sweeper holds another one's lock for a moment, to see whether it can.
_LOCK_ATTEMPTS, _LOCK_PAUSE = 50, 0.02


@contextlib.contextmanager
def staging_area(target: Path) -> Iterator[Path]:
    """A locked folder beside `target`, removed when the block ends; an old output that lies in it alone is put back.

    Raises:
        OSError: it cannot be made.
    """
    folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        with _claim(folder / _OWNER):
            yield folder
    finally:
        with contextlib.suppress(OSError):
            _clear(folder, target)


def sweep_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder`, and put back outputs that they had moved aside.

    What belongs to a living process, or cannot be told or removed, stays.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, match[1]) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    except OSError:  # whoever writes there says why
        return
    for name, target in found:
        with contextlib.suppress(OSError):
            if _is_abandoned(folder / name):
                _clear(folder / name, folder / target)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is, or was, the beginning of an output."""
    return _NAME.fullmatch(name) is not None


def _clear(folder: Path, target: Path) -> None:
    """Put back the old output if it is the only one, then remove the rest."""
    if folder.is_symlink():
        return
    old = folder if folder.name.startswith(f".{target.name}.{OLD}-") else folder / OLD
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        file = (folder / _OWNER).open("r+b")
    except (FileNotFoundError, NotADirectoryError):  # of an older version, or killed before it was there
        return _is_untouched(folder)
    with file:
        locked = _lock(file)
        if locked is False:
            return False
        try:
            owner = json.loads(file.read())
            trusted = bool(locked and owner["locked"] and owner["kernel"] == _kernel())
        except (ValueError, TypeError, KeyError):  # killed before it was written
            trusted = False
    return trusted or _is_untouched(folder)


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    with path.open("x+b") as file:
        locked = _lock(file)
        for _ in range(_LOCK_ATTEMPTS):
            if locked is not False:
                break
            time.sleep(_LOCK_PAUSE)
            locked = _lock(file)
        about = {"kernel": _kernel(), "locked": bool(locked), "host": platform.node(), "pid": os.getpid()}
        file.write(json.dumps(about).encode())
        file.flush()
        yield


def _lock(file: IO[bytes]) -> bool | None:
    """True: it is ours until it is closed. False: somebody holds it. None: there are no locks on this disk."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return _lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_on_windows(file: IO[bytes]) -> bool | None:
    import importlib

    msvcrt = importlib.import_module("msvcrt")
    try:
        # A byte far behind the text, which others may then read.
        file.seek(2**20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        file.seek(0)
    return True


@cache
def _kernel() -> str:
    """A name for what sees the same locks: one boot of one machine, whatever containers it runs."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # no Linux
        return platform.node()


def _is_untouched(path: Path) -> bool:
    newest = max(max(status.st_mtime, status.st_ctime) for status in map(os.lstat, (path, *path.rglob("*"))))
    return time.time() - newest > _ABANDONED_SECONDS
