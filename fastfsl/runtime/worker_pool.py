"""A thread pool that an interpreter may end with.

The standard library's pool is waited for before anything else when the interpreter ends, with all that is queued in it:
after Ctrl-C a batcher with twenty thousand images would go on for as long as they take, and a program whose main thread
ends while others go on serving could not hand it work any more. The threads of this one do not hold up the end; when
everything else is over, what they are doing is waited for. And in a child that was forked it begins anew.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from fastfsl.errors import ClosedError
from fastfsl.runtime.forking import reset_in_child
from fastfsl.runtime.waiting import SECONDS_BETWEEN_LOOKS

P = ParamSpec("P")
T = TypeVar("T")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_Jobs = queue.SimpleQueue[_Job | None]


class WorkerPool:
    """Runs calls on up to so many threads, which begin with the first calls and end with the pool.

    Args:
        size: most threads.
        name: their names begin with it.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._closed = False
        self.after_fork()
        reset_in_child(self)
        _pools.add(self)

    def after_fork(self) -> None:
        """No threads, no jobs: those there were are the other process's."""
        self._lock = threading.Lock()
        self._idle = threading.Semaphore(0)
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # The threads know the queue and not the pool, so a pool that nobody refers to ends.
        weakref.finalize(self, _end_threads, self._jobs, self._threads).atexit = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function on one of the threads.

        Returns:
            A future of its result.

        Raises:
            ClosedError: the pool is shut down.
            RuntimeError: it has no thread yet and none can be started.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ClosedError("its threads have ended: the classifier is closed, or the interpreter is ending")
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
                self._start_thread()
            self._jobs.put((future, function, args, kwargs))
        return future

    def shutdown(self, *, wait: bool = True, cancel_futures: bool = False) -> None:
        """Take nothing more, and let the threads end after what they have. It may be called twice.

        Args:
            wait: until they have ended, but for the one that this is called on.
            cancel_futures: cancel what has not begun.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            threads = list(self._threads)
            if cancel_futures:
                cancelled = _drained(self._jobs)
            if not closed or cancel_futures:
                _end_threads(self._jobs, threads)
        if cancel_futures:
            for job in cancelled:
                job[0].cancel()
        for thread in threads if wait else ():
            if thread is not threading.current_thread():
                while thread.is_alive():
                    thread.join(SECONDS_BETWEEN_LOOKS)

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=_serve, args=(self._jobs, self._idle), name=f"{self._name}_{len(self._threads)}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            return
        self._threads.append(thread)


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _serve(jobs: _Jobs, idle: threading.Semaphore) -> None:
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            idle.release()
            job = jobs.get()
        if job is None:
            return
        _run(*job)
        del job  # which knows its result


def _run(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
        future.set_exception(error)
        del future, function, args, kwargs  # the error knows this frame, and would keep them
    else:
        future.set_result(result)


def _drained(jobs: _Jobs) -> list[_Job]:
    found = []
    with suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                found.append(job)
    return found


def _end_threads(jobs: _Jobs, threads: list[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)


@atexit.register
def _end() -> None:
    """Native code must not be running when the interpreter is taken down: it would come back to nothing."""
    for pool in list(_pools):
        pool.shutdown()
