"""Compiling the flow's kernels ahead of time, for cards that need not be here.

Every kernel is compiled once for each tile that some class of row counts uses, for every architecture asked for, and as
sm_80 PTX that drivers compile for other cards. The result follows from the width, the dtype, the tables in
`fastfsl.kernels.tiles` and the compilers' versions alone: two builds are equal byte by byte.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from fastfsl import bundle
from fastfsl.bundle import CompiledKernel, KernelSet, KernelTarget, KernelTile
from fastfsl.bundle.flow_launches import FLOW_KERNELS
from fastfsl.errors import ConfigError
from fastfsl.kernels.aot_jobs import Built, Job, check_budgets, compile_jobs
from fastfsl.kernels.tiles import ARCHITECTURES, ROW_CLASSES, Tile, flow_tile, logits_tile

# PTX has to fit every card that might compile it: it is of the oldest architecture, in tiles of the smallest memory.
PTX_ARCH: Final = 80
PTX_TILE_ARCH: Final = 86


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
    check_budgets(built)
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
