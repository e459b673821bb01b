"""The flow's compiled kernels in a bundle: what ``kernels.json`` says about the binaries beside it.

A target is an architecture's cubins, or PTX that the driver compiles; it holds every kernel of a flow once for each
class of row counts. A kernel's parameters are its arguments in order, then two pointers that are null: Triton's scratch
memory, of which these kernels need none.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from fastfsl.bundle.flow_launches import FLOW_KERNELS, Place, flow_launches
from fastfsl.bundle.manifest import (
    FLOW_KERNELS_FOLDER,
    FLOW_KERNELS_INDEX,
    FLOW_KERNELS_WEIGHTS,
    KERNEL_DTYPES,
    Manifest,
)
from fastfsl.bundle.untrusted import AGAIN, NEWER, strict_json
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError
from fastfsl.files import staged_file

KERNELS_VERSION = 1
PTX_TARGET = "ptx"
ArgumentKind = Literal["pointer", "int32", "float32"]

# The classifier's product on top of a flow, and the whole flow in one cooperative launch.
LOGITS, PERSISTENT = "logits", "persistent"

# Widths that have kernels: multiples of 16, the depth of a tensor core's product.
MIN_DIM, MAX_DIM = 128, 1280
# The index has a kilobyte for each of about 150 kernels, a cubin or PTX file some tens of kilobytes.
MAX_INDEX_BYTES = 4 * 2**20
MAX_KERNEL_BYTES = 16 * 2**20
# What a block of the largest architecture (sm_90, sm_100) may use.
MAX_SHARED_MEMORY = 227 * 2**10


@dataclass(frozen=True)
class KernelTile:
    """What one program of a kernel computes, and with what.

    Args:
        rows: of the output.
        columns: of the output.
        depth: of the products' inner dimension at a time.
        warps: of 32 threads.
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one architecture and one class of row counts.

    Args:
        kernel: one of ``FLOW_KERNELS``, ``LOGITS`` or ``PERSISTENT``.
        row_class: the most rows it is meant for; None: any number.
        file: below ``FLOW_KERNELS_FOLDER``; several kernels may share it.
        entry: name of the function in it.
        sha256: of the file, in hex.
        shared_memory: dynamic shared memory of a block, in bytes.
        threads: of a block.
        tile: its sizes; the grid is (column tiles, row tiles).
        arguments: (name, kind) of its parameters in order, without the two trailing null pointers.
        registers: of a thread; None for PTX, where the driver decides.
        stack: bytes of local memory of a thread; None for PTX.
        cooperative: all its blocks have to run at once (``cuLaunchCooperativeKernel``).
    """

    kernel: str
    row_class: int | None
    file: str
    entry: str
    sha256: str
    shared_memory: int
    threads: int
    tile: KernelTile
    arguments: tuple[tuple[str, ArgumentKind], ...]
    registers: int | None
    stack: int | None
    cooperative: bool

    @property
    def path(self) -> str:
        """The file's name in the manifest."""
        return f"{FLOW_KERNELS_FOLDER}/{self.file}"


@dataclass(frozen=True)
class KernelTarget:
    """The kernels for one kind of card.

    Args:
        name: "sm_90", or ``PTX_TARGET``.
        arch: compute capability times ten, 90; of PTX the least.
        kind: "cubin", or "ptx", which the driver compiles for any card from `arch` on.
        kernels: each kernel of each row class once.
    """

    name: str
    arch: int
    kind: Literal["cubin", "ptx"]
    kernels: tuple[CompiledKernel, ...]

    def find(self, kernel: str, row_class: int | None) -> CompiledKernel | None:
        """The kernel of that name and row class; None: there is none, which only ``PERSISTENT`` may be."""
        return next((one for one in self.kernels if (one.kernel, one.row_class) == (kernel, row_class)), None)


@dataclass(frozen=True)
class KernelSet:
    """All compiled kernels of a bundle's flow.

    Args:
        dim: d, the width they are compiled for.
        dtype: of the weights and the residual stream, "fp16" or "bf16".
        compiler: package or tool -> version.
        row_classes: ascending; the last one is None, for any number of rows.
        targets: name -> target.
        format_version: ``KERNELS_VERSION``.
    """

    dim: int
    dtype: str
    compiler: Mapping[str, str]
    row_classes: tuple[int | None, ...]
    targets: Mapping[str, KernelTarget]
    format_version: int = KERNELS_VERSION

    @property
    def architectures(self) -> list[str]:
        """The targets that have cubins, ascending."""
        cubins = [target for target in self.targets.values() if target.kind == "cubin"]
        return [target.name for target in sorted(cubins, key=lambda target: target.arch)]

    def row_class(self, rows: int) -> int | None:
        """The class of a number of rows."""
        return next(bound for bound in self.row_classes if bound is None or rows <= bound)

    def to_json(self) -> bytes:
        """The set as the bytes of ``kernels.json``."""
        values = asdict(self)
        for target in values["targets"].values():
            del target["name"]
        return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike[str] = FLOW_KERNELS_INDEX) -> KernelSet:
        """Parse and check an index.

        Args:
            data: bytes of the file.
            path: what messages call it.

        Raises:
            BundleError: anything is missing, unknown, of another type or out of range, or a kernel is missing.
        """
        values = strict_json(data, path)
        version = values.get("format_version")
        if not _is_int(version) or version < 1:
            raise BundleError(f"{path}: 'format_version' must be {KERNELS_VERSION}, got {version!r}; {AGAIN}")
        if version > KERNELS_VERSION:
            raise BundleError(f"{path}: format version {version}, this fastfsl reads {KERNELS_VERSION}; {NEWER}")
        _check_keys(values, _SET, str(path))
        targets = {name: _target(name, target, f"{path}: {name}") for name, target in values["targets"].items()}
        row_classes = tuple(values["row_classes"])
        for target in targets.values():
            _check_complete(target, row_classes, f"{path}: {target.name}")
        return cls(values["dim"], values["dtype"], values["compiler"], row_classes, targets)


def read_flow_kernels(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> KernelSet | None:
    """Read and check the index of a bundle's compiled kernels. Their files are not looked at: see ``read_kernel``.

    Returns:
        The kernels; None: the bundle has none.

    Raises:
        BundleError: the index is damaged, or contradicts the manifest.
    """
    if manifest.kernels is None:
        return None
    path = Path(bundle_dir) / FLOW_KERNELS_INDEX
    _check_size(path, manifest, FLOW_KERNELS_INDEX, MAX_INDEX_BYTES)
    kernels = KernelSet.from_json(read_file(bundle_dir, manifest, FLOW_KERNELS_INDEX), path)
    found = {"width": kernels.dim, "architectures": kernels.architectures, "dtype": kernels.dtype}
    expected = {"width": manifest.embed_dim, **manifest.kernels}
    if found != expected:
        raise BundleError(f"{path}: holds {found}, the manifest says {expected}; {AGAIN}")
    every = {kernel.path: kernel.sha256 for target in kernels.targets.values() for kernel in target.kernels}
    listed = {name for name in manifest.files if name.startswith(f"{FLOW_KERNELS_FOLDER}/")}
    listed -= {FLOW_KERNELS_INDEX, FLOW_KERNELS_WEIGHTS}
    if listed != set(every):
        name = min(listed ^ set(every))
        raise BundleError(f"{path}: {name} is listed here or in the manifest, but not in both; {AGAIN}")
    for target in kernels.targets.values():
        for kernel in target.kernels:
            if manifest.files[kernel.path]["sha256"] != kernel.sha256:
                raise BundleError(f"{path}: another sha256 of {kernel.path} than in the manifest; {AGAIN}")
            _check_size(Path(bundle_dir) / kernel.path, manifest, kernel.path, MAX_KERNEL_BYTES)
    return kernels


def read_kernel(bundle_dir: str | os.PathLike[str], manifest: Manifest, kernel: CompiledKernel) -> bytes:
    """The cubin or PTX of a kernel, checked against the manifest.

    Raises:
        BundleError: the file is missing, altered or too large.
    """
    _check_size(Path(bundle_dir) / kernel.path, manifest, kernel.path, MAX_KERNEL_BYTES)
    return read_file(bundle_dir, manifest, kernel.path)


def write_flow_kernels(path: str | os.PathLike[str], kernels: KernelSet) -> None:
    """Write the index, atomically, as what ``KernelSet.from_json`` accepts; equal sets give equal bytes.

    Raises:
        BundleError: the set is not one that could be read back.
        ConfigError: the file cannot be written.
    """
    data = kernels.to_json()
    KernelSet.from_json(data, path)
    with staged_file(Path(path)) as partial:
        partial.write_bytes(data)


@functools.cache
def kernel_arguments(kernel: str) -> tuple[tuple[str, ArgumentKind], ...] | None:
    """Name and kind of a kernel's arguments, as the flow's launches pass them; None: they are not fixed here."""
    if kernel == LOGITS:
        pointers = ("features", "classes", LOGITS)
        features, classes, logits = ((name, _POINTER) for name in pointers)
        return (features, classes, ("logit_scale", _FLOAT32), logits, ("n", _INT32), ("num_classes", _INT32))
    for launch in flow_launches(rows=1, dim=1, num_blocks=1, step_size=1.0, read_steps=(1, 2)):
        if launch.kernel == kernel:
            return tuple(
                (name, _POINTER if isinstance(value, Place) else _FLOAT32 if isinstance(value, float) else _INT32)
                for name, value in launch.arguments.items()
            )
    return None


_POINTER: ArgumentKind = "pointer"
_INT32: ArgumentKind = "int32"
_FLOAT32: ArgumentKind = "float32"
_KERNELS = (*FLOW_KERNELS, LOGITS, PERSISTENT)
_BINARY = re.compile(r"(sm_\d{2,3}/[a-z0-9_]{1,64}\.cubin)|(ptx/[a-z0-9_]{1,64}\.ptx)")


def _target(name: str, values: object, where: str) -> KernelTarget:
    if not isinstance(values, dict):
        raise BundleError(f"{where}: expected an object; {AGAIN}")
    _check_keys(values, _TARGET, where)
    expected = ("ptx", PTX_TARGET) if values["kind"] == "ptx" else ("cubin", f"sm_{values['arch']}")
    if name != expected[1]:
        raise BundleError(f"{where}: a {values['kind']} of {values['arch']} is called {expected[1]!r}; {AGAIN}")
    kernels = tuple(
        _kernel(kernel, values["kind"], name, f"{where}: kernel {index}")
        for index, kernel in enumerate(values["kernels"])
    )
    return KernelTarget(name, values["arch"], values["kind"], kernels)


def _kernel(values: object, kind: str, target: str, where: str) -> CompiledKernel:
    if not isinstance(values, dict):
        raise BundleError(f"{where}: expected an object; {AGAIN}")
    _check_keys(values, _KERNEL, where)
    _check_keys(values["tile"], _TILE, f"{where}: tile")
    tile = KernelTile(**values["tile"])
    arguments = tuple((name, kind) for name, kind in values["arguments"])
    expected = kernel_arguments(values["kernel"])
    if expected is not None and arguments != expected:
        raise BundleError(f"{where}: {values['kernel']} has the arguments {expected}, got {arguments}; {NEWER}")
    if not values["file"].startswith(f"{target}/"):
        raise BundleError(f"{where}: 'file' must lie in {target}/, got {values['file']!r}; {AGAIN}")
    if values["threads"] != 32 * tile.warps:
        raise BundleError(
            f"{where}: {tile.warps} warps have {32 * tile.warps} threads, got {values['threads']}; {AGAIN}"
        )
    if values["cooperative"] != (values["kernel"] == PERSISTENT):
        raise BundleError(f"{where}: {PERSISTENT}, and no other kernel, is 'cooperative'; {AGAIN}")
    measured = (values["registers"] is not None, values["stack"] is not None)
    if measured != (kind == "cubin",) * 2:
        raise BundleError(f"{where}: a cubin has 'registers' and 'stack', PTX has null; {AGAIN}")
    return CompiledKernel(**{**values, "tile": tile, "arguments": arguments})


def _check_complete(target: KernelTarget, row_classes: tuple[int | None, ...], where: str) -> None:
    """Every kernel of every row class once; the flow's kernels with the same column tiles, which their stats share."""
    found = [(kernel.kernel, kernel.row_class) for kernel in target.kernels]
    needed = {(name, row_class) for name in (*FLOW_KERNELS, LOGITS) for row_class in row_classes}
    allowed = needed | {(PERSISTENT, row_class) for row_class in row_classes}
    if len(set(found)) != len(found) or not needed <= set(found) <= allowed:
        raise BundleError(
            f"{where}: expected {', '.join((*FLOW_KERNELS, LOGITS))} once for each of the row classes "
            f"{list(row_classes)}, and {PERSISTENT} at most once; {AGAIN}"
        )
    for row_class in row_classes:
        columns = {
            kernel.tile.columns
            for kernel in target.kernels
            if kernel.row_class == row_class and kernel.kernel in FLOW_KERNELS
        }
        if len(columns) != 1:
            raise BundleError(
                f"{where}: {', '.join(FLOW_KERNELS)} need the same 'columns', got {sorted(columns)}; {AGAIN}"
            )


def _check_keys(values: dict[str, Any], checks: Mapping[str, tuple[str, Callable[[Any], bool]]], where: str) -> None:
    for key, (expected, holds) in checks.items():
        if key not in values:
            raise BundleError(f"{where}: the key {key!r} is missing; {AGAIN}")
        if not holds(values[key]):
            raise BundleError(f"{where}: {key!r} must be {expected}, got {repr(values[key])[:80]}; {AGAIN}")
    for key in values:
        if key not in checks:
            raise BundleError(f"{where}: unknown key {key!r}; {NEWER}")


def _check_size(path: Path, manifest: Manifest, name: str, most: int) -> None:
    size = manifest.files[name]["size"] if name in manifest.files else 0
    if size > most:
        raise BundleError(f"{path}: {size} bytes, more than the {most} allowed; {AGAIN}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(least: int, most: int, *, step: int = 1) -> Callable[[object], bool]:
    return lambda value: _is_int(value) and least <= value <= most and value % step == 0


def _power(least: int, most: int) -> tuple[str, Callable[[object], bool]]:
    return (
        f"a power of two from {least} to {most}",
        lambda value: _is_int(value) and least <= value <= most and value & (value - 1) == 0,
    )


def _matches(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _one_of(*names: str) -> tuple[str, Callable[[object], bool]]:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def _is_row_classes(value: object) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= 8 or value[-1] is not None:
        return False
    bounds = value[:-1]
    return all(map(_within(1, 2**20), bounds)) and bounds == sorted(set(bounds))


def _is_arguments(value: object) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 64
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        and all(_matches(r"[a-z][a-z0-9_]{0,31}")(name) for name, _ in value)
        and all(isinstance(kind, str) and kind in (_POINTER, _INT32, _FLOAT32) for _, kind in value)
        and len({name for name, _ in value}) == len(value)
    )


def _is_versions(value: object) -> bool:
    required = {"triton", "ptxas"}
    return (
        isinstance(value, dict)
        and required <= set(value) <= {*required, "ptxas_blackwell"}
        and all(map(_matches(r"[\w.+-]{1,64}"), value.values()))
    )


def _or_none(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


_SET: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format_version": ("a whole number", _is_int),
    "dim": (f"a multiple of 16 from {MIN_DIM} to {MAX_DIM}", _within(MIN_DIM, MAX_DIM, step=16)),
    "dtype": _one_of(*KERNEL_DTYPES),
    "compiler": ("the versions of triton, ptxas and perhaps ptxas_blackwell", _is_versions),
    "row_classes": ("ascending whole numbers, then null", _is_row_classes),
    "targets": ("an object with 1 to 16 entries", lambda v: isinstance(v, dict) and 1 <= len(v) <= 16),
}
_TARGET: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch": ("a whole number from 80 to 999", _within(80, 999)),
    "kind": _one_of("cubin", "ptx"),
    "kernels": ("a list of 1 to 64 objects", lambda v: isinstance(v, list) and 1 <= len(v) <= 64),
}
_KERNEL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kernel": _one_of(*_KERNELS),
    "row_class": ("a whole number or null", _or_none(_within(1, 2**20))),
    "file": (
        "the relative path of a .cubin or .ptx file",
        lambda v: isinstance(v, str) and _BINARY.fullmatch(v) is not None,
    ),
    "entry": ("the name of a function", _matches(r"[A-Za-z_][A-Za-z0-9_$]{0,254}")),
    "sha256": ("a sha256 in hex", _matches(r"[0-9a-f]{64}")),
    "shared_memory": (f"a whole number from 0 to {MAX_SHARED_MEMORY}", _within(0, MAX_SHARED_MEMORY)),
    "threads": ("a multiple of 32 up to 1024", _within(32, 1024, step=32)),
    "tile": ("an object", lambda v: isinstance(v, dict)),
    "arguments": ("a list of [name, pointer, int32 or float32]", _is_arguments),
    "registers": ("a whole number from 1 to 255 or null", _or_none(_within(1, 255))),
    "stack": ("a whole number up to 65536 or null", _or_none(_within(0, 65536))),
    "cooperative": ("true or false", lambda v: isinstance(v, bool)),
}
_TILE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rows": _power(1, 1024),
    "columns": _power(1, 1024),
    "depth": _power(1, 1024),
    "warps": _power(1, 32),
    "stages": ("a whole number from 1 to 16", _within(1, 16)),
}
