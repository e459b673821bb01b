"""`fastfsl export`: from a run folder to a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from fastfsl.cli.output import print_fields, print_json
from fastfsl.cli.progress import reporting
from fastfsl.cli.requirements import require_export


def export(
    run: Annotated[Path, typer.Argument(help="Run folder made by `fastfsl train`.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export a run as a bundle: ONNX graphs, flow plan, read-out, checked against the run, with every file's hash."""
    from fastfsl.bundle import MANIFEST_NAME
    from fastfsl.files import check_output

    require_export()
    from fastfsl.export.bundle_writer import export_run
    from fastfsl.fit.run import Run

    check_output(bundle, marker=MANIFEST_NAME, force=force)
    with reporting() as reporter:
        manifest = export_run(Run.load(run), bundle, force=force, on_stage=reporter.stage)
    document = {
        "bundle": str(bundle),
        "method": manifest.method,
        "num_classes": len(manifest.class_names),
        "num_steps": manifest.num_steps,
        "precision": manifest.precision,
        "size_bytes": sum(entry["size"] for entry in manifest.files.values()),
        "files": sorted(manifest.files),
        "parity": manifest.parity,
    }
    if as_json:
        print_json(document)
    else:
        print_fields(f"Exported {bundle}", document)
