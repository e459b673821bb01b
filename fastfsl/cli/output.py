"""What commands print: results on stdout, everything else on stderr, so that ``--json`` gives one clean document."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Control characters, but for the ends of lines, and those that turn the text around them about.
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class _Console(Console):
    """Shows what it is given as it is: names from users are neither markup nor commands to the terminal."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with control characters escaped; rich's own are apart from the text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


@cache
def stdout() -> Console:
    """The console for results."""
    return _Console()


@cache
def stderr() -> Console:
    """The console for progress, warnings and errors."""
    return _Console(stderr=True)


def visible(text: str) -> str:
    r"""The text with its control characters escaped, such as \x1b, but for the ends of lines."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout.

    Raises:
        ValueError: it holds NaN or an infinite number, which JSON has no words for.
    """
    text = json.dumps(document, indent=2, ensure_ascii=not _speaks_unicode(), allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_fields(title: str, fields: Mapping[str, Any]) -> None:
    """Print names and values as a table on stdout; nested mappings become dotted names."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in field_words(fields):
        table.add_row(Text(name), Text(value))
    stdout().print(table)


def for_people(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a result without what is only for machines; images per class as their range."""
    shown = {key: value for key, value in document.items() if key not in ("class_accuracy", "files", "next")}
    counts = shown.pop("class_counts", None)
    if counts:
        least, most = min(counts.values()), max(counts.values())
        shown["images_per_class"] = str(least) if least == most else f"{least} to {most}"
    files = document.get("files")
    if files is not None:
        shown["files"] = f"{files['used']} of {files['seen']} used"
    return shown


def field_words(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as a person reads them; nested mappings become dotted names."""
    return [(name, _words(value)) for name, value in _flat(fields)]


def warn(message: str) -> None:
    """Print a warning on stderr."""
    stderr().print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error on stderr."""
    stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """What libraries print while the block runs goes to stderr."""
    with redirect_stdout(sys.stderr):
        yield


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _words(value: object) -> str:
    """A value as a person reads it."""
    if value is None or value in ({}, [], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return str(value)


def _speaks_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
