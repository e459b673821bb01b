"""`fastfsl evaluate`: accuracy of a run or a bundle on a split."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastfsl.cli.checks import check_device, check_evaluation, kind_of_model
from fastfsl.cli.options import Alpha, ExpectedDigest
from fastfsl.cli.output import field_words, print_fields, print_json
from fastfsl.cli.progress import ProgressReporter, reporting
from fastfsl.cli.requirements import require_training
from fastfsl.cli.run_report import prediction_parts
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Images classified between two updates of the progress bar.
_CHUNK = 256

_Classes = Literal["all", "base", "new"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder or bundle.")],
    data: Annotated[Path, typer.Argument(help="Image folder, CoOp split file or feature file.")],
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
    image_root: Annotated[Path | None, typer.Option(help="Folder that a split file's paths are relative to.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file to make: confusions, reliability and accuracy by class.")
    ] = None,
    expected_digest: ExpectedDigest = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the accuracy of a run (in torch) or of a bundle (in the runtime) on a split of a data set.

    The data's classes are matched by name with those trained on. With --transfer they need not be among them: a flow
    moves the features, and the texts of the data's classes read them out; besides flows zero-shot can, and a tuned
    encoder by itself. For base and new classes: train with --method fma --classes base, evaluate with --classes base,
    and again with --classes new --transfer.
    """
    if template and not transfer:
        raise ConfigError("--template goes with --transfer: otherwise the classes are those of the training")
    if alpha is not None and transfer:
        raise ConfigError("--alpha does not go with --transfer, which takes the weight of the training: leave one out")
    if report is not None and transfer:
        raise ConfigError("--report does not go with --transfer: leave one out")
    if report is not None and report.is_dir():
        raise ConfigError(f"--report names a file to make, and {report} is a folder")
    kind = kind_of_model(model)
    if kind == "bundle" and transfer:
        raise ConfigError(f"--transfer needs a run folder, and {model} is a bundle: give the run it came from")
    if kind == "run" and expected_digest is not None:
        raise ConfigError(f"--expected-digest is about bundles, and {model} is a run: leave it out")
    if kind == "run":
        require_training()
        check_device(device)
    check_evaluation(
        model,
        kind,
        data,
        split=split,
        classes=classes,
        image_root=image_root,
        transfer=transfer,
        expected_digest=expected_digest,
    )
    kept: list[_Predicted] = []
    with reporting() as reporter:
        if kind == "bundle":
            document = _evaluate_bundle(
                model, data, split, classes, device, alpha, image_root, reporter, kept, expected_digest
            )
        else:
            prompts = template[0] if template and len(template) == 1 else template
            document = _evaluate_run(
                model, data, split, classes, transfer, prompts, device, alpha, image_root, reporter, kept
            )
    document = {
        "model": str(model),
        "data": str(data),
        "split": split,
        "classes": classes,
        "transfer": transfer,
        **document,
    }
    if report is not None:
        _write_report(report, document, kept[0])
    if as_json:
        print_json(document)
    else:
        shown = {key: value for key, value in document.items() if key != "class_accuracy"}
        print_fields(f"Evaluated {model}", shown)


@dataclass(frozen=True)
class _Predicted:
    """What a score is made of: names of the classes, probabilities (n, C), labels (n,)."""

    class_names: list[str]
    probabilities: "NDArray[Any]"
    labels: "NDArray[np.int64]"


def _keep(
    kept: list[_Predicted], class_names: list[str], probabilities: "NDArray[Any]", labels: "NDArray[np.int64]"
) -> None:
    kept.append(_Predicted(class_names, probabilities, labels))


def _write_report(path: Path, document: dict[str, Any], predicted: _Predicted) -> None:
    from fastfsl.report import Section, Table, write_report

    figures = {key: value for key, value in document.items() if key != "class_accuracy"}
    worst_first = sorted(document["class_accuracy"].items(), key=lambda pair: float(pair[1]))
    sections = [
        Section("Result", [Table(("", ""), field_words(figures))]),
        Section("Predictions", prediction_parts(predicted.probabilities, predicted.labels, predicted.class_names)),
        Section("Accuracy by class, the lowest first", [Table(("class", "accuracy"), worst_first)]),
    ]
    write_report(path, f"{document['model']} on {document['data']}, {document['split']}", sections)


def _evaluate_run(
    model: Path,
    data: Path,
    split: str,
    classes: _Classes,
    transfer: bool,
    templates: str | list[str] | None,
    device: str,
    alpha: float | None,
    image_root: Path | None,
    reporter: ProgressReporter,
    kept: "list[_Predicted]",
) -> dict[str, Any]:
    from fastfsl.fit.evaluate import evaluate_run
    from fastfsl.fit.protocols import evaluate_transfer
    from fastfsl.fit.run import Run

    run = Run.load(model, device=device)
    keep = partial(_keep, kept, run.record.class_names)
    options: dict[str, Any] = {"templates": templates} if transfer else {"alpha": alpha, "on_predicted": keep}
    evaluation = (evaluate_transfer if transfer else evaluate_run)(
        run, data, split=split, classes=classes, device=device, image_root=image_root, reporter=reporter, **options
    )
    return {"method": run.record.config.method, "num_steps": run.num_steps, **asdict(evaluation)}


def _evaluate_bundle(
    model: Path,
    data: Path,
    split: str,
    classes: _Classes,
    device: str,
    alpha: float | None,
    image_root: Path | None,
    reporter: ProgressReporter,
    kept: "list[_Predicted]",
    expected_digest: str | None,
) -> dict[str, Any]:
    import numpy as np

    from fastfsl.bundle import read_manifest
    from fastfsl.data import FeatureDataset, load_dataset, select_classes
    from fastfsl.data.scoring import features_to_score, images_to_score, score
    from fastfsl.runtime import Classifier

    manifest = read_manifest(model, expected_digest)
    dataset = select_classes(load_dataset(data, image_root), classes)
    if alpha is not None and isinstance(dataset, FeatureDataset):
        raise ConfigError("--alpha blends the features of images, and these data are features: leave it out")
    classifier = Classifier.load(model, device=device, alpha=alpha, expected_digest=expected_digest)
    names = manifest.class_names
    counts = {}
    if isinstance(dataset, FeatureDataset):
        features, labels = features_to_score(dataset, split, names, manifest.embed_dim)
        probabilities = classifier.feature_probabilities(features)
    else:
        digests = manifest.training.get("support_digests", [])
        seen = {digest for digest in digests if isinstance(digest, str)} if isinstance(digests, list) else set()
        images = images_to_score(dataset, split, names, seen, reporter.warn)
        labels = np.array([sample.label for sample in images.samples])
        parts = []
        for start in range(0, len(images.samples), _CHUNK):
            chunk = [sample.path for sample in images.samples[start : start + _CHUNK]]
            parts.append(classifier.probabilities(chunk))
            reporter.stage("classifying", start + len(chunk), len(images.samples))
        probabilities = np.concatenate(parts)
        counts = {"num_unreadable": images.num_unreadable, "num_excluded": images.num_excluded}
    readout = classifier.describe()["readout"]
    threshold = None if readout is None else readout["threshold"]
    _keep(kept, list(names), probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    evaluation = score(predicted, labels, names, probabilities=probabilities, threshold=threshold, **counts)
    num_steps = None if manifest.step_size is None else manifest.num_steps
    return {"method": manifest.method, "num_steps": num_steps, **asdict(evaluation)}
