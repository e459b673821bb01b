"""Timing on a card: events, medians, inputs that do not fit in the second-level cache, the ceilings of the card.

Three times of one call are kept apart, for they answer different questions:
- `call_ms`: one call on an idle card whose second-level cache was just overwritten, from before its first launch until
  its last kernel is done: what a request waits.
- `queued_ms`: many calls, one after the other without waiting, over their number: what a call costs in a loop.
- `replay_ms`: the same kernels recorded in a CUDA graph, so without Python and launches: what the card computes.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
GRAPH_CHAIN = 251


@dataclass(frozen=True)
class Timing:
    """Median of rounds, in ms, and how far the medians of its two halves are apart, relative to it."""

    ms: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, passes: Sequence[Sequence[float]]) -> "Timing":
        """Of the rounds of several passes."""
        median = statistics.median(time for rounds in passes for time in rounds)
        medians = [statistics.median(rounds) for rounds in passes]
        return cls(median, (max(medians) - min(medians)) / median, sum(map(len, passes)))


@dataclass(frozen=True)
class Ceilings:
    """What the card was measured to do at best.

    Args:
        tflops: a bf16 matrix product, 10^12 operations a second.
        gigabytes: a copy within its memory, 10^9 bytes read and written a second.
        launch_us: a kernel that waits for the one before it, in a graph.
    """

    tflops: float
    gigabytes: float
    launch_us: float

    def roofline_ms(self, flops: float, num_bytes: float) -> float:
        """No version runs much faster: operations and bytes each take their time, the longer counts."""
        return 1e3 * max(flops / (1e12 * self.tflops), num_bytes / (1e9 * self.gigabytes))


class Clock(Protocol):
    """Times calls; each of the calls does the same to inputs of its own."""

    def copies(self, num_bytes: int) -> int:
        """How many sets of inputs of so many bytes do not fit in the cache together."""

    def call_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Times of single calls, in ms."""

    def queued_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Times of a call among many queued ones, in ms."""

    def replay_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Times of a call in a CUDA graph, in ms."""

    def ceilings(self) -> Ceilings:
        """What the device does at best."""


class CardClock:
    """By CUDA events."""

    def __init__(self) -> None:
        """Hold a buffer of twice the second-level cache."""
        self._cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
        self._flush = torch.empty(2 * self._cache, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def copies(self, num_bytes: int) -> int:
        """2 to 32 sets of inputs, of twice the cache where that is enough."""
        return max(2, min(32, math.ceil(2 * self._cache / max(num_bytes, 1))))

    def call_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """The cache is overwritten before each call."""
        self._warm(calls)

        def timed(index: int) -> float:
            self._flush.zero_()
            torch.cuda.synchronize()
            return self._span(calls[index % len(calls)])

        return _repeat(timed, seconds)

    def queued_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """The calls take turns; about ten groups of them are timed."""
        self._warm(calls)

        def several(count: int) -> float:
            def group() -> None:
                for index in range(count):
                    calls[index % len(calls)]()

            return self._span(group) / count

        once = several(len(calls))
        count = max(len(calls), min(1000, round(100 * seconds / once)))
        return _repeat(lambda _: several(count), seconds, least=5)

    def replay_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """All calls are captured in one graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._warm(calls)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        self._warm([graph.replay])
        return _repeat(lambda _: self._span(graph.replay) / len(calls), seconds)

    def ceilings(self) -> Ceilings:
        """A product of 8192^3 in bf16 on random data, a copy of 2 GiB, a chain of small kernels in a graph."""
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product = statistics.median(self.queued_rounds([lambda: a @ b], 0.5))
        source = torch.randn(1 << 29, device="cuda")
        target = torch.empty_like(source)
        copy = statistics.median(self.queued_rounds([lambda: target.copy_(source)], 0.5))
        moved = 2 * source.numel() * source.element_size()
        small = torch.zeros(128, device="cuda")
        chain = statistics.median(self.replay_rounds([lambda: small.add_(1.0)] * GRAPH_CHAIN, 0.3))
        return Ceilings(2 * 8192**3 / product / 1e9, moved / copy / 1e6, 1e3 * chain)

    def _span(self, call: Call) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))

    @staticmethod
    def _warm(calls: Sequence[Call]) -> None:
        for call in (*calls, *calls[:3]):
            call()
        torch.cuda.synchronize()


class DryClock:
    """By the host's clock, two rounds: it shows that the calls run, its times mean nothing."""

    def copies(self, num_bytes: int) -> int:
        """Two sets."""
        return 2

    def call_rounds(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Each call once."""
        return _repeat(lambda index: _host_ms(calls[index % len(calls)]), min(seconds, 0.0), least=2)

    queued_rounds = replay_rounds = call_rounds

    def ceilings(self) -> Ceilings:
        """Ones."""
        return Ceilings(1.0, 1.0, 1.0)


def compare(
    rounds: Callable[[Sequence[Call], float], list[float]], calls: Mapping[str, Sequence[Call]], seconds: float
) -> dict[str, Timing]:
    """Time several versions in two passes, so that a slow moment of the card does not meet one of them alone.

    Args:
        rounds: a method of a clock.
        calls: of each version.
        seconds: for each version.
    """
    passes: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(2):
        for name, version in calls.items():
            passes[name].append(rounds(version, seconds / 2))
    return {name: Timing.of(times) for name, times in passes.items()}


def _repeat(timed: Callable[[int], float], seconds: float, least: int = 10, most: int = 300) -> list[float]:
    """Call with 0, 1, 2, ... for so many seconds, but `least` to `most` times."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        times.append(timed(len(times)))
    return times


def _host_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
