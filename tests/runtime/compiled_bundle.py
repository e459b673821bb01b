"""Bundles of a small random flow with compiled kernels, whose binaries `fake_driver` understands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastfsl.bundle import PlanArrays, flow_kernels
from fastfsl.bundle.flow_kernels import CompiledKernel, KernelSet, KernelTarget, KernelTile
from fastfsl.bundle.flow_launches import FLOW_KERNELS
from fastfsl.bundle.flow_weights import FlowWeights, write_flow_weights
from fastfsl.bundle.manifest import FLOW_KERNELS_FOLDER, FLOW_KERNELS_INDEX, FLOW_KERNELS_WEIGHTS

DIM, CLASSES, SCALE, STEP = 128, 4, 20.0, 0.1
# Few rows, so that every class is computed in a test.
ROW_CLASSES = (8, 32, None)
_TILES = {8: KernelTile(16, 128, 64, 4, 3), 32: KernelTile(32, 128, 64, 4, 2), None: KernelTile(32, 64, 64, 8, 2)}


@dataclass(frozen=True)
class Flow:
    """A random plan, and what its states are compared with."""

    plan: PlanArrays
    class_embeddings: np.ndarray
    read_steps: tuple[int, ...]

    @property
    def prototypes(self) -> int:
        return self.class_embeddings.shape[1] if self.class_embeddings.ndim == 3 else 1


def random_flow(*, blocks: int = 1, steps: int = 2, read_steps: tuple[int, ...] = (), prototypes: int = 1) -> Flow:
    """Nothing in it is zero, as gates and the last layer are before training."""
    rng = np.random.default_rng(11)

    def noise(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    def weight(*shape: int) -> np.ndarray:
        return noise(*shape, DIM, DIM, scale=DIM**-0.5)

    input_weight, output_weight, output_bias = weight(), 0.3 * weight(), noise(DIM, scale=0.1)
    block_table, final_table = noise(steps, blocks, 3, DIM, scale=0.3), noise(steps, 2, DIM, scale=0.3)
    block_table[:, :, 0] += 1
    final_table[:, 0] += 1
    plan = PlanArrays(
        step_size=STEP,
        input_weight=input_weight,
        input_bias=noise(DIM, scale=0.1),
        first_weight=weight(blocks),
        first_bias=noise(blocks, DIM, scale=0.1),
        second_weight=weight(blocks),
        second_bias=noise(blocks, DIM, scale=0.1),
        output_weight=output_weight,
        output_bias=output_bias,
        carry_weight=input_weight @ output_weight,
        carry_bias=input_weight @ output_bias,
        block_table=block_table,
        final_table=final_table,
    )
    classes = noise(CLASSES, DIM) if prototypes == 1 else noise(CLASSES, prototypes, DIM)
    return Flow(plan, classes / np.linalg.norm(classes, axis=-1, keepdims=True), read_steps)


def write_compiled(
    write: Callable[..., Path],
    target: Path,
    flow: Flow,
    *,
    architectures: tuple[int, ...] = (80, 90),
    ptx: bool = True,
    shared_memory: int = 60 << 10,
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    weights: Flow | None = None,
    **fields: Any,
) -> Path:
    """A bundle of a flow with kernels.

    Args:
        write: the fixture.
        target: the bundle's folder.
        flow: what the ONNX graph computes.
        architectures: that have cubins.
        ptx: there is PTX of the lowest.
        shared_memory: of every kernel.
        change: alters the images, one after the other.
        weights: what the kernels compute instead of `flow`.
        **fields: as `write` takes them.
    """
    from fastfsl.export.flow_graph import flow_graph

    graph = flow_graph(flow.plan, flow.class_embeddings, SCALE, read_steps=flow.read_steps or None)
    compiled = weights or flow

    def add(staging: Path) -> None:
        targets = [_target(staging, "cubin", arch, shared_memory, change) for arch in architectures]
        if ptx:
            targets.append(_target(staging, "ptx", min(architectures), shared_memory, change))
        versions = {"triton": "0", "ptxas": "0"}
        kernels = KernelSet(DIM, "fp16", versions, ROW_CLASSES, {one.name: one for one in targets})
        flow_kernels.write_flow_kernels(staging / FLOW_KERNELS_INDEX, kernels)
        rounded = FlowWeights.from_plan(compiled.plan, "fp16", compiled.class_embeddings, SCALE)
        write_flow_weights(staging / FLOW_KERNELS_WEIGHTS, rounded)

    described = {"architectures": [f"sm_{arch}" for arch in architectures], "dtype": "fp16"}
    return write(
        target,
        flow=graph.SerializeToString(),
        embed_dim=DIM,
        num_steps=flow.plan.num_steps,
        step_size=flow.plan.step_size,
        read_steps=flow.read_steps,
        kernels=described,
        add=add,
        **fields,
    )


def _target(
    staging: Path,
    kind: Literal["cubin", "ptx"],
    arch: int,
    shared_memory: int,
    change: Callable[[dict[str, Any]], None],
) -> KernelTarget:
    from fastfsl.kernels.flow_kernels import KINDS

    name = "ptx" if kind == "ptx" else f"sm_{arch}"
    kernels = []
    for row_class, tile in _TILES.items():
        for kernel in (*FLOW_KERNELS, flow_kernels.LOGITS):
            arguments = flow_kernels.kernel_arguments(kernel)
            assert arguments is not None
            sizes = {key: getattr(tile, key) for key in ("rows", "columns", "depth", "warps", "stages")}
            image = {
                "kernel": kernel,
                "entry": f"{kernel}_kernel",
                "kind": kind,
                "arch": arch,
                "parameters": {parameter: KINDS[parameter] for parameter, _ in arguments},
                "tile": sizes,
                "dim": DIM,
                "threads": 32 * tile.warps,
                "shared_memory": shared_memory,
                "cooperative": False,
            }
            change(image)
            data = json.dumps(image).encode()
            file = f"{name}/{kernel}_{row_class or 'any'}.{kind}"
            path = staging / FLOW_KERNELS_FOLDER / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            measured = None if kind == "ptx" else 0
            kernels.append(
                CompiledKernel(
                    kernel=kernel,
                    row_class=row_class,
                    file=file,
                    entry=f"{kernel}_kernel",
                    sha256=hashlib.sha256(data).hexdigest(),
                    shared_memory=shared_memory,
                    threads=32 * tile.warps,
                    tile=tile,
                    arguments=arguments,
                    registers=None if measured is None else 64,
                    stack=measured,
                    cooperative=False,
                )
            )
    return KernelTarget(name, arch, kind, tuple(kernels))
