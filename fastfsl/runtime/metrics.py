"""What a classifier in service tells its operator, one small event at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastfsl.runtime.forking import undisturbed

Kind = Literal["counter", "gauge", "histogram"]

_log = logging.getLogger("fastfsl.runtime")


@dataclass(frozen=True)
class Metric:
    """One event.

    ======================  =========  ==============  =============================================================
    name                    kind       labels          value
    ======================  =========  ==============  =============================================================
    images                  counter                    images answered with a prediction, probabilities or embedding
    errors                  counter    kind            images or batches that ended in an error of that type
    rejections              counter                    requests that a full queue turned away
    cancellations           counter                    requests cancelled before their batch began
    batch_size              histogram                  images computed at once
    queue_depth             gauge                      requests accepted and not yet answered
    queue_wait_seconds      histogram                  from a request's acceptance to the start of its batch
    stage_seconds           histogram  stage           decode: one image; encode, flow, encode_and_flow: one batch
    ======================  =========  ==============  =============================================================

    Args:
        name: which.
        kind: a counter is added to, a gauge set, a histogram observed.
        value: by how much, to what, or what was seen.
        labels: what tells apart events of one name.
    """

    name: str
    kind: Kind
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Metrics:
    """Hands events to a callback, from whatever thread they happen on. A callback that fails costs no answer.

    Args:
        callback: gets every event, must be quick and may be called by several threads at once; None: nobody listens.
    """

    def __init__(self, callback: Callable[[Metric], None] | None) -> None:
        self._callback = callback
        self._complained = False

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._tell(name, "counter", value, labels)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._tell(name, "gauge", value, {})

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._tell(name, "histogram", value, labels)

    def batch(self, size: int) -> None:
        """Tell that so many images were computed at once."""
        if size:
            self.observe("batch_size", size)
            self.count("images", size)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Observe how long a stage takes, if it comes to its end."""
        if self._callback is None:
            yield
            return
        start = time.perf_counter()
        yield
        self.observe("stage_seconds", time.perf_counter() - start, stage=stage)

    def _tell(self, name: str, kind: Kind, value: float, labels: dict[str, str]) -> None:
        if self._callback is None:
            return
        try:
            with undisturbed:  # a collector's locks are not to be held when the process forks
                self._callback(Metric(name, kind, value, labels))
        except Exception:  # noqa: BLE001 - whatever the callback raises
            if not self._complained:
                self._complained = True
                _log.exception("on_metrics failed on %s; further failures of it are not reported", name)


UNHEARD = Metrics(None)
