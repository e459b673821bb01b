"""Timing calls beside each other: warmed up, turn by turn, judged by percentiles of the raw rounds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_WARM_UP = 3
# Fewer rounds have no 95th percentile to speak of; more than this many add nothing.
MIN_ROUNDS, MAX_ROUNDS = 20, 20_000


@dataclass
class Timed:
    """A call to be timed.

    Attributes:
        name: of the call.
        batch: samples it handles.
        call: what is timed.
        seconds: time that its rounds may take together; at least `MIN_ROUNDS` are made.
        times: of its rounds, seconds.
    """

    name: str
    batch: int
    call: Callable[[], object]
    seconds: float
    times: list[float] = field(default_factory=list)
    used: float = 0.0

    @property
    def share(self) -> float:
        """How much of its rounds is done, from 0 to 1."""
        if len(self.times) >= MAX_ROUNDS:
            return 1.0
        return min(1.0, self.used / self.seconds, len(self.times) / MIN_ROUNDS)

    def round(self) -> None:
        """Time one call."""
        start = time.perf_counter()
        self.call()
        took = time.perf_counter() - start
        self.times.append(took)
        self.used += took

    def figures(self) -> dict[str, Any]:
        """Percentiles of a call's latency in ms, samples a second, and the number of rounds."""
        import numpy as np

        p50, p95, p99 = (1000 * float(value) for value in np.percentile(self.times, (50, 95, 99)))
        return {
            "batch": self.batch,
            "p50_ms": round(p50, 4),
            "p95_ms": round(p95, 4),
            "p99_ms": round(p99, 4),
            "images_per_second": round(self.batch * len(self.times) / self.used, 2),
            "rounds": len(self.times),
        }


def measure(calls: Sequence[Timed], *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Time all calls: each time the one that is farthest from its end, so that a busy moment meets them all.

    Args:
        calls: what to time; their times are added to.
        on_progress: hears (per mille done, 1000).
    """
    for call in calls:
        for _ in range(_WARM_UP):
            call.call()
    told = 0
    while (last := min(calls, key=lambda call: call.share)).share < 1:
        last.round()
        done = int(1000 * sum(call.share for call in calls) / len(calls))
        if on_progress is not None and done != told:
            on_progress(done, 1000)
            told = done
