"""Class embeddings: the class names, put into prompts and read by the text encoder."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastfsl.data import class_prompts
from fastfsl.encoders.encoder import Encoder

_TEXTS_PER_BATCH = 256


def class_embeddings(
    encoder: Encoder, class_names: Sequence[str], templates: str | Sequence[str] = "generic"
) -> NDArray[np.float32]:
    """Embed every class: the mean over the templates of the normalised prompt embeddings, normalised again.

    Args:
        encoder: The model.
        class_names: C names as found in the data; underscores count as blanks.
        templates: Preset name, one template, or several ("{}" marks the name's place). The preset of a standard set
            also reads its class names as words (`prompt_names`).

    Returns:
        L2-normalised embeddings (C, d), float32.

    Raises:
        ConfigError: Unknown preset, or a template without exactly one "{}".
        DataError: A class name without a word.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4.
    """
    prompts = class_prompts(class_names, templates)
    _warn_of_likeness(encoder, class_names, prompts)
    parts = [
        encoder.encode_texts(prompts[start : start + _TEXTS_PER_BATCH])
        for start in range(0, len(prompts), _TEXTS_PER_BATCH)
    ]
    by_class = torch.cat(parts).unflatten(0, (len(class_names), -1))
    embeddings: NDArray[np.float32] = F.normalize(by_class.mean(dim=1), dim=-1).cpu().numpy()
    return embeddings


def _warn_of_likeness(encoder: Encoder, class_names: Sequence[str], prompts: Sequence[str]) -> None:
    """Warn of the classes whose prompts the model cannot tell apart: alike but for case, or cut to its context."""
    tokens = encoder.tokenizer(list(prompts))
    groups = _alike(class_names, tokens.tolist())
    if groups:
        shown = "; ".join(" = ".join(map(repr, group)) for group in groups)
        warnings.warn(
            f"the model reads the prompts of some classes as the same text (it takes {tokens.shape[1]} tokens, and no "
            f"account of case), so it cannot tell them apart: {shown}; change these class names",
            stacklevel=3,
        )


def _alike(class_names: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[list[str]]:
    """Groups of the classes that share a prompt's tokens, of which there are as many for each class."""
    num_prompts = len(tokens) // len(class_names)
    label_of: dict[tuple[int, ...], int] = {}
    first = list(range(len(class_names)))  # of the group that a class belongs to

    def root(label: int) -> int:
        while first[label] != label:
            label = first[label]
        return label

    for row, sequence in enumerate(tokens):
        label = row // num_prompts
        other = label_of.setdefault(tuple(sequence), label)
        one, two = sorted((root(label), root(other)))
        first[two] = one
    groups: dict[int, list[str]] = {}
    for label, name in enumerate(class_names):
        groups.setdefault(root(label), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
