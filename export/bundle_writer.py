"""From a run to a bundle: graphs, plan, kernels, read-out, parity, card and manifest; written whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from fastfsl.bundle import (
    CARD,
    FLOW_GRAPH,
    FLOW_PLAN,
    READOUT,
    VISUAL_GRAPH,
    Int8Products,
    Manifest,
    int8_products,
    seal_bundle,
    staging_folder,
    write_plan,
    write_readout,
)
from fastfsl.encoders import Encoder
from fastfsl.errors import BundleError
from fastfsl.export.accuracy_gate import Graphs
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.flow_kernels import KernelOptions, check_compilable, write_kernels
from fastfsl.export.model_card import model_card
from fastfsl.export.parity import flow_parity, logit_parity, visual_parity
from fastfsl.export.precision import Precision, reduce_precision
from fastfsl.export.readout import deployed_readout, has_flow
from fastfsl.export.text_part import check_extensible, write_text
from fastfsl.export.visual_graph import blend_record, visual_graph
from fastfsl.fit.deployment import Deployment
from fastfsl.fit.evaluate import run_encoder
from fastfsl.fit.run import Run, installed_versions

_NO_KERNELS = KernelOptions()


def export_run(
    run: Run,
    target: Path,
    *,
    force: bool = False,
    kernels: KernelOptions = _NO_KERNELS,
    text: bool = False,
    precision: Precision = "fp32",
    allow_drop: bool = False,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Export a run as a bundle.

    A run on images gives the encoder and what classifies its embeddings: a flow, a read-out or both. A run on features
    gives the latter alone.

    Args:
        run: the fitted run.
        target: the bundle's folder.
        force: replace a bundle that is there.
        kernels: architectures to compile the flow's kernels for.
        text: also export the text tower and the tokenizer, so that classes can be added by name.
        precision: of the graphs. Of a bundle with kernels the flow's graph, which they are held to, stays fp32.
        allow_drop: accept that another precision gives other answers.
        on_stage: called with (name of the stage, stages done, stages in all), or compilations in place of stages.

    Returns:
        The manifest.

    Raises:
        ConfigError: if `target` exists and `force` is not set, it cannot be written, or the run has no classifier that
            is the same for every image, or kernels or texts are asked for that there are not.
        BundleError: if the encoder cannot be found or exported, what is exported does not match the estimator, or too
            many answers change with the precision.
        DataError: if what was trained on is not where it was, and the precision has to be checked on it.
    """

    def stage(name: str, done: int) -> None:
        if on_stage is not None:
            on_stage(name, done, 5)

    record, deployed = run.record, run.deployment()
    readout = deployed_readout(deployed)
    if kernels.architectures:
        check_compilable(deployed)
    if text:
        check_extensible(run)
    with staging_folder(target, force=force) as staging:
        parity: dict[str, Any] = {}
        encoder, visual = None, None
        if record.encoder is not None:
            encoder, visual, parity["visual"] = _encoder(run, stage)
        flow = None
        if deployed.plan is not None and deployed.class_embeddings is not None and has_flow(deployed):
            stage("exporting the flow", 2)
            plan, classes, scale = deployed.plan, deployed.class_embeddings, deployed.logit_scale
            flow = flow_graph(plan.to_arrays(), classes, scale, read_steps=deployed.read_steps)
            stage("checking the flow", 3)
            parity["flow"] = flow_parity(plan, classes, scale, flow, read_steps=deployed.read_steps)
            write_plan(staging / FLOW_PLAN, plan.to_arrays())
        compiled = None
        if kernels.architectures:

            def compiling(done: int, total: int) -> None:
                if on_stage is not None:
                    on_stage("compiling the kernels", done, total)

            compiled, parity["rounded_weights"] = write_kernels(staging, deployed, kernels, on_progress=compiling)
        graphs = Graphs(visual, flow, readout)
        if precision != "fp32":
            stage(f"comparing {precision} with fp32", 3)
            preprocessing = None if encoder is None else encoder.preprocessing
            graphs, parity["precision"] = reduce_precision(
                precision, graphs, run, preprocessing, with_flow=compiled is None, allow_drop=allow_drop
            )
        int8 = _save_graphs(graphs, staging)
        if readout is not None:
            write_readout(staging / READOUT, readout)
        text_record = None
        if text and encoder is not None:
            stage("exporting the text tower", 4)
            text_record, parity["text"] = write_text(staging, run, encoder, deployed)
        stage("checking the logits", 4)
        parity["logits"] = logit_parity(
            run.estimator, deployed, flow, readout, normalized=encoder is None or encoder.normalized
        )

        fields = {
            **_manifest_fields(run, deployed, encoder, parity),
            "precision": precision,
            "int8": int8,
            "kernels": compiled,
            "text": text_record,
        }
        (staging / CARD).write_text(model_card(fields, readout), encoding="utf-8")
        manifest = seal_bundle(staging, fields)
        stage("written", 5)
    return manifest


def _encoder(run: Run, stage: Callable[[str, int], None]) -> tuple[Encoder, onnx.ModelProto, dict[str, Any]]:
    """The run's encoder, its graph in fp32 and how that compares with torch."""
    stage("exporting the encoder", 0)
    encoder = run_encoder(run)
    if blend_record(encoder) is None and not encoder.normalized:
        raise BundleError("the encoder's features are neither unit-length nor a blend's: report this")
    visual = visual_graph(encoder)
    stage("checking the encoder", 1)
    return encoder, visual, visual_parity(encoder, visual)


def _manifest_fields(run: Run, deployed: Deployment, encoder: Encoder | None, parity: dict[str, Any]) -> dict[str, Any]:
    record, plan = run.record, deployed.plan if has_flow(deployed) else None
    metrics: dict[str, Any] = {}
    if run.held_out_accuracy is not None:
        evidence = ("accuracy_by_step", "num_folds", "rule")
        metrics["held_out_support"] = {
            "accuracy": run.held_out_accuracy,
            **{name: record.selection[name] for name in evidence if name in record.selection},
        }
    return {
        "method": record.config.method,
        "class_names": record.class_names,
        "embed_dim": record.embed_dim,
        "num_steps": 0 if plan is None else plan.num_steps,
        "step_size": None if plan is None else plan.step_size,
        "read_steps": [] if plan is None or len(deployed.read_steps) == 1 else list(deployed.read_steps),
        "logit_scale": record.logit_scale if plan is None else deployed.logit_scale,
        "preprocessing": None if encoder is None else encoder.preprocessing.to_dict(),
        "encoder": None
        if encoder is None
        else {
            "backbone": _public_name(encoder.backbone),
            "pretrained": None if encoder.pretrained is None else _public_name(encoder.pretrained),
            "digest": encoder.digest,
        },
        "blend": None if encoder is None else blend_record(encoder),
        "versions": installed_versions(),
        "metrics": metrics,
        "parity": parity,
        "training": {
            "data_kind": record.data_kind,
            "num_shots": record.config.shots,
            "num_support": record.num_support,
            "seed": record.config.seed,
            "templates": record.templates,
            "params": record.params,
            "source": None
            if record.source is None
            else {"params": record.source.params, "num_parameters": record.source.num_parameters},
            "support_digests": record.support_digests,
            "train_seconds": record.train_seconds,
            "trained": record.created,
        },
    }


def _public_name(name: str) -> str:
    """A bundle travels: of a path on this machine it keeps the last part alone."""
    scheme, separator, rest = name.partition(":")
    if separator and scheme == "local-dir":
        return f"local-dir:{Path(rest).name}"
    return Path(name).name if Path(name).exists() else name


def _save_graphs(graphs: Graphs, folder: Path) -> dict[str, Any] | None:
    """Write the graphs; returns what the manifest says of their int8 weights."""
    found = []
    for model, name in ((graphs.visual, VISUAL_GRAPH), (graphs.flow, FLOW_GRAPH)):
        if model is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = model.SerializeToString()
            path.write_bytes(data)
            found.append(int8_products(data, name))
    products = Int8Products.together(found)
    return None if products is None else {"max_pair_sum": products.max_pair_sum}
