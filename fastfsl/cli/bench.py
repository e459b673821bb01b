"""`fastfsl bench`: how fast a bundle is on this machine, stage by stage."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastfsl.cli.checks import check_images, check_is_bundle
from fastfsl.cli.options import ExpectedDigest, WideInt8
from fastfsl.cli.output import print_json, stdout, stdout_kept_clean
from fastfsl.cli.progress import reporting
from fastfsl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastfsl.bundle import Manifest
    from fastfsl.cli.stopwatch import Timed
    from fastfsl.runtime import Classifier
    from fastfsl.runtime.image_reader import ImageReader

BENCH_FILE, REPORT_FILE = "bench.json", "report.html"
WHOLE = "whole"
_MAX_BATCH = 65536
# Distinct images, taken in turn: enough that no cache holds what is decoded.
_MAX_IMAGES = 64
# The stages are timed for this part of the time of the whole.
_STAGE_SHARE = 0.3


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle made by `fastfsl export`.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8,32",
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to classify.  [default: JPEG files of 500 x 375, made up]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. auto takes the GPU where it comes up.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time to measure each batch size for.")] = 3.0,
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operator.  [default: what this process may use]")
    ] = None,
    flow: Annotated[
        Literal["auto", "compiled", "onnx"], typer.Option(help="What computes the flow, as for predict.")
    ] = "auto",
    preprocess: Annotated[
        Literal["exact", "fast"], typer.Option(help="How images are decoded and resized, as for predict.")
    ] = "exact",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"Folder to make for {BENCH_FILE} and {REPORT_FILE}.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the results of an earlier bench.")] = False,
    expected_digest: ExpectedDigest = None,
    wide_int8: WideInt8 = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure latency (p50, p95, p99 of a call), throughput, cold start and memory of a bundle.

    From image files to classes, and each stage by itself: decoding with preparation, the image encoder, the flow with
    the heads. The rounds of all batch sizes and stages take turns. A bundle without an image encoder is measured on
    features. Needs neither torch nor matplotlib.
    """
    from fastfsl.files import check_output

    sizes = parse_batches(batch)
    if not 0 < seconds <= 3600:
        raise ConfigError(f"--seconds must be above 0 and at most 3600, got {seconds:g}")
    check_is_bundle(bundle)
    if out is not None:
        check_output(out, marker=BENCH_FILE, force=force)
    if images is not None:
        check_images([images])
    options = {
        "device": device,
        "num_threads": num_threads,
        "max_batch": max(sizes),
        "flow": flow,
        "preprocess": preprocess,
        "expected_digest": expected_digest,
        "wide_int8": wide_int8,
    }
    with reporting() as reporter:
        document = run_bench(
            bundle, sizes, seconds, options, images, lambda done, total: reporter.stage("measuring", done, total)
        )
    if out is not None:
        _write(out, document, force=force)
    if as_json:
        print_json(document)
    else:
        _print_tables(document, out)


def run_bench(
    bundle: Path,
    sizes: Sequence[int],
    seconds: float,
    options: dict[str, Any],
    images: Path | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a bundle; what `--json` prints.

    Args:
        bundle: its folder.
        sizes: batch sizes, ascending.
        seconds: for each of them.
        options: of `Classifier.load`.
        images: folder of images; None: made up.
        on_progress: hears (done, total).
    """
    from fastfsl.bundle import read_manifest
    from fastfsl.cli.doctor import PACKAGES, installed
    from fastfsl.cli.fresh_process import start_up
    from fastfsl.cli.machine import threads
    from fastfsl.cli.stopwatch import measure
    from fastfsl.runtime import Classifier
    from fastfsl.runtime.processor import processor

    manifest = read_manifest(bundle, options.get("expected_digest"))
    if images is not None and manifest.preprocessing is None:
        raise ConfigError("--images: this bundle was trained on features and takes no images; leave it out")
    with tempfile.TemporaryDirectory(prefix="fastfsl-bench-") as folder, stdout_kept_clean():
        inputs = _inputs(manifest, images, Path(folder), max(sizes))
        with Classifier.load(bundle, **options) as classifier, _reader(manifest, options) as reader:
            described = classifier.describe()
            calls = [call for size in sizes for call in _calls(classifier, reader, inputs, size, seconds)]
            measure(calls, on_progress=on_progress)
        started = start_up(bundle, options, inputs, max(sizes))
    provider = _provider(described)
    return {
        "bundle": str(bundle),
        "digest": described["digest"],
        "rows": [{**call.figures(), "provider": provider} for call in calls if call.name == WHOLE],
        "stages": [{"stage": call.name, **call.figures()} for call in calls if call.name != WHOLE],
        "cold_start": {name: value for name, value in started.items() if name.endswith("_s")},
        "memory": {name: value for name, value in started.items() if name.endswith("_bytes")},
        "inputs": "features" if manifest.preprocessing is None else "made-up JPEG files" if images is None else "files",
        "num_inputs": len(inputs),
        "seconds": seconds,
        "described": described,
        "metrics": manifest.metrics,
        "parity": manifest.parity,
        "processor": processor(),
        "threads": threads(),
        "versions": {name: version for name, version in installed(PACKAGES).items() if version is not None},
    }


def parse_batches(text: str) -> list[int]:
    """Batch sizes in ascending order, each once.

    Raises:
        ConfigError: something else than whole numbers from 1 on, with commas between.
    """
    parts = [part.strip() for part in text.split(",")]
    sizes = [int(part) if part.isascii() and part.isdigit() and len(part) < 9 else 0 for part in parts]
    if not all(1 <= size <= _MAX_BATCH for size in sizes):
        raise ConfigError(f"--batch: expected whole numbers from 1 to {_MAX_BATCH} such as 1,8,32, got {text!r}")
    return sorted(set(sizes))


def _inputs(manifest: "Manifest", images: Path | None, folder: Path, count: int) -> list[Any]:
    """Paths of images, or unit features, at least `count`."""
    import numpy as np

    if manifest.preprocessing is None:
        rows = np.random.default_rng(0).normal(size=(count, manifest.embed_dim))
        features: list[Any] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).round(6).tolist()
        return features
    if images is None:
        paths = make_images(folder, min(count, _MAX_IMAGES))
    else:
        from fastfsl.cli.image_inputs import find_images

        paths = find_images([images])[: max(count, _MAX_IMAGES)]
    return [str(paths[index % len(paths)].absolute()) for index in range(max(count, len(paths)))]


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of 500 x 375 with as much detail as photos have, the same each time."""
    import numpy as np

    from fastfsl.images.pillow import pillow

    image = pillow()
    paths = []
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.normal(0, 6, smooth.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index:05d}.jpg")
        image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


@contextmanager
def _reader(manifest: "Manifest", options: dict[str, Any]) -> "Iterator[ImageReader | None]":
    """What decodes and prepares images as the classifier's own reader does; None for features."""
    from fastfsl.images import Preprocessing
    from fastfsl.runtime.image_reader import ImageReader

    if manifest.preprocessing is None:
        yield None
        return
    reader = ImageReader(Preprocessing.from_dict(manifest.preprocessing), preprocess=options["preprocess"])
    with closing(reader):
        yield reader


def _calls(
    classifier: "Classifier", reader: "ImageReader | None", inputs: list[Any], size: int, seconds: float
) -> "list[Timed]":
    """What is timed at a batch size: the whole and, from images, its stages."""
    import numpy as np

    from fastfsl.cli.stopwatch import Timed

    if reader is None:
        rows = np.array(inputs[:size], np.float32)
        return [Timed(WHOLE, size, lambda: classifier.classify_features(rows), seconds)]
    turns = _Turns(inputs, size)
    ((pixels, errors),) = reader.batches(inputs[:size], size)
    for error in errors:
        if error is not None:
            raise DataError(f"{error}; leave it out of --images")
    embeds = classifier.embed(pixels)
    part = seconds * _STAGE_SHARE
    return [
        Timed(WHOLE, size, lambda: classifier.predict(turns.next()), seconds),
        Timed("decode and prepare", size, lambda: list(reader.batches(turns.next(), size)), part),
        # Pixels of the encoder's own size: what is left of the preparation costs next to nothing.
        Timed("encoder", size, lambda: classifier.embed(pixels), part),
        Timed("flow and heads", size, lambda: classifier.feature_probabilities(embeds), part),
    ]


class _Turns:
    """Lists of `size` inputs, one after the other, round and round."""

    def __init__(self, inputs: list[Any], size: int) -> None:
        self._inputs, self._size, self._start = inputs, size, 0

    def next(self) -> list[Any]:
        start, self._start = self._start, (self._start + self._size) % len(self._inputs)
        taken = self._inputs[start : start + self._size]
        return taken + self._inputs[: self._size - len(taken)]


def _provider(described: dict[str, Any]) -> str:
    """What the first graph really computes on; numpy where a bundle has none."""
    providers: dict[str, list[str]] = described["providers"]
    return next(iter(providers.values()), ["numpy"])[0]


def _write(out: Path, document: dict[str, Any], *, force: bool) -> None:
    from fastfsl.cli.bench_report import bench_sections
    from fastfsl.files import staged_directory
    from fastfsl.report import write_report

    with staged_directory(out, marker=BENCH_FILE, force=force) as staging:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        (staging / BENCH_FILE).write_bytes((text + "\n").encode(errors="backslashreplace"))
        footer = f"fastfsl {document['versions'].get('fastfsl', '')}, bundle {document['digest'][:12]}"
        write_report(
            staging / REPORT_FILE, f"fastfsl bench: {document['bundle']}", bench_sections(document), footer=footer
        )


def _print_tables(document: dict[str, Any], out: Path | None) -> None:
    from rich.table import Table

    rows = [{"stage": WHOLE, **row} for row in document["rows"]] + document["stages"]
    table = Table(title=f"{document['bundle']} on {document['rows'][0]['provider']}", title_justify="left")
    for index, header in enumerate(("", "batch", "p50 ms", "p95 ms", "p99 ms", "images/s", "rounds")):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        times = (f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        table.add_row(row["stage"], str(row["batch"]), *times, f"{row['images_per_second']:.1f}", str(row["rounds"]))
    stdout().print(table)
    start, memory = document["cold_start"], document["memory"]
    stdout().print(
        f"Cold start {start['beyond_onnxruntime_s']:.2f} s beyond import onnxruntime "
        f"({start['import_onnxruntime_s']:.2f} s): import {start['import_runtime_s']:.2f}, load {start['load_s']:.2f}, "
        f"first prediction {start['first_prediction_s']:.2f}.",
        soft_wrap=True,
    )
    if memory["peak_bytes"] is not None:
        stdout().print(
            f"Memory {memory['loaded_bytes'] / 1e6:.0f} MB when loaded, {memory['peak_bytes'] / 1e6:.0f} MB at most.",
            soft_wrap=True,
        )
    if out is not None:
        stdout().print(f"Report: {out / REPORT_FILE}", soft_wrap=True)
