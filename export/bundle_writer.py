"""From a run to a bundle: graphs, plan, parity, model card, manifest; written whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from fastfsl.bundle import Manifest, seal_bundle, staging_folder, write_plan
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.model_card import model_card
from fastfsl.export.parity import flow_parity, visual_parity
from fastfsl.export.visual_graph import visual_graph
from fastfsl.fit.evaluate import run_encoder
from fastfsl.fit.run import Run, installed_versions

VISUAL_GRAPH = "visual/model.onnx"
FLOW_GRAPH = "flow/model.onnx"
FLOW_PLAN = "flow/plan.safetensors"
CARD = "README.md"


def export_run(
    run: Run, target: Path, *, force: bool = False, on_stage: Callable[[str, int, int], None] | None = None
) -> Manifest:
    """Export a run as a bundle.

    A run on images gives encoder and flow; a run on features gives the flow alone, for features.

    Args:
        run: the fitted run.
        target: the bundle's folder.
        force: replace a bundle that is there.
        on_stage: called with (name of the stage, stages done, stages in all).

    Returns:
        The manifest.

    Raises:
        ConfigError: if `target` exists and `force` is not set, or it cannot be written.
        BundleError: if the encoder cannot be found or exported, or a graph does not match torch.
    """

    def stage(name: str, done: int) -> None:
        if on_stage is not None:
            on_stage(name, done, 4)

    record, estimator = run.record, run.estimator
    with staging_folder(target, force=force) as staging:
        parity: dict[str, Any] = {}
        if record.encoder is not None:
            stage("exporting the encoder", 0)
            encoder = run_encoder(run)
            visual = visual_graph(encoder)
            stage("checking the encoder", 1)
            parity["visual"] = visual_parity(encoder, visual)
            _save(visual, staging / VISUAL_GRAPH)
        stage("exporting the flow", 2)
        plan = estimator.plan_.to("cpu")
        class_embeddings = estimator.class_embeddings_.cpu().numpy()
        flow = flow_graph(plan.to_arrays(), class_embeddings, record.logit_scale)
        stage("checking the flow", 3)
        parity["flow"] = flow_parity(plan, class_embeddings, record.logit_scale, flow)
        _save(flow, staging / FLOW_GRAPH)
        write_plan(staging / FLOW_PLAN, plan.to_arrays())

        fields = _manifest_fields(run, parity)
        (staging / CARD).write_text(model_card(fields), encoding="utf-8")
        manifest = seal_bundle(staging, fields)
        stage("written", 4)
    return manifest


def _manifest_fields(run: Run, parity: dict[str, Any]) -> dict[str, Any]:
    record, selection = run.record, run.estimator.selection_
    encoder = record.encoder
    metrics: dict[str, Any] = {}
    if selection.accuracy_by_step:
        metrics["held_out_support"] = {
            "accuracy": selection.accuracy_by_step[selection.num_steps],
            "accuracy_by_step": list(selection.accuracy_by_step),
            "num_folds": selection.num_folds,
            "rule": selection.rule,
        }
    return {
        "method": record.config.method,
        "class_names": record.class_names,
        "embed_dim": record.embed_dim,
        "num_steps": selection.num_steps,
        "step_size": run.estimator.plan_.step_size,
        "precision": "fp32",
        "logit_scale": record.logit_scale,
        "preprocessing": None if encoder is None else encoder.preprocessing,
        "encoder": None
        if encoder is None
        else {
            "backbone": _public_name(encoder.backbone),
            "pretrained": None if encoder.pretrained is None else _public_name(encoder.pretrained),
            "digest": encoder.digest,
        },
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


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
