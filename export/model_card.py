"""The model card that lies in every bundle."""

from typing import Any

from fastfsl.bundle import Readout

_SHOWN_CLASSES = 20


def model_card(fields: dict[str, Any], readout: Readout | None) -> str:
    """A short README for a bundle, from the fields of its manifest and its read-out.

    Args:
        fields: the manifest's fields, as the exporter fills them.
        readout: the read-out; None: the logits are the flow's.

    Returns:
        Markdown.
    """
    classes = fields["class_names"]
    shown = ", ".join(classes[:_SHOWN_CLASSES]) + (", ..." if len(classes) > _SHOWN_CLASSES else "")
    training = fields["training"]
    shots = "all images" if training["num_shots"] is None else f"{training['num_shots']} images a class"
    lines = [
        f"# {len(classes)}-class few-shot classifier",
        "",
        f"Made with fastfsl, method `{fields['method']}`, precision {fields['precision']}.",
        "",
        f"- Parts: {_parts(fields, readout)}",
        f"- Classes: {shown}",
        f"- Encoder: {_encoder(fields)}",
        f"- Support set: {shots} ({training['num_support']} in all), seed {training['seed']}",
        f"- Held-out support accuracy: {_held_out(fields['metrics'])}",
        f"- Agreement with the fitted estimator{_in_fp32(fields['precision'])}: {_parity(fields['parity'])}",
        *_precision(fields["precision"], fields["parity"]),
        *_kernels(fields["kernels"], fields["parity"]),
        "",
        "## Use",
        "",
        "```python",
        "from fastfsl.runtime import Classifier",
        "",
        'clf = Classifier.load("path/to/this/folder")',
        _usage(fields["encoder"]),
        "```",
        "",
        "## Limits",
        "",
        _answers(readout),
        (
            "Its accuracy on your data is what `fastfsl evaluate` measures on images it was not trained on; the figure "
            "above comes from the support set."
        ),
        "The encoder's licence and its training data's biases carry over.",
    ]
    return "\n".join(lines) + "\n"


def _parts(fields: dict[str, Any], readout: Readout | None) -> str:
    parts = []
    if fields["step_size"] is not None:
        read = f", read at steps {', '.join(map(str, fields['read_steps']))}" if fields["read_steps"] else ""
        parts.append(f"a flow of {fields['num_steps']} Euler steps of {fields['step_size']:g}{read}")
    if readout is not None:
        about = readout.describe()
        parts += ["a linear head"] if about["linear"] else []
        parts += [f"a kernel of {kernel['keys']} keys (beta {kernel['beta']:g})" for kernel in about["kernels"]]
        parts += [f"temperature {readout.temperature:.3g}"] if readout.temperature != 1 else []
    return ", ".join(parts)


def _answers(readout: Readout | None) -> str:
    if readout is None or readout.threshold is None:
        return "The classifier answers with one of its classes whatever it is shown."
    return (
        f'Where its best probability is below {readout.threshold:.3g} the classifier answers "none of these" '
        "(`prediction.known` is False). The threshold was chosen on the support set, whose images all belong to a "
        "class: what it does to images of other things has not been measured."
    )


def _encoder(fields: dict[str, Any]) -> str:
    encoder, blend, source = fields["encoder"], fields["blend"], fields["training"]["source"]
    if encoder is None:
        return "none; this bundle classifies features"
    about = f"`{encoder['backbone']}`" + (f", weights `{encoder['pretrained']}`" if encoder["pretrained"] else "")
    if source is not None:
        about += f"; {source['num_parameters']} numbers were tuned before its features were classified"
    if blend is not None:
        length = "brought to length 1" if blend["normalized"] else "as long as that is"
        about += (
            "; its image tower has a tuned branch beside the frozen one, and an embedding is alpha * tuned + "
            f"(1 - alpha) * frozen of the two unit embeddings, {length}. Its alpha is {blend['alpha']:g}; "
            "`Classifier.load(..., alpha=...)` takes another, 0 being the frozen encoder"
        )
    return about


def _held_out(metrics: dict[str, Any]) -> str:
    held_out = metrics.get("held_out_support")
    if held_out is None:
        return "not measured (nothing was held out for the classifier)"
    views = " of augmented views" if held_out.get("rule") == "views" else ""
    folds = f" over {held_out['num_folds']} folds{views}" if held_out.get("num_folds") else ""
    return f"{100 * held_out['accuracy']:.1f} %{folds}; settings were chosen on it"


def _parity(parity: dict[str, Any]) -> str:
    figures = {"max_abs_error": "embeddings", "max_probability_error": "probabilities"}
    return "; ".join(
        f"{part}: {what} within {report[name]:.1e}"
        for part, report in parity.items()
        if part not in ("rounded_weights", "precision")
        for name, what in figures.items()
        if name in report
    )


def _in_fp32(precision: str) -> str:
    """Graphs are held to torch before their precision is changed."""
    return "" if precision == "fp32" else f", of the graphs in fp32 that those in {precision} were made from"


def _precision(precision: str, parity: dict[str, Any]) -> list[str]:
    report = parity.get("precision")
    if report is None:
        return []
    kept = f"; {len(report['fp32_layers'])} layers stayed fp32" if report.get("fp32_layers") else ""
    checked = f"; {report['checked']}" if "checked" in report else ""
    about = (
        f"- {precision} against fp32: the same class for {100 * report['agreement']:.1f} % of {report['num_samples']} "
        f"{report['samples']}, accuracy there {100 * report['accuracy']:.1f} % against "
        f"{100 * report['accuracy_fp32']:.1f} %{kept}{checked}"
    )
    limit = (
        "- The answers are the same on every processor, to rounding: sums of two adjacent int8 products fit in 16 bits"
    )
    return [about, limit] if precision == "int8" else [about]


def _kernels(kernels: dict[str, Any] | None, parity: dict[str, Any]) -> list[str]:
    if kernels is None:
        return []
    error = parity["rounded_weights"]["max_probability_error"]
    about = (
        f"- Compiled kernels of the flow: {', '.join(kernels['architectures'])}, and PTX for other NVIDIA cards from "
        f"sm_80 on; {kernels['dtype']} with float32 sums. They were compiled and not run where this was exported. "
        f"Rounding their weights alone, in plain torch, moved probabilities by up to {error:.1e}"
    )
    return [about]


def _usage(encoder: dict[str, Any] | None) -> str:
    if encoder is None:
        return "clf.classify_features(features)  # (n, d) features of the encoder it was trained on"
    return 'clf.predict(["photo.jpg"], top_k=5)'
