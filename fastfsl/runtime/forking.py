"""What a child that was forked needs before it goes on: new locks, no half-done work, and nothing of ONNX Runtime.

A child gets a copy of the memory, but of the threads only the one that forked. So a lock that another thread held is
locked for ever, a thread pool has no threads, and the same is true within the libraries. Seen with ONNX Runtime 1.32 on
Linux, in the child:

- an inherited session of several threads hangs now and then when it computes (1 of 24), and one of four threads crashes
  when it is deleted (10 of 10);
- a new session is right, unless another thread was making one when the process forked (1 of 400 hung) or held the lock
  of an arena that both share (2 of 600);
- the end of the process hangs, even if it did nothing but import onnxruntime before it forked: the library waits for
  its telemetry's thread. Without telemetry it does not.

So `undisturbed` marks the moments in which a library holds locks of its own, and a fork waits until they are over.
`reset_in_child` gives what has locks or threads the chance to make new ones. `keep_in_child` lets what must not be
deleted there live until the process ends. `without_telemetry` is for the import of onnxruntime, and where another
module imported it before, the child ends without the library's word.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

# A fork waits no longer than this, whatever a callback inside does: it may itself be waiting for who forks.
_MOST_SECONDS = 2.0
_TELEMETRY = "ORT_DISABLE_TELEMETRY"


class Resettable(Protocol):
    """An object with locks, threads or work in progress."""

    def after_fork(self) -> None:
        """Be usable in the child, or say that it is not; nothing else runs there yet."""
        ...


class _Moments:
    """The threads that must not be disturbed and how deep they are in it, and the threads that are about to fork."""

    def __init__(self, inside: dict[int, int]) -> None:
        self.inside = inside
        self.forking: set[int] = set()
        self.changed = threading.Condition()  # a signal may come while it is held, and its handler may fork

    def calm(self, thread: int) -> bool:
        return not self.inside.keys() - {thread}


class _Undisturbed:
    """No fork happens inside; it is entered in less than a microsecond, and may be within itself."""

    def __enter__(self) -> None:
        thread, moments = threading.get_ident(), _moments
        with moments.changed:
            if moments.forking and thread not in moments.inside:
                moments.changed.wait_for(lambda: not moments.forking - {thread}, _MOST_SECONDS)
            moments.inside[thread] = moments.inside.get(thread, 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, moments = threading.get_ident(), _moments
        with moments.changed:
            depth = moments.inside.pop(thread, 1) - 1
            if depth:
                moments.inside[thread] = depth
            if moments.forking:
                moments.changed.notify_all()


undisturbed = _Undisturbed()
_moments = _Moments({})
_to_reset: WeakSet[Resettable] = WeakSet()
_to_keep: WeakSet[Any] = WeakSet()
_forks = 0


def forks() -> int:
    """How many forks lie between this process and the one that imported this module."""
    return _forks


def reset_in_child(thing: Resettable) -> None:
    """Call its `after_fork` in every child that is forked while it lives."""
    _to_reset.add(thing)


def keep_in_child(thing: object) -> None:
    """Never delete it in a child that is forked while it lives, not even when that child's interpreter ends."""
    _to_keep.add(thing)


def keep_for_ever(thing: object) -> None:
    """Never delete it."""
    # A list would be emptied when the interpreter ends, and what it holds deleted.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def without_telemetry() -> None:
    """Let an onnxruntime that is imported after this start no thread for telemetry, unless the environment asks for it.

    What is read is the environment of the import; processes that are started from here inherit it.
    """
    if "onnxruntime" not in sys.modules:
        os.environ.setdefault(_TELEMETRY, "1")


def _end_without_handlers() -> None:
    """Let this process end without what libraries do at exit, but with its own status and Python's own end before."""
    with suppress(OSError, AttributeError):  # a C library that has no on_exit
        c_library = ctypes.CDLL(None)
        c_library.on_exit(ctypes.cast(c_library["_exit"], ctypes.c_void_p), None)


def _before() -> None:
    thread = threading.get_ident()
    with _moments.changed:
        _moments.forking.add(thread)
        _moments.changed.wait_for(lambda: _moments.calm(thread), _MOST_SECONDS)


def _in_parent() -> None:
    with _moments.changed:
        _moments.forking.discard(threading.get_ident())
        _moments.changed.notify_all()


def _in_child() -> None:
    global _moments, _forks  # noqa: PLW0603 - they are the process's own
    thread = threading.get_ident()
    depth = _moments.inside.get(thread)
    _moments = _Moments({} if depth is None else {thread: depth})
    _forks += 1
    for thing in list(_to_keep):
        keep_for_ever(thing)
    for resettable in list(_to_reset):
        resettable.after_fork()
    if "onnxruntime" in sys.modules and os.environ.get(_TELEMETRY, "0").lower() in ("", "0", "false"):
        _end_without_handlers()


# The end of the interpreter is such a moment too. Threads that it does not wait for would come back out of native code
# to an interpreter that is gone, and the program would be aborted. This module is imported before those that wait for
# what has begun, so its turn is after theirs.
atexit.register(_before)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
