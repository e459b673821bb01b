"""`fastfsl demo`: the whole product on the embedded default."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfsl.cli.output import print_json, stdout
from fastfsl.cli.progress import reporting
from fastfsl.cli.requirements import require_export
from fastfsl.cli.run_report import REPORT_FILE, prediction_parts, training_sections
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from fastfsl.encoders import Encoder
    from fastfsl.fit.config import TrainConfig
    from fastfsl.fit.run import Run
    from fastfsl.fit.train import Reporter
    from fastfsl.report import Part

DEMO_FILE = "demo.json"
_BATCHES = (1, 32)
_ROUNDS = {1: 60, 32: 12}


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for data, run and bundle.")] = Path("demo-out"),
    shots: Annotated[int, typer.Option(min=1, max=64, help="Images a class to train on.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of episode, views and training.")] = 0,
    method: Annotated[str, typer.Option(help="As for train: fma, auto, mps, mps+fma, lora, ...")] = "fma",
    force: Annotated[bool, typer.Option("--force", help="Replace the results of an earlier demo.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Adapt a tiny CLIP (pretrained on printed characters) to handwritten digits, export it, and classify 1000 scans.

    Everything needed is in the package. The table compares zero-shot CLIP, the trained method in torch, and the
    exported bundle in the runtime.
    """
    require_export()
    config = demo_config(shots, seed, method)
    _claim(out, force=force)
    with reporting() as reporter:
        document = run_demo(out, config, reporter=reporter)
    if as_json:
        print_json(document)
    else:
        _print_table(document, out)


def run_demo(out: Path, config: "TrainConfig", *, reporter: "Reporter") -> dict[str, Any]:
    """Data, run and bundle under `out`, and the figures of the table.

    Args:
        out: folder for everything; existing results in it are replaced.
        config: see `demo_config`.
        reporter: hears of progress and warnings.

    Returns:
        The document that `--json` prints: `rows`, `same_class`, `max_probability_error` and what led to them.
    """
    import numpy as np

    from fastfsl.data import read_folder
    from fastfsl.data.scoring import images_to_score
    from fastfsl.demo.digits import write_digits
    from fastfsl.encoders import class_embeddings
    from fastfsl.export.bundle_writer import export_run
    from fastfsl.fit.evaluate import base_encoder
    from fastfsl.fit.train import encode_plain, train
    from fastfsl.images import open_image
    from fastfsl.runtime import Classifier

    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    if not data.is_dir():
        write_digits(data)
    run = train(data, config, reporter=reporter, cache_dir=out / "cache")
    run.save(out / "run", force=True)
    export_run(run, out / "bundle", force=True, on_stage=reporter.stage)

    dataset = read_folder(data)
    images = images_to_score(
        dataset, "test", run.record.class_names, set(run.record.support_digests), reporter.warn
    ).samples
    labels = np.array([sample.label for sample in images])
    paths = [sample.path for sample in images]
    base = base_encoder(run)
    tuned = run.tuned(base)
    texts = class_embeddings(base, run.record.class_names, config.templates)
    zero_shot = (encode_plain(base, images, cache_dir=out / "cache") @ texts.T).argmax(axis=1)
    in_torch = run.probabilities(encode_plain(tuned, images, cache_dir=out / "cache"), lambda: base)
    classifier = Classifier.load(out / "bundle")
    in_runtime = classifier.probabilities(paths)

    pictures = [open_image(path) for path in paths[: max(_BATCHES)]]
    bundle_bytes = sum(file.stat().st_size for file in (out / "bundle").rglob("*") if file.is_file())
    steps = "" if run.num_steps is None else f", {run.num_steps} steps"
    rows = [
        {
            "name": "zero-shot CLIP, torch",
            "accuracy": float((zero_shot == labels).mean()),
            **latency(lambda batch: _encode(base, batch) @ texts.T, pictures),
            "size_bytes": _num_bytes(base.model),
        },
        {
            "name": f"{config.method}{steps}, torch",
            "accuracy": float((in_torch.argmax(axis=1) == labels).mean()),
            **latency(lambda batch: run.probabilities(_encode(tuned, batch), lambda: base), pictures),
            "size_bytes": _num_bytes(base.model) + 4 * run.record.num_parameters,
        },
        {
            "name": "the bundle, runtime",
            "accuracy": float((in_runtime.argmax(axis=1) == labels).mean()),
            **latency(classifier.probabilities, pictures),
            "size_bytes": bundle_bytes,
        },
    ]
    document = {
        "complete": True,
        "rows": rows,
        "num_samples": len(labels),
        "method": config.method,
        "shots": config.shots,
        "seed": config.seed,
        "num_steps": run.num_steps,
        "held_out_accuracy_by_step": run.record.selection.get("accuracy_by_step"),
        "same_class": int((in_torch.argmax(axis=1) == in_runtime.argmax(axis=1)).sum()),
        "max_probability_error": float(np.abs(in_torch - in_runtime).max()),
        "train_seconds": run.record.train_seconds,
        "versions": run.record.versions,
    }
    _write_report(out, run, document, prediction_parts(in_runtime, labels, run.record.class_names))
    (out / DEMO_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def _write_report(out: Path, run: "Run", document: dict[str, Any], predictions: "list[Part]") -> None:
    """The page: the demo's table, the bundle's predictions for the test scans, and what a training has to show."""
    from fastfsl.report import Section, Table, write_report

    header = ("", "accuracy, %", "ms/image, batch 1", "ms/image, batch 32", "size, MB")
    rows = [
        (
            row["name"],
            100 * row["accuracy"],
            row["ms_per_image_batch_1"],
            row["ms_per_image_batch_32"],
            row["size_bytes"] / 1e6,
        )
        for row in document["rows"]
    ]
    result, *rest = training_sections(run)
    sections = [
        Section("On the test scans", [Table(header, rows), _agreement(document)]),
        Section("The bundle's predictions for the test scans", predictions),
        Section("The training", result.parts),
        *rest,
    ]
    title = f"{document['shots']} images a class, {document['num_samples']} test scans"
    footer = f"fastfsl {run.record.versions['fastfsl']}, {run.record.created}"
    write_report(out / REPORT_FILE, f"fastfsl demo: {title}", sections, footer=footer)


def _agreement(document: dict[str, Any]) -> str:
    return (
        f"Runtime and torch agree on {document['same_class']} of {document['num_samples']} scans; "
        f"largest difference of a probability {document['max_probability_error']:.1e}."
    )


def demo_config(shots: int, seed: int, method: str = "fma", tuning: Mapping[str, Any] | None = None) -> "TrainConfig":
    """The configuration of the demo: the tiny CLIP, its prompts, and views that are never mirrored.

    Args:
        shots: images a class.
        seed: of everything random.
        method: as for `train`.
        tuning: options of the method's source beside the demo's own.

    Raises:
        ConfigError: there is no such method.
    """
    from fastfsl.demo.digits import AUGMENTATION, TEMPLATES, TUNING
    from fastfsl.fit.config import load_config
    from fastfsl.fit.methods import find_source

    source = find_source(method)
    options = {} if source is None else {source.name: {**TUNING.get(source.name, {}), **(tuning or {})}}
    return load_config(
        flags={
            "method": method,
            "shots": shots,
            "seed": seed,
            "backbone": "tiny-clip",
            "templates": list(TEMPLATES),
            "augmentation": dict(AUGMENTATION),
            "device": "cpu",
            **options,
        }
    )


def latency(classify: Callable[[list["Image.Image"]], Any], pictures: list["Image.Image"]) -> dict[str, float]:
    """Median milliseconds an image, from a decoded image to probabilities, by batch size.

    Args:
        classify: takes pictures.
        pictures: as many as the largest batch has.

    Returns:
        ``ms_per_image_batch_1`` and so on.
    """
    figures = {}
    for batch in _BATCHES:
        times = []
        for _ in range(_ROUNDS[batch]):
            start = time.perf_counter()
            classify(pictures[:batch])
            times.append(time.perf_counter() - start)
        figures[f"ms_per_image_batch_{batch}"] = 1000 * statistics.median(times[2:]) / batch
    return figures


def _claim(out: Path, *, force: bool) -> None:
    """Take `out` for the demo: a new or empty folder, an unfinished demo, or with `force` a finished one."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not out.is_dir() or not (out / DEMO_FILE).is_file():
            raise ConfigError(f"{out} exists and is not a demo's folder, so it is not touched: choose another --out")
        if not force and _is_finished(out / DEMO_FILE):
            raise ConfigError(f"{out} holds a finished demo: pass --force to replace it, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / DEMO_FILE).write_text('{"complete": false}\n', encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _is_finished(file: Path) -> bool:
    """Whether a demo ended here; what cannot be read is none that did."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(document, dict) and bool(document.get("complete"))


def _encode(encoder: "Encoder", batch: list["Image.Image"]) -> "NDArray[np.float32]":
    import torch

    features: NDArray[np.float32] = encoder.encode_images(
        torch.stack([encoder.transform(picture) for picture in batch])
    ).numpy()
    return features


def _num_bytes(module: Any) -> int:  # noqa: ANN401  # a torch module; torch stays unimported here
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _print_table(document: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{document['shots']} images a class, {document['num_samples']} test scans")
    table.add_column("", no_wrap=True)
    for header in ("accuracy %", "ms/image\nbatch 1", "ms/image\nbatch 32", "size MB"):
        table.add_column(header, justify="right")
    for row in document["rows"]:
        table.add_row(
            row["name"],
            f"{100 * row['accuracy']:.1f}",
            f"{row['ms_per_image_batch_1']:.2f}",
            f"{row['ms_per_image_batch_32']:.2f}",
            f"{row['size_bytes'] / 1e6:.1f}",
        )
    stdout().print(table)
    stdout().print(_agreement(document))
    stdout().print(f"Plots: {out / REPORT_FILE}", soft_wrap=True)
    stdout().print(f"Now try: fastfsl predict {out / 'bundle'} {out / 'data' / 'test' / 'three'}", soft_wrap=True)
