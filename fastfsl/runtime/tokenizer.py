"""Texts to token ids as open_clip makes them, without torch: its cleaning here, the rest by the package tokenizers."""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.tokenizer_file import check_tokenizer_file
from fastfsl.errors import BundleError, ConfigError

_REMEDY = "pip install 'fastfsl[text]'"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer:
    """A bundle's tokenizer. Several threads may call it.

    Args:
        data: the tokenizer's file, in the format of the package tokenizers.
        text: the manifest's ``text``.
        path: what messages call the file.

    Raises:
        ConfigError: a package that it needs is not installed.
        BundleError: the file is no tokenizer, or not the one that the manifest describes.
    """

    def __init__(self, data: bytes, text: dict[str, Any], path: Path) -> None:
        self._fix_text, tokenizers = _packages()
        self._text = text
        self._path = path
        check_tokenizer_file(data, str(path), text["context_length"])
        self._tokenizer = self._guarded(lambda: tokenizers.Tokenizer.from_str(data.decode()))

    def clean(self, text: str) -> str:
        """A text as the tokenizer gets it: mended, entities read, blanks made single, and what the model wants beside.

        Source: open_clip's tokenizer.py.
        """
        cleaned = html.unescape(html.unescape(self._fix_text(text))).strip()
        if self._text["clean"] == "canonicalize":
            cleaned = cleaned.replace("_", " ").translate(_NO_PUNCTUATION).lower()
        cleaned = " ".join(cleaned.split())
        return cleaned.lower() if self._text["clean"] == "lower" else cleaned

    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids of texts, (n, context_length), n above 0.

        Raises:
            BundleError: the tokenizer fails, or gives ids that the model does not have.
        """
        cleaned = [self.clean(text) for text in texts]
        rows = self._guarded(lambda: [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned)])
        length, size = self._text["context_length"], self._text["vocab_size"]
        if any(len(row) != length for row in rows) or max(map(max, rows)) >= size:
            raise BundleError(
                f"{self._path}: expected {length} ids below {size} for each text, got others; export the bundle again"
            )
        ids = np.array(rows, np.int64)
        if self._text["strip_id"] is not None:
            ids[ids == self._text["strip_id"]] = 0
        return ids

    def _guarded(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the package returns
        try:
            return call()
        except BaseException as error:
            # What the package refuses is an Exception; where its Rust code panics, a BaseException of its own.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(f"{self._path}: the tokenizer fails ({reason:.200}); export the bundle again") from error


def _packages() -> tuple[Callable[[str], str], Any]:
    try:
        import ftfy
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"to read texts the packages tokenizers and ftfy are needed ({error}); {_REMEDY}") from error
    return ftfy.fix_text, tokenizers
