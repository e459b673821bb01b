"""Prompts that begin with learned vectors in place of words: what CoOp and CoCoOp share."""

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastfsl.data import fill
from fastfsl.encoders import Encoder
from fastfsl.errors import ConfigError
from fastfsl.peft.base import unit
from fastfsl.peft.text_tower import TextTower, read_prompts, text_part


class ContextPrompts(nn.Module):
    """Prompts `[start] v_1 … v_M name . [end]` of every class, read by a frozen copy of the text tower.

    Args:
        encoder: the base encoder.
        class_names: C names as the prompts are to say them (`fastfsl.data.prompt_names`); underscores count as
            blanks. A name that is too long is cut as the tokenizer cuts texts, before the end token.
        num_contexts: M.
        init: phrase of M tokens whose embeddings the vectors start from; None: N(0, 0.02²).

    Attributes:
        context: v, (M, width), trained.
        num_classes: C.

    Raises:
        ConfigError: M does not fit the tower's context or the phrase, or the tower is not supported.
        DataError: a class name without a word.
    """

    prefix: Tensor
    suffix: Tensor
    positions: Tensor

    def __init__(self, encoder: Encoder, class_names: Sequence[str], num_contexts: int, init: str | None) -> None:
        super().__init__()
        length = text_part(encoder.model).positional_embedding.shape[0]
        tokenize = cast("Callable[..., Tensor]", encoder.tokenizer)
        words = tokenize(["cat", "dog"], context_length=length)
        start = int((words[0] != words[1]).int().argmax())  # of the first word; 0 where there is no start token
        if not 1 <= num_contexts <= length - start - 2:  # a token of the name and the end token come after
            raise ConfigError(
                f"expected num_contexts 1..{length - start - 2} ({encoder.backbone} reads {length} tokens), "
                f"got {num_contexts}"
            )
        names = [fill(("{}.",), name)[0] for name in class_names]
        tokens = tokenize(names, context_length=length - num_contexts).cpu()
        stand_in = torch.zeros(num_contexts, dtype=tokens.dtype)
        if init is not None:
            phrase = _tokens_of(init, tokenize, length, start)
            if len(phrase) != num_contexts:
                raise ConfigError(
                    f"expected init of num_contexts {num_contexts} tokens, got {init!r} of {len(phrase)}: set "
                    f"num_contexts to {len(phrase)}, or change init"
                )
            stand_in = phrase
        tokens = torch.cat([tokens[:, :start], stand_in.expand(len(names), -1), tokens[:, start:]], dim=1)
        embeddings, positions = read_prompts(encoder.model, tokens)
        prefix, context, suffix = embeddings.tensor_split((start, start + num_contexts), dim=1)
        self.context = nn.Parameter(context[0].clone())
        if init is None:
            nn.init.normal_(self.context, std=0.02)
        self.tower = copy.deepcopy(TextTower(encoder.model))
        self.num_classes = len(names)
        self.register_buffer("prefix", prefix[0].clone(), persistent=False)  # alike in all classes
        self.register_buffer("suffix", suffix.clone(), persistent=False)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, context: Tensor, classes: Tensor) -> Tensor:
        """Read prompts.

        Args:
            context: vectors (M, width), or (k, M, width), one set a prompt.
            classes: class of each prompt, (k,).

        Returns:
            Unit text features (k, d).
        """
        size = len(classes)
        parts = [self.prefix.expand(size, -1, -1), context.expand(size, -1, -1), self.suffix[classes]]
        return unit(self.tower(torch.cat(parts, dim=1), self.positions[classes]))


def _tokens_of(phrase: str, tokenize: Callable[..., Tensor], length: int, start: int) -> Tensor:
    """The phrase's own tokens: those without which the row is that of no text, in a context as much shorter."""
    row = tokenize([phrase], context_length=length)[0].cpu()
    for size in range(length - start):
        empty = tokenize([""], context_length=length - size)[0].cpu()
        if torch.equal(row[start + size :], empty[start:]):
            return row[start : start + size]
    raise ConfigError(f"expected init to be a phrase that fits {length} tokens, got {phrase!r}: shorten it")
