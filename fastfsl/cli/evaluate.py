"""`fastfsl evaluate`: accuracy of a run or a bundle on a split."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastfsl.cli.checks import MANIFEST, check_device, check_evaluation, kind_of_model, read_run
from fastfsl.cli.mistakes import mistake_parts
from fastfsl.cli.next_command import command, data_options, encoder_options, free_name
from fastfsl.cli.options import (
    Alpha,
    ExpectedDigest,
    ImageRoot,
    LabelColumn,
    PathColumn,
    SplitColumn,
    Strict,
    WideInt8,
)
from fastfsl.cli.output import field_words, for_people, print_fields, print_json, stdout, warn
from fastfsl.cli.progress import LOADING, ProgressReporter, one_step, reporting
from fastfsl.cli.requirements import require_training
from fastfsl.cli.run_report import prediction_parts, standing_parts
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    from fastfsl.data import Columns, FeatureDataset, ImageDataset
    from fastfsl.data.baselines import Predicted, Standing

# Images classified between two updates of the progress bar.
_CHUNK = 256

_Classes = Literal["all", "base", "new"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder or bundle.")],
    data: Annotated[Path, typer.Argument(help="Image folder, split file, table or feature file, as for train.")],
    split: Annotated[
        str, typer.Option(help="train, val or test. Of a flat folder, test is what was not trained on.")
    ] = "test",
    classes: Annotated[
        _Classes, typer.Option(help="base: the first half of the data's classes, rounded up; new: the rest.")
    ] = "all",
    transfer: Annotated[
        bool,
        typer.Option("--transfer", help="Tell apart the data's own classes, seen in training or not (runs only)."),
    ] = False,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", help="With --transfer and images: as for train.  [default: the run's]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    alpha: Alpha = None,
    image_root: ImageRoot = None,
    path_column: PathColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    strict: Strict = False,
    report: Annotated[
        Path | None, typer.Option(help="HTML file to make: confusions, reliability and accuracy by class.")
    ] = None,
    expected_digest: ExpectedDigest = None,
    wide_int8: WideInt8 = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the accuracy of a run (in torch) or of a bundle (in the runtime) on a split of a data set.

    The data's classes are matched by name with those trained on. With --transfer they need not be among them: a flow
    moves the features, and the texts of the data's classes read them out; besides flows zero-shot can, and a tuned
    encoder by itself. For base and new classes: train with --method fma --classes base, evaluate with --classes base,
    and again with --classes new --transfer.
    """
    _check_options(transfer=transfer, template=template, alpha=alpha, report=report)
    from fastfsl.data.baselines import standing
    from fastfsl.data.table_columns import Columns

    kind = kind_of_model(model)
    if kind == "bundle" and transfer:
        raise ConfigError(f"--transfer needs a run folder, and {model} is a bundle: give the run it came from")
    if kind == "run" and (expected_digest is not None or wide_int8):
        option = "--wide-int8" if expected_digest is None else "--expected-digest"
        raise ConfigError(f"{option} is about bundles, and {model} is a run: leave it out")
    if kind == "run":
        require_training()
        check_device(device)
    reading = _Reading(image_root, Columns(path_column, label_column, split_column), strict)
    dataset = check_evaluation(
        model,
        kind,
        data,
        split=split,
        classes=classes,
        image_root=image_root,
        columns=reading.columns,
        transfer=transfer,
        expected_digest=expected_digest,
    )
    kept: list[Predicted] = []
    with reporting() as reporter:
        if kind == "bundle":
            document = _evaluate_bundle(
                model, dataset, split, device, alpha, reading, reporter, kept, expected_digest, wide_int8
            )
        else:
            prompts = template[0] if template and len(template) == 1 else template
            document = _evaluate_run(
                model, data, dataset, split, classes, transfer, prompts, device, alpha, reading, reporter, kept
            )
    document = {
        "model": str(model),
        "data": str(data),
        "split": split,
        "classes": classes,
        "transfer": transfer,
        **document,
    }
    (predicted,) = kept
    found = standing(
        document["accuracy"],
        document["num_samples"],
        predicted.labels,
        predicted.class_names,
        predicted.zero_shot_accuracy,
    )
    document |= found.fields()
    document["next"] = _next(model, kind, data, document, reading)
    warning = found.warning()
    if warning is not None:
        warn(warning)
    if report is not None:
        _write_report(report, document, predicted, found)
    if as_json:
        print_json(document)
    else:
        print_fields(f"Evaluated {model}", for_people(document))
        stdout().print(found.sentence(), soft_wrap=True)
        stdout().print(f"Next: {document['next']}", soft_wrap=True)


def _check_options(*, transfer: bool, template: list[str] | None, alpha: float | None, report: Path | None) -> None:
    """Refuse options that do not go together."""
    if template and not transfer:
        raise ConfigError("--template goes with --transfer: otherwise the classes are those of the training")
    if alpha is not None and transfer:
        raise ConfigError("--alpha does not go with --transfer, which takes the weight of the training: leave one out")
    if report is not None and transfer:
        raise ConfigError("--report does not go with --transfer: leave one out")
    if report is not None and report.is_dir():
        raise ConfigError(f"--report names a file to make, and {report} is a folder")


def _next(
    model: Path, kind: Literal["run", "bundle"], data: Path, document: dict[str, Any], reading: "_Reading"
) -> str:
    """The command that comes after a score."""
    if document["below_majority"] and data.exists():
        return command("fastfsl", "compare", data, *_again(model, kind, document, reading))
    if kind == "bundle":
        return command("fastfsl", "bench", model)
    if document["method"] == "cocoop":  # whose classifier is another one for each image
        options = _again(model, kind, document, reading)
        return command("fastfsl", "train", data, "--out", f"{model}-fma", "--method", "cocoop+fma", *options)
    return command("fastfsl", "export", model, free_name("bundle"))


def _again(model: Path, kind: Literal["run", "bundle"], document: dict[str, Any], reading: "_Reading") -> list[str]:
    """The same data and the encoder that a model was made with, as options."""
    columns = {f"{name}_column": value for name, value in asdict(reading.columns).items()}
    options = data_options({"classes": document["classes"], "image_root": reading.image_root, **columns})
    if kind == "bundle":  # also where nothing can be trained, so that what the defaults are is not known
        known = json.loads((model / MANIFEST).read_text(encoding="utf-8"))["encoder"] or {}
        return options + encoder_options(known, {})
    from fastfsl.fit.config import TrainConfig

    return options + encoder_options(read_run(model).get("config", {}), dict(TrainConfig()))


@dataclass(frozen=True)
class _Reading:
    """How images are found: the folder of listed paths, a table's columns, whether a skipped file is an error."""

    image_root: Path | None
    columns: "Columns"
    strict: bool


def _write_report(path: Path, document: dict[str, Any], predicted: "Predicted", found: "Standing") -> None:
    from fastfsl.report import Section, Table, write_report

    figures = for_people(document)
    worst_first = sorted(document["class_accuracy"].items(), key=lambda pair: float(pair[1]))
    sections = [
        Section("Result", [*standing_parts(found), Table(("", ""), field_words(figures))]),
        Section(
            "Predictions", prediction_parts(predicted.probabilities, predicted.labels, list(predicted.class_names))
        ),
        Section("Mistakes", mistake_parts(predicted, Path(document["data"]))),
        Section("Accuracy by class, the lowest first", [Table(("class", "accuracy"), worst_first)]),
    ]
    write_report(path, f"{document['model']} on {document['data']}, {document['split']}", sections)


def _evaluate_run(
    model: Path,
    data: Path,
    dataset: "ImageDataset | FeatureDataset",
    split: str,
    classes: _Classes,
    transfer: bool,
    templates: str | list[str] | None,
    device: str,
    alpha: float | None,
    reading: "_Reading",
    reporter: ProgressReporter,
    kept: "list[Predicted]",
) -> dict[str, Any]:
    with one_step(reporter, LOADING):
        from fastfsl.fit.evaluate import evaluate_run
        from fastfsl.fit.protocols import evaluate_transfer
        from fastfsl.fit.run import Run

    run = Run.load(model, device=device)
    options: dict[str, Any] = {"templates": templates} if transfer else {"alpha": alpha}
    options |= {"image_root": reading.image_root, "columns": reading.columns, "strict": reading.strict}
    options |= {"dataset": dataset, "on_predicted": kept.append}
    evaluation = (evaluate_transfer if transfer else evaluate_run)(
        run, data, split=split, classes=classes, device=device, reporter=reporter, **options
    )
    return {"method": run.record.config.method, "num_steps": run.num_steps, **asdict(evaluation)}


def _evaluate_bundle(
    model: Path,
    dataset: "ImageDataset | FeatureDataset",
    split: str,
    device: str,
    alpha: float | None,
    reading: "_Reading",
    reporter: ProgressReporter,
    kept: "list[Predicted]",
    expected_digest: str | None,
    wide_int8: bool,
) -> dict[str, Any]:
    import numpy as np

    from fastfsl.bundle import read_manifest
    from fastfsl.data import FeatureDataset
    from fastfsl.data.baselines import Predicted, text_accuracy
    from fastfsl.data.scoring import features_to_score, images_to_score, score
    from fastfsl.runtime import Classifier

    manifest = read_manifest(model, expected_digest)
    if alpha is not None and isinstance(dataset, FeatureDataset):
        raise ConfigError("--alpha blends the features of images, and these data are features: leave it out")
    classifier = Classifier.load(
        model, device=device, alpha=alpha, expected_digest=expected_digest, wide_int8=wide_int8
    )
    names = manifest.class_names
    counts: dict[str, Any] = {}
    paths: tuple[Path, ...] = ()
    zero_shot = None  # a bundle holds no class texts of its encoder
    if isinstance(dataset, FeatureDataset):
        features, labels = features_to_score(dataset, split, names, manifest.embed_dim)
        probabilities = classifier.feature_probabilities(features)
        if list(dataset.class_names) == list(names):
            zero_shot = text_accuracy(features, dataset.class_embeddings, labels)
    else:
        digests = manifest.training.get("support_digests", [])
        seen = {digest for digest in digests if isinstance(digest, str)} if isinstance(digests, list) else set()
        images = images_to_score(dataset, split, names, seen, reporter.warn, strict=reading.strict)
        labels = np.array([sample.label for sample in images.samples])
        paths = tuple(sample.path for sample in images.samples)
        parts = []
        for start in range(0, len(images.samples), _CHUNK):
            chunk = [sample.path for sample in images.samples[start : start + _CHUNK]]
            parts.append(classifier.probabilities(chunk))
            reporter.stage("classifying", start + len(chunk), len(images.samples))
        probabilities = np.concatenate(parts)
        counts = {
            "num_unreadable": images.num_unreadable,
            "num_excluded": images.num_excluded,
            "files": images.files,
        }
    readout = classifier.describe()["readout"]
    threshold = None if readout is None else readout["threshold"]
    kept.append(Predicted(names, probabilities, labels, paths, zero_shot))
    predicted = probabilities.argmax(axis=1)
    evaluation = score(predicted, labels, names, probabilities=probabilities, threshold=threshold, **counts)
    num_steps = None if manifest.step_size is None else manifest.num_steps
    return {"method": manifest.method, "num_steps": num_steps, **asdict(evaluation)}
