"""Compiling the flow's kernels ahead of time, for cards that need not be here.

Every kernel is compiled once for each tile that some class of row counts uses, for every architecture asked for, and as
sm_80 PTX that drivers compile for other cards. What is compiled follows from the width, the
dtype, the tables in `fastfsl.kernels.tiles` and the compilers' versions alone: two builds are equal byte by byte.
"""

import base64
import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from fastfsl import bundle
from fastfsl.bundle import CompiledKernel, KernelSet, KernelTarget, KernelTile
from fastfsl.bundle.flow_launches import FLOW_KERNELS
from fastfsl.errors import ConfigError
from fastfsl.kernels.tiles import ARCHITECTURES, ROW_CLASSES, SHARED_MEMORY, Tile, flow_tile, logits_tile

FLOW_FAMILY: Final = "fastfsl.kernels.flow_kernels"
# PTX has to fit every card that might compile it: it is of the oldest architecture, in tiles of the smallest memory.
PTX_ARCH: Final = 80
PTX_TILE_ARCH: Final = 86
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
    arguments: tuple[tuple[str, bundle.ArgumentKind], ...]
    cubin: bytes
    ptx: str
    compiler: dict[str, str]


@dataclass(frozen=True)
class CompiledFlow:
    """A flow's kernels, compiled.

    Args:
        kernels: the index.
        files: contents of the files that it names.
    """

    kernels: KernelSet
    files: dict[str, bytes]

    def write(self, bundle_dir: Path) -> None:
        """Write the index and the files to where they lie in a bundle.

        Raises:
            ConfigError: they cannot be written.
        """
        folder = bundle_dir / bundle.FLOW_KERNELS_FOLDER
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        bundle.write_flow_kernels(bundle_dir / bundle.FLOW_KERNELS_INDEX, self.kernels)


def parse_architectures(text: str) -> tuple[int, ...]:
    """Architectures from a list such as "sm_80,sm_90", "80,90" or "all", ascending.

    Raises:
        ConfigError: one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return ARCHITECTURES
    known = {f"{prefix}{arch}": arch for arch in ARCHITECTURES for prefix in ("sm_", "")}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown architecture {name!r}; expected 'all', or some of "
                f"{', '.join(f'sm_{arch}' for arch in ARCHITECTURES)} separated by commas"
            )
    return tuple(sorted({known[name] for name in names}))


def check_dim(dim: int) -> None:
    """Refuse a width that there are no kernels for.

    Raises:
        ConfigError: it is none of the multiples of 16 from 128 to 1280.
    """
    if not bundle.MIN_DIM <= dim <= bundle.MAX_DIM or dim % 16:
        raise ConfigError(
            f"there are kernels for widths that are multiples of 16 from {bundle.MIN_DIM} to {bundle.MAX_DIM}, got "
            f"{dim}; export without --arch"
        )


def flow_jobs(
    dim: int, dtype: Literal["fp16", "bf16"], architectures: Sequence[int]
) -> dict[str, dict[tuple[str, int | None], Job]]:
    """What there is to compile for flows of a width: target -> (kernel, row class) -> job, some of them equal.

    Raises:
        ConfigError: there are no kernels for the width.
    """
    check_dim(dim)
    targets = {f"sm_{arch}": (arch, arch) for arch in sorted(set(architectures))}
    targets[bundle.PTX_TARGET] = (PTX_ARCH, PTX_TILE_ARCH)
    return {
        name: {
            (kernel, row_class): Job(kernel, dim, dtype, arch, _tile(kernel, tile_arch, dim, row_class, dtype))
            for row_class in ROW_CLASSES
            for kernel in (*FLOW_KERNELS, bundle.LOGITS)
        }
        for name, (arch, tile_arch) in targets.items()
    }


def compile_flow(
    dim: int,
    dtype: Literal["fp16", "bf16"],
    architectures: Sequence[int],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CompiledFlow:
    """Compile the kernels of flows of a width; sm_80 PTX is always among them.

    Args:
        dim: d, a multiple of 16 from 128 to 1280.
        dtype: of the products' operands and of the residual stream.
        architectures: of `ARCHITECTURES`, at least one.
        on_progress: called with (compilations done, compilations in all).

    Raises:
        ConfigError: there are no kernels for the width, Triton is missing or fails, or a kernel is over budget.
    """
    jobs = flow_jobs(dim, dtype, architectures)
    built = compile_jobs((job for of in jobs.values() for job in of.values()), on_progress=on_progress)
    check_budgets({job: built[job] for job in jobs[bundle.PTX_TARGET].values()}, PTX_TILE_ARCH)
    files: dict[str, bytes] = {}
    targets = {}
    for name, of in jobs.items():
        kind: Literal["cubin", "ptx"] = "ptx" if name == bundle.PTX_TARGET else "cubin"
        kernels, placed = [], dict[Job, str]()
        arch = next(iter(of.values())).arch
        for (kernel, row_class), job in of.items():
            file = placed.setdefault(job, f"{name}/{kernel}_{_label(row_class)}.{kind}")
            files[file] = built[job].ptx.encode() if kind == "ptx" else built[job].cubin
            kernels.append(_describe(job, built[job], row_class, file, files[file]))
        targets[name] = KernelTarget(name, arch, kind, tuple(kernels))
    compiler = next(iter(built.values())).compiler
    return CompiledFlow(KernelSet(dim, dtype, compiler, ROW_CLASSES, targets), files)


def compile_jobs(jobs: Iterable[Job], *, on_progress: Callable[[int, int], None] | None = None) -> dict[Job, Built]:
    """Compile, equal jobs once, in as many processes as there are cores, and hold the budgets.

    Raises:
        ConfigError: Triton is missing or fails, or a kernel is over budget.
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
    check_budgets(done)
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


def _tile(kernel: str, arch: int, dim: int, row_class: int | None, dtype: Literal["fp16", "bf16"]) -> Tile:
    rows = max(filter(None, ROW_CLASSES)) + 1 if row_class is None else row_class
    return logits_tile(rows) if kernel == bundle.LOGITS else flow_tile(arch, dim, rows, dtype)


def _label(row_class: int | None) -> str:
    return "more" if row_class is None else str(row_class)


def _describe(job: Job, built: Built, row_class: int | None, file: str, data: bytes) -> CompiledKernel:
    is_ptx = file.endswith(".ptx")
    return CompiledKernel(
        kernel=job.kernel,
        row_class=row_class,
        file=file,
        entry=built.entry,
        sha256=hashlib.sha256(data).hexdigest(),
        shared_memory=built.shared_memory,
        threads=32 * job.tile.warps,
        tile=KernelTile(**asdict(job.tile)),
        arguments=built.arguments,
        registers=None if is_ptx else built.registers,
        stack=None if is_ptx else built.stack,
        cooperative=job.cooperative,
    )


@contextlib.contextmanager
def _worker(scratch: str) -> Iterator[tuple[IO[str], IO[str]]]:
    """Standard input and output of a process whose environment has nothing that changes what is compiled."""
    environment = {name: os.environ[name] for name in _TAKEN_OVER if name in os.environ}
    # No line information: it holds the paths of the sources.
    environment |= {"TRITON_HOME": scratch, "TRITON_CACHE_DIR": f"{scratch}/cache", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-P", "-m", "fastfsl.kernels.aot_worker"]
    pipe = subprocess.PIPE
    with Path(scratch, _LOG).open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, constant arguments
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment
        )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("Popen made no pipes")
    try:
        yield process.stdin, process.stdout
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _ask(worker: tuple[IO[str], IO[str]], job: Job, scratch: str) -> Built:
    """Have a job done.

    Raises:
        ConfigError: the compiler fails or dies.
    """
    jobs, answers = worker
    answer: dict[str, Any] = {}
    with contextlib.suppress(BrokenPipeError, json.JSONDecodeError):
        jobs.write(json.dumps(asdict(job)) + "\n")
        jobs.flush()
        answer = json.loads(answers.readline() or "{}")
    if "cubin" not in answer:
        why = answer.get("error") or Path(scratch, _LOG).read_text(errors="replace")[-2000:] or "it died"
        raise ConfigError(
            f"{job.kernel} could not be compiled for sm_{job.arch} (d = {job.dim}, {job.dtype}): {why}\n"
            f"Leave sm_{job.arch} out, or install another version of Triton"
        )
    answer["cubin"] = base64.b64decode(answer["cubin"])
    answer["arguments"] = tuple((name, kind) for name, kind in answer["arguments"])
    return Built(**answer)
