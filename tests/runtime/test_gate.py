"""Nobody gets in after the end, and what is shared is let go of once, by the last one out."""

from __future__ import annotations

import threading

import pytest

from fastfsl.errors import ClosedError
from fastfsl.runtime.gate import Gate

LONG = 10.0


def test_closing_waits_for_the_calls_in_progress_and_releases_once():
    released: list[str] = []
    gate = Gate("thing", lambda: released.append(threading.current_thread().name))
    inside, leave = threading.Event(), threading.Event()

    def call():
        with gate.call():
            inside.set()
            leave.wait(LONG)
            with gate.call():  # within a call that began before the end
                assert not released

    caller = threading.Thread(target=call)
    closers = [threading.Thread(target=gate.close) for _ in range(4)]
    caller.start()
    assert inside.wait(LONG)
    for closer in closers:
        closer.start()
    while not gate._closed:
        closers[0].join(0.001)
    with pytest.raises(ClosedError, match="the thing is closed"), gate.call():
        pass
    assert not released
    leave.set()
    for thread in (caller, *closers):
        thread.join(LONG)
        assert not thread.is_alive()
    assert len(released) == 1
    gate.close()
    assert len(released) == 1


def test_closing_from_within_a_call_does_not_wait_for_itself():
    released: list[int] = []
    gate = Gate("thing", lambda: released.append(1))
    with gate.call():
        gate.close()
        assert not released
    assert released == [1]


def test_a_call_that_fails_is_over():
    gate = Gate("thing", lambda: None)
    with pytest.raises(ValueError, match="x"), gate.call():
        raise ValueError("x")
    gate.close()
