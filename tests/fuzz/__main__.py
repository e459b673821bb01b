"""`python -m tests.fuzz bundles|images|bombs`, from the repository's root: mutants, and what became of them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz import bundles, pictures
from tests.fuzz.campaign import Campaign

RESULTS = Path("benchmarks/results/fuzz.json")


def main() -> int:
    """Run a campaign; 1 if anything happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=("bundles", "images", "bombs"))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first mutant: a campaign may come in slices"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after as many")
    parser.add_argument("--bundle", type=Path, action="append", help="instead of the golden ones; may be repeated")
    parser.add_argument("--corpus", type=Path, help="folder for the mutants that were not survived")
    parser.add_argument("--save", action="store_true", help=f"add the result to {RESULTS}")
    options = parser.parse_args()

    campaign = Campaign(options.kind, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        indices = range(options.start, options.start + options.count)
        folders = tuple(options.bundle or bundles.BASES) if options.kind == "bundles" else ()
        if options.kind == "bombs":
            for index, (extension, data) in enumerate(pictures.bombs()):
                (Path(folder) / f"{index:02}.{extension}").write_bytes(data)
            indices, folders = range(index + 1), (Path(folder),)
        met = campaign.run(indices, folders, seconds=options.seconds)
    done: dict[str, Any] = {
        "start": options.start,
        "mutants": met,
        "seed": options.seed,
        "outcomes": dict(campaign.outcomes.most_common()),
        "findings": len(campaign.findings),
        "slowest_seconds": round(campaign.slowest, 2),
        "peak_megabytes": round(campaign.peak_bytes / 1e6),
        "refused_for_lack_of_memory": campaign.out_of_memory,
    }
    if options.kind == "bundles":
        bases = tuple(bundles.read_folder(folder) for folder in folders)
        for key, numbers in (("altered", indices[:met]), ("altered_and_valid", campaign.valid)):
            files = Counter(bundles.altered_file(bases, options.seed, index) or "several" for index in numbers)
            done[key] = dict(files.most_common())
    sys.stdout.write(json.dumps({"kind": options.kind, **done}) + "\n")
    for finding in campaign.findings:
        sys.stdout.write(json.dumps(finding) + "\n")
        if options.corpus is not None:
            _keep(options.corpus, options.kind, folders, options.seed, finding["index"])
    if options.save:
        _save(options.kind, done)
    return int(bool(campaign.findings))


def _keep(corpus: Path, kind: str, folders: tuple[Path, ...], seed: int, index: int) -> None:
    target = corpus / f"{kind}-{seed}-{index}"
    if kind == "bundles":
        bases = tuple(bundles.read_folder(folder) for folder in folders)
        bundles.write_folder(bundles.mutant(bases, seed, index), target)
    elif kind == "images":
        extension, data = pictures.mutant(seed, index)
        corpus.mkdir(parents=True, exist_ok=True)
        target.with_suffix(f".{extension}").write_bytes(data)


def _save(kind: str, done: dict[str, Any]) -> None:
    """Put this slice in the place of one that began at the same number."""
    from benchmarks.conftest import made_with

    saved: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    slices = [one for one in saved.get(kind, []) if (one["start"], one["seed"]) != (done["start"], done["seed"])]
    saved[kind] = sorted([*slices, done], key=lambda one: (one["seed"], one["start"]))
    saved["made_with"] = made_with("python -m tests.fuzz bundles --save && python -m tests.fuzz images --save")
    RESULTS.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
