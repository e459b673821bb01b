"""The model card that lies in every bundle."""

from typing import Any

_SHOWN_CLASSES = 20


def model_card(fields: dict[str, Any]) -> str:
    """A short README for a bundle, from the fields of its manifest.

    Args:
        fields: the manifest's fields, as the exporter fills them.

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
        (
            f"Made with fastfsl, method `{fields['method']}`, {fields['num_steps']} Euler steps of "
            f"{fields['step_size']:g}, precision {fields['precision']}."
        ),
        "",
        f"- Classes: {shown}",
        f"- Encoder: {_encoder(fields['encoder'])}",
        f"- Support set: {shots} ({training['num_support']} in all), seed {training['seed']}",
        f"- Held-out support accuracy: {_held_out(fields['metrics'])}",
        f"- Agreement with torch: {_parity(fields['parity'])}",
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
        (
            "The classifier answers with one of its classes whatever it is shown. Its accuracy on your data is what "
            "`fastfsl evaluate` measures on images it was not trained on; the figure above comes from the support set."
        ),
        "The encoder's licence and its training data's biases carry over.",
    ]
    return "\n".join(lines) + "\n"


def _encoder(encoder: dict[str, Any] | None) -> str:
    if encoder is None:
        return "none; this bundle classifies features"
    weights = f", weights `{encoder['pretrained']}`" if encoder["pretrained"] else ""
    return f"`{encoder['backbone']}`{weights}"


def _held_out(metrics: dict[str, Any]) -> str:
    held_out = metrics.get("held_out_support")
    if held_out is None:
        return "not measured (nothing could be held out)"
    kind = "folds of the support set" if held_out["rule"] == "folds" else "folds of augmented views of the support set"
    return f"{100 * held_out['accuracy']:.1f} % over {held_out['num_folds']} {kind}; the step count was chosen on it"


def _parity(parity: dict[str, Any]) -> str:
    return "; ".join(f"{part}: largest difference {report['max_abs_error']:.1e}" for part, report in parity.items())


def _usage(encoder: dict[str, Any] | None) -> str:
    if encoder is None:
        return "clf.classify_features(features)  # (n, d) features of the encoder it was trained on"
    return 'clf.predict(["photo.jpg"], top_k=5)'
