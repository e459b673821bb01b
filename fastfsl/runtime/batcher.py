"""Single images from many threads, computed in batches.

A request is accepted (or turned away at once), decoded on the pool of the image reader, and waits for a batch: one
worker takes up to `max_batch` of the requests that are ready, at the latest `max_delay_ms` after the first of them was.
Every accepted request is answered, or cancelled, exactly once. An interpreter that ends waits a second for the answers
that are still asked for, and cancels what has not begun by then; after an error that nobody caught, Ctrl-C for one, it
does not wait.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self
from weakref import WeakSet

import numpy as np

from fastfsl.errors import ClosedError, ConfigError, OverloadError
from fastfsl.runtime.failures import forget_locals
from fastfsl.runtime.forking import reset_in_child
from fastfsl.runtime.metrics import UNHEARD, Metrics
from fastfsl.runtime.session import check_count
from fastfsl.runtime.waiting import wait_for
from fastfsl.runtime.worker_pool import WorkerPool

if TYPE_CHECKING:
    from types import TracebackType

    from fastfsl.images import ImageSource
    from fastfsl.runtime.prediction import Prediction

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_DELAY_MS = 60_000

# A queue stays full for many requests in a row; one line of the log in so many seconds is enough.
_SECONDS_BETWEEN_WARNINGS = 10.0

# That the end of the interpreter waits for answers. Whoever wants all of them leaves the batcher's context.
_SECONDS_AT_THE_END = 1.0

_log = logging.getLogger("fastfsl.runtime")


class _Answer(Future["Prediction"]):
    """The future of a request."""

    def abandon(self, error: BaseException) -> None:
        """End in an error without telling anybody: in a child, where who was to hear of it is no more."""
        self._condition = threading.Condition()  # another thread may have held it when the process forked
        if not self.done():
            self._waiters.clear()
            self._done_callbacks: list[Any] = []
            self._exception = error
            self._state = "FINISHED"


@dataclass(eq=False)
class _Request:
    future: _Answer
    top_k: int
    accepted_at: float
    begun: bool = False
    decoding: Future[Any] | None = None
    pixels: Pixels | None = None
    ready_at: float = 0.0


class Batcher:
    """Takes single images from any number of threads; `Classifier.batcher` makes it. It is what `submit` calls itself.

    Args:
        decode: begins to prepare an image; the future's result is its pixels or its error.
        answer: predictions of stacked pixels (n, height, width, 3), with so many classes each.
        max_batch: most images computed at once.
        max_delay_ms: how long the first image of a batch waits for others, in milliseconds.
        max_queue: most requests accepted and not yet answered; each may hold its image.
        top_k: classes per image, where a request does not say.
        metrics: is told what happens.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        decode: Callable[[ImageSource], Future[Any]],
        answer: Callable[[Pixels, int], list[Prediction]],
        *,
        max_batch: int,
        max_delay_ms: float,
        max_queue: int,
        top_k: int,
        metrics: Metrics = UNHEARD,
    ) -> None:
        self._max_batch, self._max_queue, self._top_k = (
            check_count(name, value)
            for name, value in (("max_batch", max_batch), ("max_queue", max_queue), ("top_k", top_k))
        )
        self._max_delay = _check_delay(max_delay_ms) / 1000
        self._decode = decode
        self._answer = answer
        self._metrics = metrics
        # Accepted and not yet answered, and of those that have not begun the ones that are decoded, oldest first.
        self._requests: dict[Future[Prediction], _Request] = {}
        self._ready: dict[Future[Prediction], _Request] = {}
        self._closed: str | None = None  # why
        self._worker = WorkerPool(1, "fastfsl-batches")
        self._own = threading.local()
        self._turned_away, self._warned_at = 0, -_SECONDS_BETWEEN_WARNINGS
        self._new_locks()
        reset_in_child(self)
        _open.add(self)

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._more_ready = threading.Condition(self._lock)
        self._all_answered = threading.Condition(self._lock)
        self._working = False

    def after_fork(self) -> None:
        """In a child it is closed: whoever submits to it, and who waits for its answers, may be in the parent."""
        abandoned = [request.future for request in self._requests.values()]
        self._requests, self._ready = {}, {}
        self._closed = self._closed or (
            "this batcher is another process's, which forked; make one in this process with Classifier.batcher"
        )
        self._new_locks()
        error = ClosedError("this request is another process's, which forked; submit it again in this one")
        for future in abandoned:
            future.abandon(error)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError(
            "a batcher belongs to its process and can be neither pickled nor copied; send the Classifier, and make a "
            "batcher of it there"
        )

    def submit(self, image: ImageSource, *, top_k: int | None = None) -> Future[Prediction]:
        """Ask for one image; it must not be altered until the answer is there.

        Args:
            image: a path, bytes of an image file, a PIL image or a uint8 array (H, W, 3).
            top_k: classes wanted; None: the batcher's own.

        Returns:
            A future of the prediction. Its errors are those of `Classifier.predict`. It can be cancelled until its
            batch begins, which frees its place.

        Raises:
            OverloadError: the queue is full; nothing was accepted.
            ClosedError: the batcher is closed.
            ConfigError: an option is out of range.
        """
        wanted = self._top_k if top_k is None else check_count("top_k", top_k)
        future = _Answer()
        request = _Request(future, wanted, time.monotonic())
        future.add_done_callback(self._leave)
        try:  # wherever Ctrl-C comes, the request is accepted and returned, or not there
            with self._lock:
                if self._closed is not None:
                    raise ClosedError(self._closed)
                full = len(self._requests) >= self._max_queue
                if not full:
                    self._requests[future] = request
            if full:
                raise self._overload()
            decoding = request.decoding = self._decode(image)
            if future.cancelled():
                decoding.cancel()
            decoding.add_done_callback(partial(self._decoded, request))
        except BaseException:
            future.cancel()
            raise
        return future

    __call__ = submit

    @property
    def calling_back(self) -> bool:
        """Whether this is a callback of one of its futures."""
        return bool(getattr(self._own, "inside", False))

    @property
    def queue_depth(self) -> int:
        """Requests accepted and not yet answered."""
        return len(self._requests)

    def close(self, *, cancel_pending: bool = False, wait: bool = True) -> None:
        """Accept nothing more and wait until everything is answered.

        It may be called twice and from several threads. From a callback of one of its own futures it does not wait.
        Where Ctrl-C, or whatever else is no ordinary error, interrupts the wait, what has not begun is cancelled.

        Args:
            cancel_pending: cancel what has not begun, instead of computing it.
            wait: until everything is answered.
        """
        wait = wait and not self.calling_back
        try:
            self._shut(cancel_pending=cancel_pending)
            over = self._wait(None if wait else 0)
        except BaseException:
            self._shut(cancel_pending=True)
            raise
        if over:
            self._worker.shutdown(wait=wait)

    def end(self, seconds: float) -> int:
        """Close because the interpreter ends: wait so long, and cancel what has not begun; returns how many."""
        self._shut(cancel_pending=False)
        return 0 if self._wait(seconds) else self._shut(cancel_pending=True)

    def _shut(self, *, cancel_pending: bool) -> int:
        with self._lock:
            self._closed = self._closed or "the batcher is closed; make another one with Classifier.batcher"
            self._more_ready.notify_all()
            pending = [request for request in self._requests.values() if cancel_pending and not request.begun]
        return sum(request.future.cancel() for request in pending)

    def _wait(self, seconds: float | None) -> bool:
        with self._lock:
            return wait_for(self._all_answered, lambda: not self._requests, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel_pending=is_interruption(kind))

    def _overload(self) -> OverloadError:
        self._metrics.count("rejections")
        with self._lock:
            self._turned_away += 1
            now, turned_away = time.monotonic(), self._turned_away
            warn = now - self._warned_at >= _SECONDS_BETWEEN_WARNINGS
            if warn:
                self._turned_away, self._warned_at = 0, now
        if warn:
            _log.warning("the batcher's queue of %d is full: %d requests turned away", self._max_queue, turned_away)
        return OverloadError(
            f"max_queue={self._max_queue} requests are accepted and not yet answered; try again in a moment, send "
            "fewer at once, or raise max_queue if the wait and the memory allow it"
        )

    def _leave(self, future: Future[Prediction]) -> None:
        """The first callback of every future: its place is free before anybody hears of the answer."""
        with self._lock:
            request = self._requests.pop(future, None)
            if request is None:
                return  # it was not accepted
            self._ready.pop(future, None)
            cancelled = future.cancelled()
            if cancelled and not request.begun:
                request.begun = True
                future.set_running_or_notify_cancel()  # else `concurrent.futures.wait` would never hear of it
            over = self._closed is not None and not self._requests
            if over:
                self._all_answered.notify_all()
        if over:
            self._worker.shutdown(wait=False)
        if cancelled:
            self._metrics.count("cancellations")
            decoding = request.decoding
            if decoding is not None:
                decoding.cancel()

    def _begin(self, request: _Request) -> bool:
        """Take a request out of the queue, with the lock held; False: it was cancelled."""
        self._ready.pop(request.future, None)
        if request.begun or request.future not in self._requests:
            return False
        request.begun = True
        return request.future.set_running_or_notify_cancel()

    def _decoded(self, request: _Request, decoding: Future[Any]) -> None:
        request.decoding = None  # which knows this callback, and so the request and its pixels
        if decoding.cancelled():  # with its request, or because the pool ended
            outcome: Any = ClosedError("the classifier was closed before this image was read; load it again")
        else:
            outcome = decoding.exception() or decoding.result()
        if isinstance(outcome, BaseException):
            with self._lock:
                begun = self._begin(request)
            if begun:
                self._settle([request], outcome)
            return
        with self._lock:
            if request.begun or request.future not in self._requests:
                return
            request.pixels, request.ready_at = outcome, time.monotonic()
            self._ready[request.future] = request
            idle = not self._working
            self._working = True
            if len(self._ready) >= self._max_batch:
                self._more_ready.notify_all()
        if idle:
            try:
                self._worker.submit(self._work)
            except RuntimeError:  # the interpreter is ending, or no thread can be had: then on this one
                self._work()
            except BaseException:  # Ctrl-C: the next image that is ready has it done
                self._working = False
                raise

    def _work(self) -> None:
        while batch := self._next_batch():
            now = time.monotonic()
            for accepted_at in [request.accepted_at for request in batch]:
                self._metrics.observe("queue_wait_seconds", now - accepted_at)
            self._metrics.gauge("queue_depth", len(self._requests))
            self._settle(batch, self._outcome(batch))
            del batch  # an error knows this frame as well: no request may stay in it
            self._metrics.gauge("queue_depth", len(self._requests))

    def _outcome(self, batch: list[_Request]) -> list[Prediction] | BaseException:
        """The predictions of a batch, or why there are none."""
        try:
            pixels = np.stack([request.pixels for request in batch if request.pixels is not None])
            return self._answer(pixels, max(request.top_k for request in batch))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer to these requests
            failure = error
        pixels, batch = np.empty(0, np.uint8), []  # this frame still runs, and is not emptied
        forget_locals(failure)
        try:
            return failure
        finally:
            del failure  # the error knows this frame, which must not know the error

    def _next_batch(self) -> list[_Request]:
        """The requests to compute next, begun; none: the worker's turn is over."""
        with self._lock:
            while self._ready:
                oldest = next(iter(self._ready.values()))
                left = oldest.ready_at + self._max_delay - time.monotonic()
                if len(self._ready) < self._max_batch and left > 0 and self._closed is None:
                    self._more_ready.wait(left)
                    continue
                chosen = [request for request, _ in zip(self._ready.values(), range(self._max_batch), strict=False)]
                batch = [request for request in chosen if self._begin(request)]
                if batch:
                    return batch
            self._working = False
            return []

    def _settle(self, batch: Iterable[_Request], outcome: Iterable[Prediction] | BaseException) -> None:
        """Answer requests that have begun. A callback of theirs that raises takes no answer from the others."""
        before, self._own.inside = getattr(self._own, "inside", False), True
        try:
            if isinstance(outcome, BaseException):
                for request in batch:
                    self._metrics.count("errors", kind=type(outcome).__name__)
                    _carry_out(partial(request.future.set_exception, outcome))
                return
            for request, prediction in zip(batch, outcome, strict=True):
                answer = replace(
                    prediction,
                    labels=prediction.labels[: request.top_k],
                    probabilities=prediction.probabilities[: request.top_k],
                )
                _carry_out(partial(request.future.set_result, answer))
        finally:
            self._own.inside = before


def is_interruption(kind: type[BaseException] | None) -> bool:
    """Whether a context is left because the program, or the task, is to end: Ctrl-C, SystemExit, a cancelled task.

    An ordinary error is none: of the answers that were asked for by then some may still be wanted.
    """
    return kind is not None and not issubclass(kind, Exception)


def _check_delay(max_delay_ms: object) -> float:
    number = max_delay_ms.item() if isinstance(max_delay_ms, np.generic) else max_delay_ms
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= MAX_DELAY_MS:
        raise ConfigError(f"max_delay_ms must be a number from 0 to {MAX_DELAY_MS}, got {max_delay_ms!r}")
    return number


def _carry_out(answer: Callable[[], None]) -> None:
    try:
        answer()
    except BaseException:  # noqa: BLE001 - futures catch what callbacks raise, but for SystemExit and its like
        _log.exception("a callback of a request failed")


_open: WeakSet[Batcher] = WeakSet()


@atexit.register
def _end() -> None:
    """The threads that compute do not hold up the end of the interpreter; this does, for a moment.

    Nobody but callbacks can still be waiting: threads that do not end with the interpreter have ended by now.
    """
    failed = getattr(sys, "last_type", None) is not None  # an error that nobody caught ended the program
    until = time.monotonic() + (0 if failed else _SECONDS_AT_THE_END)
    cancelled = sum(batcher.end(max(0.0, until - time.monotonic())) for batcher in list(_open))
    if cancelled:
        _log.warning("the interpreter ended: %d requests were cancelled; close the batcher to wait for all", cancelled)
