"""`fastfsl inspect`: what is in a bundle, with every hash verified."""  # noqa: A005 - the file is named after the command; imports are absolute

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfsl.cli.checks import check_is_bundle
from fastfsl.cli.options import ExpectedDigest
from fastfsl.cli.output import print_fields, print_json, stdout, warn
from fastfsl.errors import BundleError

if TYPE_CHECKING:
    from fastfsl.bundle import Manifest

_SHOWN_CLASSES = 10
# What hubs and their clients put beside a bundle's files.
_CUSTOMARY = (".cache", ".git", ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle made by `fastfsl export`.")],
    digest_only: Annotated[
        bool, typer.Option("--digest", help="Verify, then print the digest alone: what --expected-digest takes.")
    ] = False,
    expected_digest: ExpectedDigest = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Verify a bundle's files and show what it holds and how it was made.

    The digest names a bundle with every byte in it but the model card's (README.md), which may be edited. Keep it apart
    from the bundle (in the code that loads it, or in a deployment's settings): who can alter a bundle can alter the
    hashes in it too.
    """
    from dataclasses import asdict

    from fastfsl.bundle import (
        CARD,
        check_bundle,
        load_readout,
        read_int8_products,
        read_pinned,
        unlisted_files,
        unverified_files,
    )

    check_is_bundle(bundle)
    manifest, digest = read_pinned(bundle, expected_digest)
    check_bundle(bundle, manifest)
    if digest_only:
        if as_json:
            print_json({"digest": digest})
        else:
            stdout().print(digest, soft_wrap=True)
        return
    verified = [name for name in manifest.files if name != CARD]
    unlisted = unlisted_files(bundle, manifest)
    readout = load_readout(bundle, manifest)
    int8 = read_int8_products(bundle, manifest) if manifest.precision == "int8" else None
    document = {
        "bundle": str(bundle),
        "digest": digest,
        "verified": True,
        "unlisted": unlisted,
        "unverified": unverified_files(bundle, manifest),
        "total_bytes": sum(manifest.files[name]["size"] for name in verified),
        "flow": _check_plan(bundle, manifest),
        "readout": None if readout is None else readout.describe(),
        "compiled": _compiled(bundle, manifest),
        **asdict(manifest),
        "int8": None if int8 is None else int8.describe(),
    }
    odd = [name for name in unlisted if name not in _CUSTOMARY]
    if odd:
        warn(f"{len(odd)} files that the manifest does not list, and that are never loaded: {odd[0]} ...")
    if as_json:
        print_json(document)
    else:
        print_fields(f"Bundle {bundle}: all {len(verified)} files verified", _for_people(document, manifest))


def _check_plan(bundle: Path, manifest: "Manifest") -> dict[str, int] | None:
    """The sizes of the flow plan, which must be those of the manifest.

    Raises:
        BundleError: they are not.
    """
    from fastfsl.bundle import FLOW_PLAN, read_file, read_plan

    if FLOW_PLAN not in manifest.files:
        return None
    plan = read_plan(bundle / FLOW_PLAN, read_file(bundle, manifest, FLOW_PLAN))
    found = (plan.num_steps, plan.dim, plan.step_size)
    expected = (manifest.num_steps, manifest.embed_dim, manifest.step_size)
    if found != expected:
        raise BundleError(
            f"{bundle / FLOW_PLAN}: (steps, width, step size) are {found}, the manifest says {expected}; "
            "export it again"
        )
    return {"num_steps": plan.num_steps, "num_blocks": plan.num_blocks, "dim": plan.dim}


def _compiled(bundle: Path, manifest: "Manifest") -> dict[str, Any] | None:
    """What the compiled kernels were made for and with, index and weights being checked as a runtime would.

    Raises:
        BundleError: they are damaged, or contradict the manifest.
    """
    from fastfsl.bundle import read_flow_kernels, read_flow_weights

    kernels = read_flow_kernels(bundle, manifest)
    if kernels is None:
        return None
    read_flow_weights(bundle, manifest)
    return {
        "targets": list(kernels.targets),
        "dtype": kernels.dtype,
        "dim": kernels.dim,
        "row_classes": list(kernels.row_classes),
        "num_kernels": len({kernel.path for target in kernels.targets.values() for kernel in target.kernels}),
        "compiler": dict(kernels.compiler),
        "status": "compiled, not run where it was exported",
    }


def _for_people(document: dict[str, Any], manifest: "Manifest") -> dict[str, Any]:
    """The document without what only machines read: hashes become sizes, long lists their length."""
    shown = {**document}
    for name in ("bundle", "verified", "unlisted", "format_version"):
        del shown[name]
    names = ", ".join(manifest.class_names[:_SHOWN_CLASSES])
    more = len(manifest.class_names) - _SHOWN_CLASSES
    shown["class_names"] = f"{len(manifest.class_names)}: {names}" + (f" and {more} more" if more > 0 else "")
    if document["readout"] is not None:
        kernels = [f"{kernel['keys']} keys, beta {kernel['beta']:g}" for kernel in document["readout"]["kernels"]]
        shown["readout"] = {**document["readout"], "kernels": "; ".join(kernels)}
    shown["total_bytes"] = _bytes(document["total_bytes"])
    shown["files"] = {name: _bytes(entry["size"]) for name, entry in sorted(manifest.files.items())}
    shown["training"] = {
        name: f"{len(value)} entries" if isinstance(value, list) and len(value) > _SHOWN_CLASSES else value
        for name, value in manifest.training.items()
    }
    return shown


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"
