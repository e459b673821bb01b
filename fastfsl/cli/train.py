"""`fastfsl train`: from a data set to a run folder."""

import shutil
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfsl.cli import options
from fastfsl.cli.checks import RUN_FILE, check_data, check_training
from fastfsl.cli.output import print_fields, print_json
from fastfsl.cli.progress import reporting
from fastfsl.cli.requirements import require_training
from fastfsl.cli.run_report import REPORT_FILE, write_run_report
from fastfsl.fit.methods import DEFAULT_METHOD, METHODS, SOURCES  # noqa: TID253  # the registry imports no estimator

if TYPE_CHECKING:
    from fastfsl.fit.run import Run


def train(
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to make.")],
    method: Annotated[
        str | None, typer.Option(help=f"One of the methods above.  [default: {DEFAULT_METHOD}]", metavar="METHOD")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Images a class, drawn by --seed.  [default: all]")] = None,
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
            "image_root": None if image_root is None else str(image_root),
            "device": device,
        },
    )
    dataset = check_training(data, resolved)

    from fastfsl.devices import resolve_device
    from fastfsl.fit.processes import join_processes
    from fastfsl.fit.train import train as run_training

    # What a long tuning has done so far: the same command goes on from it.
    whole = out.resolve()  # `.` has no name
    checkpoints = whole.with_name(f".{whole.name}.training")
    with reporting() as reporter:
        run = run_training(data, resolved, dataset=dataset, reporter=reporter, checkpoints=checkpoints)
    if not join_processes(resolve_device(resolved.device)).is_main:  # under `accelerate launch` one of several writes
        return
    run.save(out, force=force)
    write_run_report(whole / REPORT_FILE, run)  # the working folder, if `out` is it, has just been replaced
    shutil.rmtree(checkpoints, ignore_errors=True)
    if as_json:
        print_json(_summary(run, out))
    else:
        print_fields(f"Trained {out}", _summary(run, out))


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


def _summary(run: "Run", out: Path) -> dict[str, Any]:
    return {
        "run": str(out),
        "report": str(out / REPORT_FILE),
        "method": run.record.config.method,
        "num_classes": len(run.record.class_names),
        "num_support": run.record.num_support,
        "num_steps": run.num_steps,
        "selection": run.record.selection.get("rule"),
        "held_out_accuracy": run.held_out_accuracy,
        "threshold": run.threshold,
        "num_parameters": run.record.num_parameters,
        "feature_seconds": round(run.record.feature_seconds, 3),
        "train_seconds": round(run.record.train_seconds, 3),
    }
