"""Threads that ask a batcher for single images: good, unreadable, too many at once, and cancelled.

`python -m benchmarks.soak --threads 16 --seconds 60 [--bundle DIR] [--save-results]` writes
benchmarks/results/soak.json. Every answer is compared with the one that `predict` gave the same image before, and
the images are chosen so that no two have like answers: somebody else's answer would be seen.
"""

import argparse
import faulthandler
import io
import json
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.conftest import RESULTS, made_with
from fastfsl.errors import ClosedError, FastFSLError, OverloadError
from fastfsl.runtime import Classifier, Prediction

# Answers depend a little on who else is in the batch: rows of a product are summed in another order.
TOLERANCE = 1e-4
APART = 20 * TOLERANCE
UNREADABLE_SHARE, CANCELLED_SHARE = 0.01, 0.02
# Requests a thread has under way at once, so that batches fill.
WINDOW = 4
PATIENCE = 60.0


class Images:
    """Images with the answers, or errors, that they must get.

    Args:
        classifier: gives the answers beforehand.
        count: good images wanted.
    """

    def __init__(self, classifier: Classifier, count: int = 48) -> None:
        rng = np.random.default_rng(0)
        drawn = [_encoded(rng, index) for index in range(12 * count)]
        probabilities = np.concatenate([classifier.probabilities(image) for image in drawn])
        chosen: list[int] = []
        for index, row in enumerate(probabilities):
            if len(chosen) < count and all(np.abs(row - probabilities[other]).max() > APART for other in chosen):
                chosen.append(index)
        if len(chosen) < 2:
            sys.exit(
                "the bundle gives all images the same answer: nothing could be told apart; choose another --bundle"
            )
        self.good = [(drawn[index], probabilities[index]) for index in chosen]
        self.class_names = classifier.class_names
        self.bad = [(image, _error(classifier, image)) for image in _unreadable(drawn[0])]

    def right(self, prediction: Prediction, expected: np.ndarray) -> bool:
        """Whether the prediction is the expected one, (C,)."""
        found = dict(zip(prediction.labels, prediction.probabilities, strict=True))
        return len(found) == len(self.class_names) and all(
            abs(found[name] - value) <= TOLERANCE
            for name, value in zip(self.class_names, expected.tolist(), strict=True)
        )


def _encoded(rng: np.random.Generator, index: int) -> bytes:
    """A drawn image, as JPEG or PNG bytes: a few coloured boxes on a ground."""
    pixels = np.empty((48 + index % 40, 48 + index % 23, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    for _ in range(rng.integers(1, 6)):
        top, left = rng.integers(0, 40, 2)
        pixels[top : top + rng.integers(8, 40), left : left + rng.integers(8, 40)] = rng.integers(0, 256, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if index % 2 else "PNG")
    return file.getvalue()


def _unreadable(good: bytes) -> list[Any]:
    header = good[:16] + (2**20).to_bytes(4, "big") * 2 + good[24:]  # a PNG that claims to be a million pixels wide
    return [good[: len(good) // 2], b"", b"no image at all", header, "nowhere/at-all.jpg", np.zeros((4, 4)), None]


def _error(classifier: Classifier, image: Any) -> Exception:
    try:
        classifier.predict([image])
    except FastFSLError as error:
        return error
    raise SystemExit(f"an unreadable image was read: {image!r:.60}")


class Tally:
    """What became of the requests, counted by all threads."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def report(self, seconds: float) -> dict[str, Any]:
        counts = {
            name: self.counts[name]
            for name in ("submitted", "answered", "errors", "rejected", "cancelled", "wrong", "lost")
        }
        balance = counts["answered"] + counts["errors"] + counts["rejected"] + counts["cancelled"]
        report: dict[str, Any] = {**counts, "balanced": counts["submitted"] == balance, "seconds": round(seconds, 2)}
        if self.latencies:
            p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]).round(2).tolist()
            answers = round(counts["answered"] / seconds, 1)
            report |= {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "answers_per_second": answers}
        return report


def ask(images: Images, submit: Callable[..., Future[Prediction]], tally: Tally, seed: int, until: float) -> None:
    """Ask for images until the time or the batcher is over, and check what comes back."""
    draw = random.Random(seed)
    under_way: deque[tuple[Future[Prediction], Any]] = deque()
    while time.monotonic() < until:
        unreadable = draw.random() < UNREADABLE_SHARE
        image, expected = draw.choice(images.bad if unreadable else images.good)
        start = time.perf_counter()
        try:
            future = submit(image)
        except OverloadError:
            tally.add(submitted=1, rejected=1)
            time.sleep(0.001)
            continue
        except ClosedError:
            break
        tally.add(submitted=1)
        if not unreadable:
            future.add_done_callback(partial(_clock, tally, start))
        if draw.random() < CANCELLED_SHARE:
            time.sleep(draw.choice((0.0, 0.001)))
            future.cancel()
        under_way.append((future, expected))
        if len(under_way) >= WINDOW:
            _check(images, tally, *under_way.popleft())
    for asked in under_way:
        _check(images, tally, *asked)


def _clock(tally: Tally, start: float, done: Future[Prediction]) -> None:
    if not done.cancelled():
        tally.latencies.append((time.perf_counter() - start) * 1000)


def _check(images: Images, tally: Tally, future: Future[Prediction], expected: Any) -> None:
    if wait([future], PATIENCE).not_done:
        tally.add(lost=1)
    elif future.cancelled():
        tally.add(cancelled=1)
    elif (error := future.exception()) is None:
        right = isinstance(expected, np.ndarray) and images.right(future.result(), expected)
        tally.add(answered=1, wrong=not right)
    else:
        right = type(error) is type(expected) and str(error) == str(expected)
        tally.add(errors=1, wrong=not right)


def phase(
    classifier: Classifier, images: Images, threads: int, seconds: float, *, cancel_at_end: bool = False, **options: Any
) -> dict[str, Any]:
    """Threads on one batcher; it is closed while they still ask, if `cancel_at_end`."""
    tally = Tally()
    submit = classifier.batcher(top_k=len(images.class_names), **options)
    start = time.monotonic()
    until = start + (PATIENCE if cancel_at_end else seconds)
    asking = [
        threading.Thread(target=ask, args=(images, submit, tally, seed, until), name=f"asking-{seed}")
        for seed in range(threads)
    ]
    for thread in asking:
        thread.start()
    if cancel_at_end:
        time.sleep(seconds)
        submit.close(cancel_pending=True)
    for thread in asking:
        thread.join()
    elapsed = time.monotonic() - start
    begun = time.perf_counter()
    submit.close()
    report = tally.report(elapsed)
    report["close_ms"] = round((time.perf_counter() - begun) * 1000, 2)
    return report


def soak(bundle: Path, threads: int, seconds: float, *, num_threads: int | None = None) -> dict[str, Any]:
    """Three phases: a long one, one with a queue that is too small, one that ends in the middle.

    Returns:
        The report of each phase.

    Raises:
        RuntimeError: an answer is wrong or missing, or the counts do not balance.
    """
    with Classifier.load(bundle, device="cpu", num_threads=num_threads) as classifier:
        images = Images(classifier)
        phases = {
            "steady": phase(classifier, images, threads, seconds),
            "overload": phase(classifier, images, threads, max(0.3, seconds / 10), max_queue=max(2, threads // 2)),
            "shutdown": phase(classifier, images, threads, max(0.2, seconds / 30), cancel_at_end=True),
        }
    for name, report in phases.items():
        if report["wrong"] or report["lost"] or not report["balanced"] or not report["answered"]:
            raise RuntimeError(f"{name}: {report}")
    if not phases["overload"]["rejected"] or phases["steady"]["rejected"]:
        raise RuntimeError(f"only a small queue should turn requests away: {phases}")
    if not phases["steady"]["errors"] or not phases["steady"]["cancelled"]:
        raise RuntimeError(f"the steady phase had no errors or no cancellations: {phases['steady']}")
    return {"threads": threads, "images": len(images.good), "unreadable_kinds": len(images.bad), "phases": phases}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo-out/bundle"), help="[default: that of `make demo`]")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the first and longest phase")
    parser.add_argument("--save-results", action="store_true", help="write benchmarks/results/soak.json")
    options = parser.parse_args()
    # A deadlock ends the process with every thread's stack.
    faulthandler.dump_traceback_later(2 * options.seconds + 2 * PATIENCE, exit=True)
    result = soak(options.bundle, options.threads, options.seconds)
    print(json.dumps(result, indent=2))
    if options.save_results:
        command = f"python -m benchmarks.soak --threads {options.threads} --seconds {options.seconds:g} --save-results"
        document = {**result, "made_with": made_with(command)}
        (RESULTS / "soak.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
