"""`fastfsl export`: from a run folder to a bundle."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastfsl.cli.checks import check_export
from fastfsl.cli.next_command import command
from fastfsl.cli.output import print_fields, print_json, stdout
from fastfsl.cli.progress import LOADING, one_step, reporting
from fastfsl.cli.requirements import require_export


def export(
    run: Annotated[Path, typer.Argument(help="Run folder made by `fastfsl train`.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that exists.")] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Also compile the flow's kernels for these NVIDIA architectures: all, or for example sm_80,sm_90. No "
            "card is needed."
        ),
    ] = None,
    kernel_dtype: Annotated[
        Literal["auto", "fp16", "bf16"],
        typer.Option(help="Dtype of the kernels' weights; auto: fp16 where its range suffices."),
    ] = "auto",
    text: Annotated[
        bool, typer.Option("--text", help="Also export the text tower, so that classes can be added by name.")
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(
            help="Of the graphs: fp32 runs anywhere; int8 on CPUs, calibrated and checked on the images (or features) "
            "trained on; fp16 on CUDA."
        ),
    ] = "fp32",
    allow_drop: Annotated[
        bool,
        typer.Option("--allow-drop", help="Accept that --precision changes more than 1 % of the answers."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a run as a bundle: ONNX graphs, flow plan, read-out, checked against the run, with every file's hash.

    With --arch the bundle also has the flow compiled for NVIDIA cards, which a runtime without torch can launch.
    """
    from fastfsl.bundle import MANIFEST_NAME
    from fastfsl.files import check_output

    require_export()
    from fastfsl.kernels.aot import parse_architectures

    check_export(run, text=text)
    architectures = () if arch is None else parse_architectures(arch)
    check_output(bundle, marker=MANIFEST_NAME, force=force)

    with reporting() as reporter:
        with one_step(reporter, LOADING):
            from fastfsl.export.bundle_writer import export_run
            from fastfsl.export.flow_kernels import KernelOptions
            from fastfsl.fit.run import Run
        kernels = KernelOptions(architectures, kernel_dtype)
        manifest = export_run(
            Run.load(run),
            bundle,
            force=force,
            kernels=kernels,
            text=text,
            precision=precision,
            allow_drop=allow_drop,
            on_stage=reporter.stage,
        )
    document = {
        "bundle": str(bundle),
        "method": manifest.method,
        "num_classes": len(manifest.class_names),
        "num_steps": manifest.num_steps,
        "precision": manifest.precision,
        "kernels": manifest.kernels,
        "text": manifest.text,
        "size_bytes": sum(entry["size"] for entry in manifest.files.values()),
        "files": sorted(manifest.files),
        "parity": manifest.parity,
        "next": command("fastfsl", "predict", bundle, "IMAGE")
        if manifest.preprocessing is not None
        else command("fastfsl", "evaluate", bundle, "FEATURES.npz"),
    }
    if as_json:
        print_json(document)
    else:
        print_fields(f"Exported {bundle}", document)
        stdout().print(f"Next: {document['next']}", soft_wrap=True)
