"""What a bundle needs so that classes can be added to it by name: text tower, tokenizer, and where its classes lie."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from fastfsl.bundle import TEXT_CLASSES, TEXT_GRAPH, TOKENIZER, ClassPlaces, write_class_places
from fastfsl.encoders import Encoder
from fastfsl.errors import BundleError, ConfigError
from fastfsl.export.parity import BATCHES, MAX_FEATURE_ERROR, MIN_COSINE
from fastfsl.export.readout import has_flow
from fastfsl.export.textual_graph import textual_graph, tokens_to_embedding
from fastfsl.export.tokenizer_file import tokenizer_file
from fastfsl.fit.auto import Auto
from fastfsl.fit.deployment import Deployment
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.run import Run
from fastfsl.fit.text_readout import TextReadout
from fastfsl.heads import LinearForm, ZeroShot
from fastfsl.runtime.session import create_session
from fastfsl.runtime.text_encoder import TextEncoder
from fastfsl.runtime.tokenizer import Tokenizer

# Texts on which the tower is compared; the run's own prompts come first.
_COMPARED = 64
_AWKWARD = (
    "<start_of_text>It&#39;s 3 \u201ccaf\u00c3\u00a9s\u201d!",
    "\u65e5\u672c\u8a9e \U0001f600 _a_b_",
    "word " * 300,
)
# A learned context moves a class text by far more; another version of the tokenizer's packages by nothing or much.
_MOST_FROM_THE_RUN = 1e-3


def check_extensible(run: Run) -> float:
    """Whether a class can be added to a run's classifier by name.

    Returns:
        The factor on a class text that makes its row of the read-out's linear part; 0 if that part is empty.

    Raises:
        ConfigError: it was trained on features, or a part of it was fitted to images of each class.
    """
    if run.record.encoder is None:
        raise ConfigError("--text needs an encoder, and this run was trained on features: export it without --text")
    scale = _linear_scale(run.estimator)
    if scale is None:
        raise ConfigError(
            f"--text: a class without images cannot be added to {run.record.config.method}, part of which is fitted to "
            "images of each class: export without --text, or train zero-shot, fma or mps"
        )
    return scale


def write_text(
    staging: Path, run: Run, encoder: Encoder, deployed: Deployment
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the files of the text part.

    Args:
        staging: the bundle's folder.
        run: the run.
        encoder: its encoder, tuned where the run tuned it.
        deployed: the run's deployment.

    Returns:
        The manifest's ``text``, and the parity figures: `max_abs_error` and `min_cosine` of the embeddings of token ids
        (batches 1, 2 and 5), and `class_error`, the largest difference between the run's class embeddings and those
        that the runtime makes of their names.

    Raises:
        ConfigError: the classes' texts are not made from their names.
        BundleError: tower or tokenizer cannot be exported, or do not match torch.
    """
    scale = check_extensible(run)
    written = tokenizer_file(encoder.tokenizer)
    vocabulary = [module.num_embeddings for module in encoder.model.modules() if isinstance(module, nn.Embedding)]
    text = {
        "context_length": written.context_length,
        "vocab_size": max(vocabulary),
        "clean": written.clean,
        "strip_id": written.strip_id,
        "templates": run.record.templates,
        "linear_scale": scale,
    }
    model = textual_graph(encoder)
    parity, reader = _text_parity(encoder, model, Tokenizer(written.data, text, staging / TOKENIZER), text, run)
    parity["class_error"] = _class_error(run, reader)
    (staging / TEXT_GRAPH).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, staging / TEXT_GRAPH)
    (staging / TOKENIZER).write_bytes(written.data)
    if has_flow(deployed) and deployed.class_embeddings is not None:
        rows = np.ascontiguousarray(deployed.class_embeddings.reshape(-1, deployed.class_embeddings.shape[-1]))
        flow = _flow(run.estimator)
        centre = None if flow.target_centre_ is None else flow.target_centre_.cpu().numpy()
        places = ClassPlaces(rows, flow.target_shift_.cpu().numpy(), centre)
        write_class_places(staging / TEXT_CLASSES, places)
    return text, parity


def _linear_scale(estimator: Estimator) -> float | None:
    if isinstance(estimator, FlowMatchingAlignment):
        return 0.0
    if isinstance(estimator, Auto):
        return 0.0 if all(isinstance(part, FlowMatchingAlignment) for part in estimator.components_.values()) else None
    if isinstance(estimator, TextReadout | ZeroShot):
        return 100.0 if estimator.logit_scale is None else float(estimator.logit_scale)
    return None


def _flow(estimator: Estimator) -> FlowMatchingAlignment:
    parts = estimator.components_.values() if isinstance(estimator, Auto) else [estimator]
    return next(part for part in parts if isinstance(part, FlowMatchingAlignment))


def _run_texts(estimator: Estimator) -> NDArray[Any]:
    """The class texts that a run was trained with, L2-normalised, (C, d)."""
    if isinstance(estimator, TextReadout | ZeroShot) and isinstance(estimator.form_, LinearForm):
        texts: NDArray[Any] = estimator.form_.weight
        texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    else:
        texts = _flow(estimator).class_embeddings_.cpu().numpy()
    return texts


def _text_parity(
    encoder: Encoder, model: onnx.ModelProto, tokenizer: Tokenizer, text: dict[str, Any], run: Run
) -> tuple[dict[str, Any], TextEncoder]:
    session = create_session(model.SerializeToString(), TEXT_GRAPH, device="cpu")
    reference = tokens_to_embedding(encoder).cpu()
    texts = [*run.prompts()[:_COMPARED], *_AWKWARD]
    expected_ids = encoder.tokenizer(texts)
    if not np.array_equal(tokenizer(texts), expected_ids.numpy()):
        raise BundleError(
            "the exported tokenizer does not give open_clip's token ids: nothing was written; report this"
        )
    errors, cosines = [], []
    for batch in BATCHES:
        ids = expected_ids[-batch:]
        with torch.inference_mode():
            expected = reference(ids).numpy()
        got = session.run(["text_embeds"], {"token_ids": ids.numpy()})[0]
        if got.shape != expected.shape:
            raise BundleError(f"the exported text tower gives {got.shape}, expected {expected.shape}: report this")
        errors.append(float(np.abs(got - expected).max()))
        cosines.append(float((got * expected).sum(axis=1).min()))
    report: dict[str, Any] = {
        "batches": list(BATCHES),
        "max_abs_error": float(np.max(errors)),
        "min_cosine": float(np.min(cosines)),
    }
    if not (report["min_cosine"] >= MIN_COSINE and report["max_abs_error"] <= MAX_FEATURE_ERROR):
        raise BundleError(f"the exported text tower does not match torch ({report}): nothing was written; report this")
    return report, TextEncoder(session, tokenizer, text["templates"])


def _class_error(run: Run, reader: TextEncoder) -> float:
    names, prompts = run.record.class_names, run.prompts()
    per_class = len(prompts) // len(names)
    count = max(1, min(len(names), _COMPARED // per_class))
    made = np.stack(
        [reader.class_embedding(prompts[index * per_class : (index + 1) * per_class]) for index in range(count)]
    )
    error = float(np.abs(made - _run_texts(run.estimator)[:count]).max())
    if not error <= _MOST_FROM_THE_RUN:
        raise ConfigError(
            f"--text: the run's class embeddings are not those of its prompts, such as {prompts[0]!r} (they differ by "
            f"{error:.2g}): they are learned, as coop's are, and cannot be made from a new name; export without --text"
        )
    return error
