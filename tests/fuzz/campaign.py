"""Sends mutants to a worker process and notes which of them it refused, took, or did not survive."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SECONDS = 5.0
# Of a bomb, whose pixels have to be held; of a bundle or another image 600 MB.
MAX_BYTES = 10**9
MAX_MUTANT_BYTES = 600 * 10**6
# A worker is replaced now and then, so that one mutant's leftovers are not laid at the door of many.
_MUTANTS_A_WORKER = 2500
_ROOT = Path(__file__).parents[2]


@dataclass
class Campaign:
    """What came of a number of mutants.

    Args:
        kind: "bundles", "images" or "bombs".
        seed: with a number it gives the mutant.
        outcomes: "valid" or an error's name -> how many.
        findings: what must not happen, each with the mutant's number and what it did.
        slowest: seconds that one mutant took at most.
        peak_bytes: memory that a worker held at most.
        out_of_memory: refusals because an allocation failed.
        valid: numbers of the mutants that were no worse than the original.
    """

    kind: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    peak_bytes: int = 0
    out_of_memory: int = 0
    valid: list[int] = field(default_factory=list)

    def run(self, indices: Sequence[int], folders: Sequence[Path] = (), *, seconds: float = float("inf")) -> int:
        """Meet these mutants, for as long as there is time.

        Args:
            indices: numbers of the mutants.
            folders: bundles that mutants are made from, or the folder of the bombs.
            seconds: how much time there is.

        Returns:
            How many of them were met.
        """
        deadline, worker, met = time.monotonic() + seconds, None, 0
        try:
            for index in indices:
                if time.monotonic() > deadline:
                    break
                if worker is None or met % _MUTANTS_A_WORKER == 0:
                    _end(worker)
                    worker = _start(self.kind, self.seed, folders)
                answer = _ask(worker, index, MAX_BYTES if self.kind == "bombs" else min(MAX_BYTES, MAX_MUTANT_BYTES))
                self._note(answer)
                met += 1
                if answer["outcome"] not in ("valid", "refused"):
                    _end(worker)
                    worker = None
        finally:
            _end(worker)
        return met

    def _note(self, answer: dict[str, Any]) -> None:
        self.outcomes["valid" if answer["outcome"] == "valid" else answer["error"]] += 1
        if answer["outcome"] == "valid":
            self.valid.append(answer["index"])
        self.slowest = max(self.slowest, answer["seconds"])
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        words = answer["message"].lower()
        if answer["outcome"] == "refused" and any(part in words for part in ("bad_alloc", "bad alloc", "allocate")):
            self.out_of_memory += 1
        if answer["outcome"] not in ("valid", "refused"):
            self.findings.append(answer)


def _start(kind: str, seed: int, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """A worker that is ready: what it imports is not counted as a mutant's time."""
    command = [sys.executable, "-m", "tests.fuzz.worker", kind, str(seed), *(str(path.resolve()) for path in folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


def _end(worker: subprocess.Popen[bytes] | None) -> None:
    if worker is None:
        return
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()


def _ask(worker: subprocess.Popen[bytes], index: int, max_bytes: int) -> dict[str, Any]:
    """What became of one mutant."""
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker has no pipes")
    first = worker.poll() is None and not hasattr(worker, "warm")
    worker.stdin.write(f"{index}\n".encode())
    started, peak, line = time.monotonic(), 0, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([worker.stdout], [], [], 0.02)
        seconds = time.monotonic() - started
        if ready:
            part = worker.stdout.read(65536)
            if not part:
                code = worker.wait()
                return _finding(index, "crash", f"the process ended with code {code}", seconds, peak)
            line += part
            continue
        peak = max(peak, _resident(worker.pid))
        if peak > max_bytes:
            return _finding(index, "memory", f"more than {max_bytes} bytes", seconds, peak)
        if seconds > MAX_SECONDS + (30 if first else 0):
            return _finding(index, "hang", f"more than {MAX_SECONDS} seconds", seconds, peak)
    worker.warm = True  # type: ignore[attr-defined]  # a mark of ours: its imports are done
    answer: dict[str, Any] = json.loads(line)
    if answer["peak_bytes"] > max_bytes:
        return {**answer, "outcome": "memory", "error": "memory"}
    if answer["seconds"] > MAX_SECONDS:
        return {**answer, "outcome": "hang", "error": "hang"}
    return answer


def _finding(index: int, what: str, message: str, seconds: float, peak: int) -> dict[str, Any]:
    about = {"outcome": what, "error": what, "message": message, "seconds": seconds, "peak_bytes": peak}
    return {"index": index, **about}


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
