"""From prompts to a class embedding: the tokenizer, the text tower's graph, and the mean over the prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl import bundle
from fastfsl.errors import BundleError, ConfigError
from fastfsl.runtime.session import Session, create_session, run_finite
from fastfsl.runtime.tokenizer import Tokenizer

_TEXTS_AT_ONCE = 32
_TINY = 1e-12  # as torch's normalize


class TextEncoder:
    """A bundle's text tower. Several threads may call it.

    Args:
        session: of the tower's graph.
        tokenizer: makes what the tower gets.
        templates: what a class name is put into.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, templates: Sequence[str]) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._templates = tuple(templates)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], manifest: bundle.Manifest, *, num_threads: int | None = None
    ) -> TextEncoder:
        """Read a bundle's text tower and tokenizer. It computes on the CPU: a class is added now and then.

        Raises:
            ConfigError: the bundle has none, or a package that it needs is not installed.
            BundleError: a file is altered, or is not what the manifest promises.
        """
        text = manifest.text
        if text is None:
            raise ConfigError("this bundle cannot read texts: export it again with --text")
        file = Path(path) / bundle.TOKENIZER
        tokenizer = Tokenizer(bundle.read_file(path, manifest, bundle.TOKENIZER), text, file)
        file = Path(path) / bundle.TEXT_GRAPH
        model = bundle.read_file(path, manifest, bundle.TEXT_GRAPH)
        if bundle.int8_products(model, str(file)) is not None:
            # Its sums are not looked at as those of the other graphs are, and no exporter of ours quantises it.
            raise BundleError(f"{file}: multiplies whole numbers, and a text tower is float32; export the bundle again")
        session = create_session(model, str(file), device="cpu", num_threads=num_threads)
        expected = ("tensor(int64)", text["context_length"], manifest.embed_dim)
        found = [
            (input_.type, *input_.shape[1:], *output.shape[1:])
            for input_, output in zip(session.get_inputs(), session.get_outputs(), strict=False)
            if (input_.name, output.name) == ("token_ids", "text_embeds")
        ]
        if found != [expected] or len(session.get_inputs()) != 1:
            raise BundleError(f"{file}: expected token_ids -> text_embeds of {expected}, got {found}; export it again")
        return cls(session, tokenizer, text["templates"])

    def prompts(self, name: str) -> list[str]:
        """The name in every template; underscores count as blanks, as in training.

        Raises:
            ConfigError: nothing of the name is left after the tokenizer's cleaning.
        """
        words = " ".join(name.replace("_", " ").split())
        self._check_words("class name", words)
        return [template.replace("{}", words) for template in self._templates]

    def encode(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """L2-normalised embeddings of texts, (n, d), n above 0; what does not fit into the context is cut off."""
        parts = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        return np.concatenate(
            [run_finite(self._session, "text_embeds", {"token_ids": self._tokenizer(part)}) for part in parts]
        )

    def class_embedding(self, prompts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The embedding of a class, (d,): the mean over its prompts' embeddings, L2-normalised.

        Raises:
            ConfigError: nothing of a prompt is left after the tokenizer's cleaning.
        """
        for prompt in prompts:
            self._check_words("prompt", prompt)
        return unit(self.encode(prompts).mean(axis=0))

    def _check_words(self, what: str, text: str) -> None:
        if not self._tokenizer.clean(text):
            raise ConfigError(f"expected a {what} with a word in it, got {text!r:.80}")


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The vector at length 1, float32."""
    scaled: np.ndarray[Any, np.dtype[np.float32]] = vector / np.maximum(np.linalg.norm(vector), _TINY)
    return scaled.astype(np.float32)
