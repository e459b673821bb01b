"""Classes that a bundle was not trained on, added by name."""

from __future__ import annotations

import os
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfsl import bundle
from fastfsl.bundle.text_record import MAX_TEMPLATES
from fastfsl.errors import BundleError, ConfigError, DataError
from fastfsl.runtime.head import Head
from fastfsl.runtime.text_encoder import TextEncoder, unit

if TYPE_CHECKING:
    from fastfsl.runtime.flow_executor import FlowExecutor

    Rows = np.ndarray[Any, np.dtype[np.float32]]

_CLASSES = "class_embeddings"
_TINY = 1e-12
# Characters of a class's name, and of a prompt, of which a tokenizer keeps 77 ids or fewer.
MAX_CLASS_NAME = 1024
MAX_PROMPT = 2**16
# Of the logits' scale: what a graph with its own classes and with the same ones given may differ by.
_MOST_OF_THE_SCALE = 1e-3


class ClassAdder:
    """Makes heads with one class more. The text tower is read from the bundle when it is first needed, and kept.

    A class's text embedding t is the mean over its prompts. The flow sends the class where it sends classes without
    images in training (`_place`), and is read out with that; a linear part that is the texts' own gets the row s t.
    Parts that images were fitted to cannot know the class.

    Args:
        path: the bundle's folder, which has to stay there until the first class was added.
        manifest: its manifest.
        num_threads: threads of one operator; None: all this process may use.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: bundle.Manifest, num_threads: int | None = None) -> None:
        self._path = Path(path).absolute()
        self._manifest = manifest
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._loaded: tuple[TextEncoder, bundle.ClassPlaces | None] | None = None

    def extended(self, head: Head, name: object, prompts: Sequence[str] | None) -> Head:
        """A head that knows one class more, its last.

        Args:
            head: the bundle's, or one that this gave.
            name: label of the class; None of `head`'s.
            prompts: texts that describe it; None: the name in the run's templates.

        Raises:
            ConfigError: the name or a prompt is empty or known, the bundle cannot read texts, a package is missing, or
                a part of the bundle was fitted to images of its classes.
            DataError: the name or a prompt is no text that can be written: it has a lone surrogate or a control
                character, or is too long.
            BundleError: the bundle's files are altered, or contradict each other.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"expected a class name with a word in it, got {name!r:.80}")
        _check_text("class name", name, MAX_CLASS_NAME)
        if name in head.class_names:
            raise ConfigError(f"the class {name!r:.80} is known already; choose another name")
        if isinstance(prompts, str):
            prompts = [prompts]
        if prompts is not None and not (prompts and all(isinstance(prompt, str) for prompt in prompts)):
            raise ConfigError(f"expected prompts to be one text or more, or None, got {prompts!r:.80}")
        if prompts is not None and len(prompts) > MAX_TEMPLATES:
            raise DataError(f"expected at most {MAX_TEMPLATES} prompts of a class, got {len(prompts)}")
        for prompt in prompts or ():
            _check_text("prompt", prompt, MAX_PROMPT)
        if self._manifest.text is None:
            raise ConfigError("this bundle cannot read texts: export it again with --text")
        scale = float(self._manifest.text["linear_scale"])
        _check_extensible(head.readout, scale)
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load(head.flow)
            texts, places = self._loaded
        text = texts.class_embedding(texts.prompts(name) if prompts is None else prompts)
        flow, readout = head.flow, head.readout
        if flow is not None and places is not None:
            count = len(places.class_embeddings) // len(self._manifest.class_names)
            place = np.repeat(_place(text, places)[None], count, axis=0)
            known = places.class_embeddings if flow.class_embeddings is None else flow.class_embeddings
            flow = flow.with_classes(np.concatenate([known, place]))
        if readout is not None:
            row = (scale * text.astype(np.float64)).astype(np.float32)
            readout = replace(
                readout,
                linear_weight=np.concatenate([readout.linear_weight, row[None]]),
                linear_bias=np.append(readout.linear_bias, np.float32(0)),
            )
        return Head(flow, readout, (*head.class_names, name))

    def _load(self, flow: FlowExecutor | None) -> tuple[TextEncoder, bundle.ClassPlaces | None]:
        texts = TextEncoder.load(self._path, self._manifest, num_threads=self._num_threads)
        if flow is None:
            return texts, None
        places = bundle.read_class_places(self._path, self._manifest)
        _check_places(flow, places, self._path / bundle.FLOW_GRAPH)
        return texts, places


def _place(text: Rows, places: bundle.ClassPlaces) -> Rows:
    """The point to which the flow sends a class that it was not trained on, (d,).

        unit(c + unit(P (t + shift))), P the part perpendicular to c, as in training (`fastfsl.flow.text_targets`);

    unit(t + shift) in bundles without c. Shift and c are 0 where the targets are the texts alone.
    """
    moved, centre = text + places.target_shift, places.target_centre
    if centre is None:
        return unit(moved)
    axis = centre / max(float(np.linalg.norm(centre)), _TINY)
    across = moved - (moved @ axis) * axis
    return unit(centre + across / max(float(np.linalg.norm(across)), _TINY))


def _check_text(what: str, text: str, most: int) -> None:
    """Refuse what could not be written to JSON, CSV or a terminal afterwards.

    Raises:
        DataError: says what is wrong with it.
    """
    if len(text) > most:
        raise DataError(f"expected a {what} of at most {most} characters, got {len(text)}")
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs" or (kind == "Cc" and (what == "class name" or character not in "\t\n\r")):
            name = "a lone surrogate" if kind == "Cs" else "a control character"
            raise DataError(f"the {what} {text!a:.80} has {name}, U+{ord(character):04X}: take it out")


def _check_extensible(readout: bundle.Readout | None, scale: float) -> None:
    """Refuse a read-out that would say nothing of a class that it has seen no image of."""
    if readout is None:
        return
    linear = readout.linear_weight.any() or readout.linear_bias.any()
    if readout.kernels or (linear and scale == 0) or readout.linear_bias.any():
        raise ConfigError(
            "this bundle's read-out was fitted to images of its classes and cannot know a class by its name: train "
            "again with images of the new class, or export a run of zero-shot, fma or mps with --text"
        )


def _check_places(flow: FlowExecutor, places: bundle.ClassPlaces, path: Path) -> None:
    """The flow's graph takes classes, and those that the bundle lists are its own."""
    nodes = {node.name: node.type for node in flow.session.get_overridable_initializers()}
    if nodes.get(_CLASSES) != "tensor(float)":
        raise BundleError(f"{path}: takes no other {_CLASSES} (float32), got {nodes}; export the bundle again")
    row = {"image_embeds": np.eye(1, places.class_embeddings.shape[1], dtype=np.float32)}
    (own,) = flow.session.run(["logits"], row)
    (given,) = flow.session.run(["logits"], {**row, _CLASSES: places.class_embeddings})
    if given.shape != own.shape or not np.abs(given - own).max() <= _MOST_OF_THE_SCALE * max(np.abs(own).max(), 1):
        raise BundleError(f"{path}: its classes are not those of {bundle.TEXT_CLASSES}; export the bundle again")
