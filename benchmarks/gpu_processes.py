"""Many small jobs, each a process of its own: one that crashes, faults or never ends costs the others nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

MOST_PROCESSES = 14
# Seconds; what was given less and did not end may just have begun too late: compiling takes a minute beside others.
PATIENCE = 100.0
NO_TIME = "no time left"


def run_each(
    module: str, jobs: Sequence[Any], seconds_left: Callable[[], float], most: int = MOST_PROCESSES
) -> Iterator[tuple[int, Any, str | None]]:
    """Run `python -m benchmarks.MODULE JOB` for every job, as many at a time as there are cores.

    Args:
        module: of this folder; prints its answer as JSON in its last line.
        jobs: JSON values.
        most: processes at a time.
        seconds_left: for all of them; a job that has none left is not begun, or is ended.

    Yields:
        (index of the job, answer, None), or (index, None, what went wrong), as they end.
    """

    def answer(job: Any) -> Any:
        if seconds_left() < 1.0:
            raise TimeoutError(NO_TIME)
        command = [sys.executable, "-P", "-m", f"benchmarks.{module}", json.dumps(job)]
        # Deterministic algorithms, by which memory is poisoned, ask for the workspace.
        environment = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds_left(), env=environment
            )
        except subprocess.TimeoutExpired as error:
            if error.timeout < PATIENCE:
                raise TimeoutError(NO_TIME) from None
            raise RuntimeError(f"did not end in {error.timeout:.0f} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"ended with code {done.returncode}: {done.stderr[-1000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), most)) as pool:
        futures = {pool.submit(answer, job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield futures[future], future.result(), None
            else:
                yield futures[future], None, str(error)
