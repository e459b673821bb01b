"""Compilations as jobs for processes of their own, one a core, and the budgets that kernels have to hold.

Triton is imported in those processes alone: how it compiles depends on the environment it is imported in.
"""

import base64
import collections
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fastfsl.bundle import ArgumentKind
from fastfsl.errors import ConfigError
from fastfsl.kernels.tiles import SHARED_MEMORY, Tile

FLOW_FAMILY: Final = "fastfsl.kernels.flow_kernels"
PERSISTENT_FAMILY: Final = "fastfsl.kernels.flow_persistent"
# Each worker holds some hundred MB.
_MOST_WORKERS: Final = 16
_LOG: Final = "log"
# All that a worker's environment takes over: any other variable might change what is compiled.
_TAKEN_OVER: Final = (
    "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One compilation.

    Args:
        kernel: name within its family.
        dim: d.
        dtype: of the products' operands and the residual stream, "fp16", "bf16" or "fp32".
        arch: compute capability times ten.
        tile: sizes, warps and stages.
        cooperative: to be launched with all programs at once.
        family: module that has the kernel.
    """

    kernel: str
    dim: int
    dtype: str
    arch: int
    tile: Tile
    cooperative: bool = False
    family: str = FLOW_FAMILY


@dataclass(frozen=True)
class Built:
    """What a compilation gave.

    Args:
        entry: name of the function.
        shared_memory: dynamic shared memory of a program, bytes.
        scratch: scratch memory in bytes that a launch would have to give.
        registers: of a thread.
        stack: local memory of a thread, bytes.
        arguments: (name, kind) of the parameters in order, without the two scratch pointers at the end.
        cubin: machine code.
        ptx: its source.
        compiler: package or tool -> version.
    """

    entry: str
    shared_memory: int
    scratch: int
    registers: int
    stack: int
    arguments: tuple[tuple[str, ArgumentKind], ...]
    cubin: bytes
    ptx: str
    compiler: dict[str, str]


def compile_jobs(jobs: Iterable[Job], *, on_progress: Callable[[int, int], None] | None = None) -> dict[Job, Built]:
    """Compile, equal jobs once, in as many processes as there are cores; the budgets are `check_budgets`.

    Raises:
        ConfigError: Triton is missing or fails.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("compiling kernels needs Triton, which is not installed: pip install triton (Linux only)")
    # The longest first, so that no process has one left when the others are done.
    unique = sorted(dict.fromkeys(jobs), key=lambda job: job.tile.rows * job.tile.columns, reverse=True)
    waiting, done, lock = collections.deque(unique), dict[Job, Built](), threading.Lock()

    def work(scratch: str) -> None:
        with _worker(scratch) as worker:
            while waiting:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                built = _ask(worker, job, scratch)
                with lock:
                    done[job] = built
                    if on_progress is not None:
                        on_progress(len(done), len(unique))

    count = min(len(os.sched_getaffinity(0)), len(unique), _MOST_WORKERS)
    with tempfile.TemporaryDirectory(prefix="fastfsl-aot-") as folder, ThreadPoolExecutor(count) as threads:
        folders = [Path(folder, str(index)) for index in range(count)]
        for path in folders:
            path.mkdir()
        futures = [threads.submit(work, str(path)) for path in folders]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            waiting.clear()  # after a failure, or Ctrl-C, what was begun is finished and nothing else begun
        for future in futures:
            future.result()
    return done


def check_budgets(built: Mapping[Job, Built], card: int | None = None) -> None:
    """Refuse kernels that spill registers, or that a card could not launch.

    Args:
        built: job -> what it gave.
        card: architecture of the card; None: the one that each was compiled for.

    Raises:
        ConfigError: some use local memory, scratch memory, or more shared memory than there is.
    """
    over = [
        f"{job.kernel} for sm_{job.arch} (d = {job.dim}, {job.dtype}, {job.tile}): {used} bytes of {what}, expected at "
        f"most {most}"
        for job, one in built.items()
        for what, used, most in (
            ("local memory", one.stack, 0),
            ("scratch memory", one.scratch, 0),
            ("shared memory", one.shared_memory, SHARED_MEMORY[card or job.arch]),
        )
        if used > most
    ]
    if over:
        version = next(iter(built.values())).compiler["triton"]
        raise ConfigError(
            f"Triton {version} makes kernels that need too much; leave their architectures out, or take another "
            "version: " + "; ".join(over)
        )


@contextlib.contextmanager
def _worker(scratch: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose environment has nothing that changes what is compiled."""
    environment = {name: os.environ[name] for name in _TAKEN_OVER if name in os.environ}
    # No line information: it holds the paths of the sources.
    environment |= {"TRITON_HOME": scratch, "TRITON_CACHE_DIR": f"{scratch}/cache", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-P", "-m", "fastfsl.kernels.aot_worker"]
    pipe = subprocess.PIPE
    with Path(scratch, _LOG).open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, constant arguments
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment
        )
    try:
        yield process
    finally:
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        process.wait()


def _ask(worker: subprocess.Popen[str], job: Job, scratch: str) -> Built:
    """Have a job done.

    Raises:
        ConfigError: the compiler fails or dies.
    """
    answer: dict[str, Any] = {}
    with contextlib.suppress(BrokenPipeError, json.JSONDecodeError):
        print(json.dumps(asdict(job)), file=worker.stdin, flush=True)
        answer = json.loads(worker.stdout.readline() if worker.stdout else "")
    if "error" not in answer and "cubin" not in answer:
        worker.communicate()  # closes its input and waits
        log = Path(scratch, _LOG).read_text(errors="replace")[-2000:].strip()
        answer = {"error": f"its process ended with code {worker.returncode}{': ' if log else ''}{log}"}
    if "error" in answer:
        raise ConfigError(
            f"{job.kernel} could not be compiled for sm_{job.arch} (d = {job.dim}, {job.dtype}): {answer['error']}\n"
            f"Leave sm_{job.arch} out, or install another version of Triton"
        )
    answer["cubin"] = base64.b64decode(answer["cubin"])
    answer["arguments"] = tuple((name, kind) for name, kind in answer["arguments"])
    return Built(**answer)
