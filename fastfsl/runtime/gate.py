"""What several threads share is let go of once the last of them is out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastfsl.errors import ClosedError
from fastfsl.runtime.forking import reset_in_child
from fastfsl.runtime.waiting import wait_for


class Gate:
    """Counts the calls in progress; after `close` nobody gets in, and the last one out releases what they shared.

    Args:
        what: how messages call the thing behind the gate.
        release: lets go of it; called once.
    """

    def __init__(self, what: str, release: Callable[[], None]) -> None:
        self._what = what
        self._release = release
        self._depth: dict[int, int] = {}
        self._closed = self._released = False
        self.after_fork()
        reset_in_child(self)

    def after_fork(self) -> None:
        """Of the calls in progress only those of the thread that forked go on in the child."""
        self._changed = threading.Condition()
        self._releasing = threading.RLock()
        thread = threading.get_ident()
        self._depth = {ident: depth for ident, depth in self._depth.items() if ident == thread}

    @contextmanager
    def call(self) -> Iterator[None]:
        """For the length of a call.

        Raises:
            ClosedError: the gate is closed.
        """
        thread = threading.get_ident()
        with self._changed:
            depth = self._depth.get(thread, 0)
            # A call within a call is part of it: what began before the end may come to its own.
            if self._closed and depth == 0:
                raise ClosedError(f"the {self._what} is closed; load it again")
            self._depth[thread] = depth + 1
        try:
            yield
        finally:
            with self._changed:
                if depth:
                    self._depth[thread] = depth
                else:
                    del self._depth[thread]
                last = not self._depth
                self._changed.notify_all()
                closed = self._closed
            if last and closed:
                self._release_once()

    def close(self, *, wait: bool = True) -> None:
        """Let nobody in, and wait for the calls in progress; from within one of them, do not wait. May be repeated."""
        with self._changed:
            self._closed = True
            if threading.get_ident() in self._depth:
                return
            if not wait_for(self._changed, lambda: not self._depth, None if wait else 0):
                return  # the last one out releases
        self._release_once()

    def _release_once(self) -> None:
        with self._releasing:
            if not self._released:
                self._released = True
                self._release()
