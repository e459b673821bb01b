"""The report of a training: what was chosen on which evidence, and what the flow does to the support."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfsl.cli.output import field_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastfsl.data.baselines import Standing
    from fastfsl.fit.run import Run
    from fastfsl.report import Part, Section

REPORT_FILE = "report.html"
# More than are drawn, few enough to be moved at once.
_MAX_SAMPLES = 1000


def write_run_report(path: Path, run: "Run") -> None:
    """Write the report of a run that was just trained."""
    from fastfsl.report import write_report

    record = run.record
    title = f"{record.config.method} on {record.data_path}"
    write_report(path, title, training_sections(run), footer=f"fastfsl {record.versions['fastfsl']}, {record.created}")


def training_sections(run: "Run") -> "list[Section]":
    """What a training has to show: figures, choice of the steps, held-out samples, the flow, configuration."""
    from fastfsl.fit.held_out import held_out_standing
    from fastfsl.report import Section, Table

    record = run.record
    figures = {
        "method": record.config.method,
        "classes": len(record.class_names),
        "training samples": record.num_support,
        "flow steps": run.num_steps,
        "held-out accuracy": run.held_out_accuracy,
        "threshold": run.threshold,
        "trained numbers": record.num_parameters,
        "seconds for features": record.feature_seconds,
        "seconds of training": record.train_seconds,
    }
    drift = None if record.source is None else record.source.selection.get("gromov_wasserstein_bound")
    if drift is not None:
        figures["drift of the training images' features, a Gromov-Wasserstein bound"] = drift
    settings = {
        **record.config.model_dump(exclude={"params"}),
        **record.params,
        **({} if record.source is None else {"source": record.source.params}),
        **({} if record.encoder is None else {"encoder": record.encoder.model_dump()}),
    }
    standing = held_out_standing(run)
    told = [] if standing is None else standing_parts(standing, "held-out accuracy")
    return [
        Section("Result", [*told, Table(("", ""), field_words(figures))]),
        Section("Accuracy against steps", steps_parts(run)),
        Section("Held-out training samples", _held_out_parts(run)),
        Section("Features along the flow", _flow_parts(run)),
        Section("Configuration", [Table(("", ""), field_words(settings))]),
        Section("Versions", [Table(("", ""), field_words(record.versions))]),
    ]


def standing_parts(standing: "Standing", what: str = "accuracy") -> "list[Part]":
    """An accuracy beside chance, majority class and zero-shot, and a warning where it is no better than those."""
    from fastfsl.report import Table

    def percent(share: float | None) -> float | None:
        return None if share is None else 100 * share

    low, high = standing.interval or (None, None)
    rows = [
        (what, percent(standing.accuracy), percent(low), percent(high)),
        ("zero-shot: the class texts alone", percent(standing.zero_shot_accuracy), None, None),
        (f"always answering {standing.majority_class}", percent(standing.majority_share), None, None),
        ("chance", percent(standing.chance), None, None),
    ]
    warning, doubt = standing.warning(), standing.doubt()
    return [
        *([] if warning is None else [f"Warning: {warning}."]),
        *([] if doubt is None else [f"{doubt}."]),
        Table(("", "%", "from", "to"), rows, f"On {standing.num_samples} samples, with a 95 % interval (Wilson)"),
    ]


def steps_parts(run: "Run") -> "list[Part]":
    """Held-out accuracy after each Euler step, as the choice of the steps saw it; empty where there was none."""
    from fastfsl.report import Figure, Series, Table, line_chart

    selection: dict[str, Any] = run.record.selection
    selection = selection.get("components", {}).get("fma", selection)
    curve: list[float] = selection.get("accuracy_by_step") or []
    if not curve:
        return []
    chosen = int(selection["num_steps"])
    folds = f"{selection['num_folds']} folds of the training samples, each scored by a flow that had not seen it"
    return [
        Figure(
            line_chart(
                [str(step) for step in range(len(curve))],
                [Series("held-out accuracy", tuple(100 * value for value in curve))],
                x_label="Euler steps",
                y_label="accuracy, %",
                marked=chosen,
            ),
            f"Held-out accuracy from {100 * curve[0]:.1f} % without a step to {100 * curve[chosen]:.1f} % after the "
            f"{chosen} that were chosen",
            f"Over {folds}. Dashed: the number of steps chosen.",
            Table(("steps", "accuracy, %"), [(step, 100 * value) for step, value in enumerate(curve)]),
        )
    ]


def prediction_parts(
    probabilities: "NDArray[np.floating]", labels: "NDArray[np.int64]", class_names: list[str]
) -> "list[Part]":
    """Confusions and reliability of predictions."""
    from fastfsl.report import confusion_parts, reliability_figure

    parts = confusion_parts(labels, probabilities.argmax(axis=1), class_names)
    return [*parts, reliability_figure(probabilities, labels)]


def _held_out_parts(run: "Run") -> "list[Part]":
    import numpy as np
    from scipy.special import softmax

    from fastfsl.fit.auto import Auto
    from fastfsl.fit.fma import FlowMatchingAlignment

    estimator, names = run.estimator, run.record.class_names
    about = "Predictions for training samples by fits that had not seen them; no test sample is among them."
    if isinstance(estimator, Auto) and estimator.held_out_ is not None:
        return [about, *prediction_parts(*estimator.held_out_, names)]
    if isinstance(estimator, FlowMatchingAlignment) and run.support is not None:
        logits = estimator.selection_.held_out
        if logits is not None:
            rows = np.flatnonzero(np.isfinite(logits).all(axis=1))
            return [about, *prediction_parts(softmax(logits[rows], axis=1), run.support.labels[rows], names)]
    return []


def _flow_parts(run: "Run") -> "list[Part]":
    import numpy as np
    import torch

    from fastfsl.errors import ConfigError
    from fastfsl.fit.deployment import deployment
    from fastfsl.flow import normalize, plan_states
    from fastfsl.report import flow_map

    try:
        deployed = deployment(run.estimator)
    except ConfigError:  # a flow solved otherwise than by Euler steps
        return []
    plan, targets = deployed.plan, deployed.class_embeddings
    if run.support is None or plan is None or targets is None or plan.num_steps == 0:
        return []
    features, labels = run.support.features, run.support.labels
    if len(labels) > _MAX_SAMPLES:  # spread over them all: they may come class by class
        spread = np.linspace(0, len(labels) - 1, _MAX_SAMPLES).astype(np.int64)
        features, labels = features[spread], labels[spread]
    with torch.inference_mode():
        states = plan_states(plan, torch.from_numpy(features), range(plan.num_steps + 1))
        unit = [normalize(state).numpy() for state in states]
    return [
        "The training samples, not augmented, on their way. The flow has seen them; new ones may go less far.",
        flow_map(unit, labels, targets, run.record.class_names),
    ]
