"""Compile every kernel for every architecture, with no card, and hold what a compiled kernel has to be.

The flow's kernels at the demo's width (128) and at 512 within three minutes on two cores; those of the demo's width
again, because every byte has to be the same (of the PTX alone, where the system gives programs other addresses each
time whatever is asked: ptxas depends on them); the flow in one launch; and the Gram loss at 768. None may spill or need
more shared memory than its card has, sm_90 has to use wgmma in large tiles, and no path may be inside.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastfsl.errors import ConfigError
from fastfsl.kernels import gram_tiles
from fastfsl.kernels.aot import flow_jobs
from fastfsl.kernels.aot_jobs import PERSISTENT_FAMILY, Built, Job, check_budgets, compile_jobs
from fastfsl.kernels.aot_worker import fix_addresses
from fastfsl.kernels.tiles import ARCHITECTURES, SHARED_MEMORY, persistent_tile

MOST_SECONDS = 180
# wgmma multiplies 64 rows at a time; smaller tiles are left to the older instruction.
WGMMA_ROWS = 64
# Products in float32 (TF32), and passes over memory.
WITHOUT_WGMMA = ("logits", "rows", "finish")
PATHS = re.compile(rb"/(?:tmp|home|root|usr|opt|var|work)\b|site-packages|\.py\b")


def main() -> int:
    """Print the table, and what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=[128, 512], help="widths of the flows")
    parser.add_argument("--gram-dims", type=int, nargs="*", default=[768], help="widths of the Gram losses")
    parser.add_argument(
        "--gram-archs",
        type=int,
        nargs="*",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="architectures of the Gram losses; the flow's kernels are always built for all",
    )
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--twice", action="store_true", help="build all flows again, not the narrowest alone")
    options = parser.parse_args()

    flow = [
        job
        for dim in options.dims
        for target in flow_jobs(dim, options.dtype, ARCHITECTURES).values()
        for job in target.values()
    ]
    again = flow if options.twice else [job for job in flow if job.dim == min(options.dims)]
    in_one = [
        Job("persistent", dim, options.dtype, arch, persistent_tile(dim, options.dtype), True, PERSISTENT_FAMILY)
        for dim in options.dims
        for arch in ARCHITECTURES
    ]
    gram = [
        Job(variant.name, dim, options.dtype, arch, variant.tile, family=gram_tiles.FAMILY)
        for dim in options.gram_dims
        for arch in options.gram_archs
        for variant in gram_tiles.gram_variants(arch, options.dtype, dim)
    ]
    same_addresses = fix_addresses()
    if not same_addresses:
        print("programs get other addresses each time here: of the second builds the PTX is compared, not the cubin")
    problems = []
    built: dict[Job, Built] = {}
    for what, jobs in (
        ("flow", flow),
        ("flow, again", again[::-1]),
        ("flow in one launch", in_one),
        ("Gram loss", gram),
    ):
        if not jobs:
            continue
        started = time.monotonic()
        try:
            found = compile_jobs(jobs)
        except ConfigError as error:
            problems.append(str(error))
            continue
        took, cores = time.monotonic() - started, len(os.sched_getaffinity(0))
        print(f"{what}: {len(found)} kernels in {took:.0f} s on {cores} cores", flush=True)
        if what == "flow" and took > MOST_SECONDS:
            problems.append(f"compiling the flow's kernels took {took:.0f} s, expected at most {MOST_SECONDS}")
        problems += [
            f"{_name(job)}: the second build differs"
            for job in found
            if job in built and not _same(built[job], found[job], every_byte=same_addresses)
        ]
        built |= found
    try:
        check_budgets(built)
    except ConfigError as error:
        problems.append(str(error))
    _table(built)
    problems += _problems(built)
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


def _same(first: Built, second: Built, *, every_byte: bool) -> bool:
    return first == second if every_byte else first.ptx == second.ptx


def _table(built: dict[Job, Built]) -> None:
    """The heaviest of each kernel, over its compile-time constants."""
    heaviest: dict[tuple[str, int, int, int, int], Built] = {}
    for job, one in built.items():
        key = (job.kernel.split()[0], job.dim, job.arch, job.tile.rows, job.tile.columns)
        if key not in heaviest or heaviest[key].registers < one.registers:
            heaviest[key] = one
    print("kernel       d  architecture   tile      registers  shared memory of")
    for (kernel, dim, arch, rows, columns), one in sorted(heaviest.items()):
        tile = f"{rows} x {columns}"
        print(
            f"{kernel:<8} {dim:>5}  sm_{arch:<10} {tile:<10} {one.registers:>8} {one.shared_memory:>14} "
            f"{SHARED_MEMORY[arch]}"
        )


def _problems(built: dict[Job, Built]) -> Iterator[str]:
    for job, one in built.items():
        large = job.arch == 90 and job.tile.rows >= WGMMA_ROWS and job.kernel.split()[0] not in WITHOUT_WGMMA
        if large and "wgmma.mma_async" not in one.ptx:
            yield f"{_name(job)}: expected wgmma"
        if f".reqntid {32 * job.tile.warps}\n" not in one.ptx:
            yield f"{_name(job)}: expected {job.tile.warps} warps"
        for data in (one.cubin, one.ptx.encode()):
            found = PATHS.search(data) or re.search(re.escape(os.fsencode(Path.home())), data)
            if found:
                yield f"{_name(job)}: holds the path {found[0]!r}"


def _name(job: Job) -> str:
    return f"{job.kernel} for sm_{job.arch}, d = {job.dim}, {job.dtype}, {job.tile}"


if __name__ == "__main__":
    sys.exit(main())
