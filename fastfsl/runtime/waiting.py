"""Waiting that Ctrl-C ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# A signal that comes just before a thread begins to wait is seen only when the wait is over, so none may be long.
SECONDS_BETWEEN_LOOKS = 0.1


def wait_for(condition: threading.Condition, true: Callable[[], bool], seconds: float | None) -> bool:
    """As `condition.wait_for`, without end where `seconds` is None, but open to signals."""
    until = None if seconds is None else time.monotonic() + seconds
    while not true():
        left = SECONDS_BETWEEN_LOOKS if until is None else min(until - time.monotonic(), SECONDS_BETWEEN_LOOKS)
        if left <= 0:
            return False
        condition.wait(left)
    return True
