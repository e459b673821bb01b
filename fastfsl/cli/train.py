"""`fastfsl train`: from a data set to a run folder."""

import shutil
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfsl.cli import options
from fastfsl.cli.checks import RUN_FILE, check_data, check_training
from fastfsl.cli.next_command import command, data_options, encoder_options, free_name
from fastfsl.cli.output import for_people, print_fields, print_json, stdout, warn
from fastfsl.cli.progress import LOADING, one_step, reporting
from fastfsl.cli.requirements import require_training
from fastfsl.cli.run_report import REPORT_FILE, write_run_report
from fastfsl.fit.methods import DEFAULT_METHOD, METHODS, SOURCES  # noqa: TID253  # the registry imports no estimator

if TYPE_CHECKING:
    from fastfsl.data import FeatureDataset, ImageDataset
    from fastfsl.data.baselines import Standing
    from fastfsl.fit.config import TrainConfig
    from fastfsl.fit.run import Run


def train(
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to make.")],
    method: Annotated[
        str | None, typer.Option(help=f"One of the methods above.  [default: {DEFAULT_METHOD}]", metavar="METHOD")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Up to so many images per class, drawn by --seed.  [default: all]")
    ] = None,
    exact_shots: options.ExactShots = False,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    template: options.Template = None,
    views: options.Views = None,
    seed: Annotated[int | None, typer.Option(help="Seed of episode, views and training.  [default: 0]")] = None,
    classes: options.Classes = None,
    target_precision: Annotated[
        float | None,
        typer.Option(help='Answer "none of these" where needed for this share of right answers (method auto).'),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options and the method's own (num_steps, epochs, ...).")
    ] = None,
    image_root: options.ImageRoot = None,
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    split_column: options.SplitColumn = None,
    strict: options.Strict = False,
    device: options.TrainingDevice = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run folder that exists.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a method on a few labelled images a class (or on their features).

    What a method has to choose (settings, weights, the number of Euler steps) is chosen on these images alone; the val
    and test splits are not read. report.html in the run folder shows what was chosen, and on which evidence.
    """
    from fastfsl.files import check_output

    require_training()
    check_output(out, marker=RUN_FILE, force=force)
    check_data(data)
    from fastfsl.fit.config import load_config

    resolved = load_config(
        config,
        {
            "method": method,
            "shots": shots,
            "backbone": backbone,
            "pretrained": pretrained,
            "templates": template[0] if template and len(template) == 1 else template,
            "num_views": views,
            "seed": seed,
            "target_precision": target_precision,
            "classes": classes,
            "exact_shots": exact_shots or None,
            "image_root": None if image_root is None else str(image_root),
            "path_column": path_column,
            "label_column": label_column,
            "split_column": split_column,
            "strict": strict or None,
            "device": device,
        },
    )
    dataset = check_training(data, resolved)

    # What a long tuning has done so far: the same command goes on from it.
    whole = out.resolve()  # `.` has no name
    checkpoints = whole.with_name(f".{whole.name}.training")
    with reporting() as reporter:
        with one_step(reporter, LOADING):
            from fastfsl.devices import resolve_device
            from fastfsl.fit.processes import join_processes, launched_processes
            from fastfsl.fit.train import train as run_training
        launched_processes()  # fewer than were asked for are an error now, not after an hour
        run = run_training(data, resolved, dataset=dataset, reporter=reporter, checkpoints=checkpoints)
    if not join_processes(resolve_device(resolved.device)).is_main:  # under `torchrun` one of several writes
        return
    run.save(out, force=force)
    write_run_report(whole / REPORT_FILE, run)  # the working folder, if `out` is it, has just been replaced
    shutil.rmtree(checkpoints, ignore_errors=True)
    from fastfsl.fit.held_out import held_out_standing

    standing = held_out_standing(run)
    document = {**_summary(run, out), "next": _next(data, dataset, resolved, out, standing)}
    if standing is not None:
        fields = standing.fields()
        document["held_out_interval"] = fields.pop("interval")
        document["num_held_out"] = 0 if standing.accuracy is None else standing.num_samples
        document |= fields
        warning = standing.warning()
        if warning is not None:
            warn(f"on held-out training samples {warning}")
    if as_json:
        print_json(document)
        return
    print_fields(f"Trained {out}", for_people(document))
    if standing is not None:
        stdout().print(standing.sentence("held-out accuracy"), soft_wrap=True)
    stdout().print(f"Next: {document['next']}", soft_wrap=True)


# The command's help lists the methods, from the one place that describes them.
train.__doc__ = "\n".join(
    [
        cleandoc(train.__doc__ or ""),
        "",
        "Methods on frozen features:",
        "",
        *(f"- {name}: {method.summary}" for name, method in METHODS.items()),
        "",
        "Methods that tune the encoder or its texts (images only); any of the above may follow, as in mps+fma:",
        "",
        *(f"- {name}: {source.summary}" for name, source in SOURCES.items()),
    ]
)


def _next(
    data: Path,
    dataset: "ImageDataset | FeatureDataset",
    config: "TrainConfig",
    out: Path,
    standing: "Standing | None",
) -> str:
    """The command that comes after a training."""
    options = data_options(dict(config))
    if standing is not None and standing.below_majority:
        return command("fastfsl", "compare", data, *options, *encoder_options(dict(config), dict(type(config)())))
    num_train = len(dataset.labels("train"))
    left = config.shots is not None and num_train > config.shots * len(dataset.class_names)
    if "test" in dataset.splits or (set(dataset.splits) == {"train"} and left and config.image_root is None):
        return command("fastfsl", "evaluate", out, data, *options)
    return command("fastfsl", "export", out, free_name("bundle"))


def _summary(run: "Run", out: Path) -> dict[str, Any]:
    return {
        "run": str(out),
        "report": str(out / REPORT_FILE),
        "method": run.record.config.method,
        "num_classes": len(run.record.class_names),
        "num_support": run.record.num_support,
        "class_counts": dict(zip(run.record.class_names, run.record.class_counts, strict=True)),
        "files": run.record.files,
        "num_steps": run.num_steps,
        "selection": run.record.selection.get("rule"),
        "held_out_accuracy": run.held_out_accuracy,
        "threshold": run.threshold,
        "num_parameters": run.record.num_parameters,
        "feature_seconds": round(run.record.feature_seconds, 3),
        "train_seconds": round(run.record.train_seconds, 3),
    }
