"""The process that meets the mutants: it is told numbers, one a line, and answers each with a line of JSON.

It may die of a mutant, hang, or grow; whoever started it (`tests.fuzz.campaign`) sees that.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from fastfsl.errors import FastFSLError
from tests.fuzz import bundles, pictures

# Beyond this an allocation fails, which protects the machine; what counts is what the campaign measures.
MAX_ADDRESS_SPACE = 16 * 2**30


def run_bundle(seed: int, folders: tuple[Path, ...]) -> Callable[[int], None]:
    """What meets the mutants of these bundles."""
    bases = tuple(bundles.read_folder(folder) for folder in folders)

    def run(index: int) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            bundles.write_folder(bundles.mutant(bases, seed, index), Path(folder))
            bundles.exercise(Path(folder))

    return run


def run_image(seed: int) -> Callable[[int], None]:
    """What meets the mutants of the pictures."""
    pictures.seeds()
    return lambda index: pictures.exercise(*pictures.mutant(seed, index))


def run_bomb(folder: Path) -> Callable[[int], None]:
    """What meets the bombs, which lie in a folder: to make one takes more memory than a worker may have."""
    every = sorted(folder.iterdir())

    def run(index: int) -> None:
        path = every[index]
        pictures.exercise(path.suffix[1:], path.read_bytes(), pictures.PREPROCESSINGS[:1])

    return run


def _peak() -> int:
    """Bytes of memory that this process held at most; `getrusage` would begin with those of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(kind: str, seed: int, *folders: str) -> None:
    """Answer until there are no more numbers."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not answer
    os.dup2(1, 2)
    if kind == "bundles":
        run = run_bundle(seed, tuple(map(Path, folders)))
    else:
        run = run_image(seed) if kind == "images" else run_bomb(Path(folders[0]))
    for line in sys.stdin:
        index, started = int(line), time.perf_counter()
        answer = {"index": index, "outcome": "valid", "error": None, "message": ""}
        try:
            run(index)
        except FastFSLError as error:
            answer |= {"outcome": "refused", "error": type(error).__name__, "message": str(error)[:300]}
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            trace = traceback.format_exc()[-1500:]
            answer |= {"outcome": "untyped", "error": type(error).__name__, "message": trace}
        answer["seconds"] = time.perf_counter() - started
        answer["peak_bytes"] = _peak()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
