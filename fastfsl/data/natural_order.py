"""Sorting that puts "class 2" before "class 10"."""

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key: runs of digits compare as numbers, the rest without regard to case; ties by the exact text."""
    parts = _DIGITS.split(text)
    chunks = tuple(
        (0, int(part), "") if position % 2 else (1, 0, part.casefold()) for position, part in enumerate(parts)
    )
    return chunks, text
