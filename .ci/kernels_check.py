"""Compile every kernel for every architecture, twice, with no card, and hold what a compiled kernel has to be.

The flow's kernels at the demo's width (128) and at 512, and those of the Gram loss: within three minutes on two cores,
nothing spilled, shared memory within each card's limit (`fastfsl.kernels.aot` refuses the rest), wgmma wherever sm_90
has large tiles, no paths inside, and every byte the same in the second build.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastfsl.errors import ConfigError
from fastfsl.kernels.aot import Built, Job, compile_jobs, flow_jobs
from fastfsl.kernels.tiles import ARCHITECTURES, SHARED_MEMORY

MOST_SECONDS = 180
# Tensor cores of sm_90 multiply 64 rows at a time; smaller tiles are left to the older instruction.
WGMMA_ROWS = 64
PATHS = re.compile(rb"/(?:tmp|home|root|usr|opt|var|work)\b|site-packages|\.py\b")


def main() -> int:
    """Print the table, and what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512], help="widths of the flows")
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--once", action="store_true", help="do not build a second time")
    options = parser.parse_args()

    jobs = [
        job
        for dim in options.dims
        for target in flow_jobs(dim, options.dtype, ARCHITECTURES).values()
        for job in target.values()
    ]
    try:
        started = time.monotonic()
        built = compile_jobs(jobs)
        took = time.monotonic() - started
        again = built if options.once else compile_jobs(reversed(jobs))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1

    _table(built)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{len(built)} kernels compiled in {took:.0f} s on {cores} cores, {sum(map(_size, built.values())) >> 10} KiB"
    )
    problems = list(_problems(built, again))
    if took > MOST_SECONDS:
        problems.append(f"compiling took {took:.0f} s, expected at most {MOST_SECONDS}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


def _table(built: dict[Job, Built]) -> None:
    print("arch     d  rows  columns  kernel   registers  shared memory  of")
    for job, one in sorted(built.items(), key=lambda item: (item[0].arch, item[0].dim, item[0].tile.rows)):
        print(
            f"sm_{job.arch:<4} {job.dim:>4} {job.tile.rows:>4} {job.tile.columns:>7}   {job.kernel:<8} "
            f"{one.registers:>9} {one.shared_memory:>13}  {SHARED_MEMORY[job.arch]}"
        )


def _problems(built: dict[Job, Built], again: dict[Job, Built]) -> Iterator[str]:
    for job, one in built.items():
        name = f"{job.kernel} for sm_{job.arch}, d = {job.dim}, {job.tile}"
        if again[job] != one:
            yield f"{name}: the second build differs"
        tensor_cores = job.arch == 90 and job.tile.rows >= WGMMA_ROWS and job.kernel != "logits"
        if tensor_cores and "wgmma.mma_async" not in one.ptx:
            yield f"{name}: expected wgmma"
        for data in (one.cubin, one.ptx.encode()):
            found = PATHS.search(data) or re.search(re.escape(os.fsencode(Path.home())), data)
            if found:
                yield f"{name}: holds the path {found[0]!r}"


def _size(one: Built) -> int:
    return len(one.cubin)


if __name__ == "__main__":
    sys.exit(main())
