"""Which of a bundle's compiled kernels a card runs, and those kernels on the card."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fastfsl.bundle.flow_kernels import (
    LOGITS,
    CompiledKernel,
    KernelSet,
    KernelTarget,
    read_flow_kernels,
    read_kernel,
)
from fastfsl.bundle.flow_launches import FLOW_KERNELS
from fastfsl.bundle.manifest import Manifest
from fastfsl.errors import DeviceError
from fastfsl.runtime.cuda_driver import Device, Kernel

# Older cards have no tensor-core instructions that the kernels could use; nothing is compiled for them.
_FIRST_ARCHITECTURE = 80
# From here on a binary uses instructions of its architecture alone and runs on no other.
_FIRST_EXCLUSIVE = 90


class FlowKernels:
    """The kernels of a target on a card, those for more rows loaded when the rows come.

    Args:
        device: the card.
        kernels: the bundle's.
        target: which of them.
        images: their binaries, by path.

    Attributes:
        name: of the target.

    Raises:
        DeviceError: the driver refuses one.
    """

    def __init__(self, device: Device, kernels: KernelSet, target: KernelTarget, images: Mapping[str, bytes]) -> None:
        self.name = target.name
        self.row_class = kernels.row_class
        self._device = device
        self._target = target
        self._images = images
        self._loaded: dict[int | None, dict[str, tuple[CompiledKernel, Kernel]]] = {}
        self.load(1)

    def load(self, rows: int) -> None:
        """Load the kernels for so many rows, if they are not.

        Raises:
            DeviceError: the driver refuses one.
        """
        row_class = self.row_class(rows)
        if row_class in self._loaded:
            return
        found = [kernel for name in (*FLOW_KERNELS, LOGITS) if (kernel := self._target.find(name, row_class))]
        self._loaded[row_class] = {kernel.kernel: (kernel, self._load(kernel)) for kernel in found}

    def column_tiles(self, name: str, rows: int, columns: int) -> int:
        """Tiles in a row of so many columns."""
        return -(-columns // self._loaded[self.row_class(rows)][name][0].tile.columns)

    def launch(self, name: str, rows: int, columns: int, values: Mapping[str, float]) -> None:
        """Launch a kernel.

        Args:
            name: which.
            rows: of the matrix it writes; they have been loaded for.
            columns: of that matrix.
            values: of its arguments by name; pointers as addresses.
        """
        compiled, kernel = self._loaded[self.row_class(rows)][name]
        grid = self.column_tiles(name, rows, columns), -(-rows // compiled.tile.rows)
        self._device.launch(kernel, grid, [*(values[argument] for argument, _ in compiled.arguments), 0, 0])

    def _load(self, compiled: CompiledKernel) -> Kernel:
        return self._device.load_kernel(
            self._images[compiled.path],
            compiled.entry,
            # Last come two pointers to Triton's scratch memory, of which there is none.
            [*(kind for _, kind in compiled.arguments), "pointer", "pointer"],
            threads=compiled.threads,
            shared_memory=compiled.shared_memory,
            cooperative=compiled.cooperative,
        )


def load_kernels(path: str | os.PathLike[str], manifest: Manifest, device: Device) -> FlowKernels:
    """Load a bundle's kernels: those made for the card, or others that it runs.

    Raises:
        BundleError: a file is altered, or contradicts the manifest.
        DeviceError: the bundle has no kernels, none for this card, or the driver refuses them.
    """
    kernels = read_flow_kernels(path, manifest)
    if kernels is None:
        raise DeviceError("the bundle has no compiled kernels; export it with --arch")
    refusals = []
    for target in targets_for(kernels, device.architecture, device.shared_memory):
        images = {kernel.path: read_kernel(path, manifest, kernel) for kernel in target.kernels}
        try:
            return FlowKernels(device, kernels, target, images)
        except DeviceError as error:
            refusals.append(f"{target.name}: {error}")
    card = f"sm_{device.architecture}"
    if refusals:
        raise DeviceError(f"{device.name} ({card}) refuses the bundle's kernels ({'; '.join(refusals)})")
    check_architecture(device)
    raise DeviceError(
        f"the bundle's kernels are for {', '.join(kernels.targets)}; {device.name} is {card}, with "
        f"{device.shared_memory >> 10} KiB of shared memory a block; export the bundle with --arch {card}"
    )


def check_architecture(device: Device) -> None:
    """Refuse a card that nothing is compiled for.

    Raises:
        DeviceError: it is too old.
    """
    if device.architecture < _FIRST_ARCHITECTURE:
        raise DeviceError(
            f"kernels are compiled for cards from sm_{_FIRST_ARCHITECTURE} on, {device.name} is "
            f"sm_{device.architecture}; choose flow='onnx'"
        )


def targets_for(kernels: KernelSet, architecture: int, shared_memory: int) -> list[KernelTarget]:
    """The targets that a card may run, best first: its own, older ones of its generation, PTX.

    Args:
        kernels: a bundle's.
        architecture: of the card, compute capability times ten.
        shared_memory: the most that a block may have there, bytes; all kernels of a target have to fit.
    """

    def runs(target: KernelTarget) -> bool:
        if target.kind == "ptx":
            return target.arch <= architecture
        if target.arch >= _FIRST_EXCLUSIVE:
            return target.arch == architecture
        return target.arch // 10 == architecture // 10 and target.arch <= architecture

    fitting = [
        target
        for target in kernels.targets.values()
        if runs(target) and all(kernel.shared_memory <= shared_memory for kernel in target.kernels)
    ]
    return sorted(fitting, key=lambda target: (target.kind == "ptx", -target.arch))
