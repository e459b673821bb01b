"""Text from users (class names, paths) made fit for HTML and SVG."""

import unicodedata
from html import escape

# Longer than any name that can still be read in a table or beside an axis.
MAX_CHARACTERS = 300
# They turn the text around them about; a name that needs another direction has it by its letters.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSPOKEN = frozenset({"Cc", "Cs"})  # control characters and halves of surrogate pairs: no parser takes them all


def plain(value: object, limit: int = MAX_CHARACTERS) -> str:
    """A value as one line of at most `limit` characters that any parser takes; not yet escaped."""
    text = str(value)
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        " "
        if sign in "\t\n\r"
        else "\ufffd"
        if sign in _DIRECTIONS or unicodedata.category(sign) in _UNSPOKEN
        else sign
        for sign in shown
    )


def escaped(value: object, limit: int = MAX_CHARACTERS) -> str:
    """`plain`, with nothing left in it that HTML or SVG would take for markup, in text as in attributes."""
    return escape(plain(value, limit), quote=True)


def number(value: float, digits: int = 4) -> str:
    """A number of so many significant digits, without an exponent where it is short enough."""
    if value != value:  # noqa: PLR0124  # NaN
        return "–"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) < 1e9 and abs(value) >= 1 else text
