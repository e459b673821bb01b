"""Memory of `fastfsl predict --output` over many images: it must not grow.

`python -m benchmarks.bulk_memory [--photos FOLDER] [--images 10000] [--backbone ViT-B-32] [--save-results]` writes
benchmarks/results/bulk_memory_BACKBONE.json. The photographs are cycled; one row in a hundred is an unreadable file.
The run has a process of its own, in which torch is never imported, and its resident memory is read after every 32
images. The first tenth of them is the warm-up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

PAGE = 4096
GROWTH = 0.05


def measure(bundle: Path, listed: Path, output: Path, total: int, preprocess: str) -> dict[str, Any]:
    """In a process of its own: classify what is listed, and look at the memory as it goes."""
    from fastfsl.cli.bulk import BulkOutput, classify
    from fastfsl.cli.image_inputs import listed_images
    from fastfsl.runtime import Classifier

    classifier = Classifier.load(bundle, device="cpu", preprocess=preprocess)
    resident: list[tuple[int, int]] = []
    files = len(list(Path("/proc/self/fd").iterdir()))
    with BulkOutput(output).rows({}, 32) as rows:
        counts = classify(
            classifier,
            listed_images(listed),
            rows,
            top_k=5,
            on_error="mark",
            progress=lambda done: resident.append((done, _resident())),
        )
    warm = max(size for done, size in resident if done <= total // 10)
    peak = max(size for done, size in resident)
    return {
        "images": counts.images,
        "unreadable": counts.errors,
        "images_per_second": round(counts.rate, 1),
        "resident_mb": {
            "after_warm_up": round(warm / 2**20, 1),
            "at_the_end": round(resident[-1][1] / 2**20, 1),
            "peak": round(peak / 2**20, 1),
        },
        "growth": round(peak / warm - 1, 4),
        "open_files_more_than_before": len(list(Path("/proc/self/fd").iterdir())) - files,
        "output_bytes": output.stat().st_size,
        "torch_imported": "torch" in sys.modules,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def run(photos: str | None, images: int, backbone: str, preprocess: str) -> dict[str, Any]:
    """Make the bundle and the list, and measure in a child."""
    from benchmarks.photographs import photographs
    from benchmarks.random_vit import random_encoder, write_bundle
    from fastfsl.encoders import load_encoder

    encoder = load_encoder(backbone) if backbone == "tiny-clip" else random_encoder(backbone)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = write_bundle(folder / "bundle", encoder)
        bad = folder / "unreadable.jpg"
        bad.write_bytes(b"\xff\xd8\xff no photograph")
        files = cycle(photographs(photos, folder))
        names = [str(bad if index % 100 == 57 else file) for index, file in enumerate(islice(files, images))]
        (folder / "list.txt").write_text("\n".join(names), encoding="utf-8")
        arguments = [str(folder / name) for name in ("bundle", "list.txt", "rows.jsonl")]
        command = [sys.executable, "-m", "benchmarks.bulk_memory", "--child", *arguments, str(images), preprocess]
        assert bundle.is_dir()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"backbone": backbone, "preprocess": preprocess, **json.loads(done.stdout)}


def main() -> None:
    """Measure, print, and fail if the memory grew."""
    if sys.argv[1:2] == ["--child"]:
        bundle, listed, output, total, preprocess = sys.argv[2:]
        print(json.dumps(measure(Path(bundle), Path(listed), Path(output), int(total), preprocess)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--backbone", default="tiny-clip")
    parser.add_argument("--preprocess", default="exact")
    parser.add_argument("--save-results", action="store_true")
    options = parser.parse_args()
    result = run(options.photos, options.images, options.backbone, options.preprocess)
    print(json.dumps(result, indent=2))
    if options.save_results:
        from benchmarks.conftest import RESULTS, made_with

        photos = "" if options.photos is None else f" --photos {Path(options.photos).name}"
        command = f"python -m benchmarks.bulk_memory --images {options.images} --backbone {options.backbone}{photos}"
        name = f"bulk_memory_{options.backbone.lower().replace('-', '_')}.json"
        document = {**result, "made_with": made_with(command)}
        (RESULTS / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    assert result["images"] == options.images
    assert result["growth"] <= GROWTH, f"resident memory grew by {result['growth']:.1%}"
    assert result["open_files_more_than_before"] == 0
    assert not result["torch_imported"]


if __name__ == "__main__":
    main()
