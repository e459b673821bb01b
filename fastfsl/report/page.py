"""The report: one HTML file that needs nothing else, whatever is shown in it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastfsl.files import staged_file
from fastfsl.report.svg import Drawing
from fastfsl.report.text import escaped, number

# The browser is told to load nothing and run nothing, so that no name can make it; pictures are in the page itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Colours that can be told apart by the colour-blind (Okabe and Ito, and their neighbours), light and dark.
_LIGHT = ("#0072b2", "#d55e00", "#007a5a", "#a8508c", "#8a6d00", "#3f7fa6", "#555555", "#7a3fb0", "#b0303a", "#4a6a1f")
_DARK = ("#56b4e9", "#ff9a52", "#3fd0a4", "#e69ac8", "#f0e442", "#9fd0f0", "#bbbbbb", "#c49af0", "#ff8a8a", "#b5d97a")
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--faint:#d8d8d8;--quiet:#555;--fill:#0072b2;--over:#fff;
--stripe:#f5f5f5;%(light)s}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#16181c;--faint:#3a3d44;--quiet:#a8a8a8;--fill:#0067a3;
--over:#e8e8e8;--stripe:#1e2127;%(dark)s}}
@media print{:root{--ink:#000;--paper:#fff;--faint:#ccc;--quiet:#444;--fill:#0072b2;--over:#fff;
--stripe:#fff;%(light)s}
figure,tr{break-inside:avoid}h2{break-after:avoid}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:52rem;margin:0 auto;
padding:1rem;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}
figure{margin:1rem 0}figcaption,caption,footer{color:var(--quiet);font-size:.9rem;text-align:left}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint)}
td{overflow-wrap:anywhere;min-width:3em}thead th{white-space:nowrap}
td.n,th.n{text-align:right}tbody tr:nth-child(even){background:var(--stripe)}tbody th{font-weight:600}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.75rem}
.gallery figure{margin:0;overflow-wrap:anywhere}.gallery img{width:100%%;max-width:10rem;height:auto;display:block}
svg{width:100%%;max-width:var(--width);height:auto;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif;unicode-bidi:isolate}
svg .label{fill:var(--quiet)}svg .over{fill:var(--over)}.grid{stroke:var(--faint)}.axis{stroke:var(--quiet)}
.marked{stroke:var(--quiet);stroke-dasharray:4 4}.line,.trace{fill:none;stroke:var(--c);stroke-width:2}
.trace{stroke-width:1;stroke-opacity:.45}.dashed{stroke-dasharray:6 3}.mark{fill:var(--c)}
.hollow{fill:var(--paper);stroke:var(--c)}.cell{fill:var(--fill);stroke:var(--faint)}
.phone{display:none}@media screen and (max-width:44rem){.phone{display:block}.screen{display:none}
thead th{white-space:normal}tbody th{overflow-wrap:anywhere;min-width:6.5em}}
%(classes)s
"""

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; the first column names the row.

    Attributes:
        header: above each column.
        rows: their cells.
        caption: above the table.
    """

    header: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and the figures behind it.

    Attributes:
        drawing: what is drawn.
        description: what a reader who cannot see it is told.
        caption: below it.
        table: its figures.
    """

    drawing: Drawing
    description: str
    caption: str
    table: Table


@dataclass(frozen=True)
class Picture:
    """A small photograph.

    Attributes:
        jpeg: the bytes of a JPEG file; empty if it can no longer be had.
        name: of the file.
        caption: below it.
    """

    jpeg: bytes
    name: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures beside each other, as many in a row as fit."""

    pictures: Sequence[Picture]


Part = Table | Figure | Gallery | str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: paragraphs, tables, figures."""

    title: str
    parts: Sequence[Part]


def write_report(path: Path, title: str, sections: Sequence[Section], *, footer: str = "") -> None:
    """Write the report, whole or not at all; the same content gives the same bytes.

    Args:
        path: the HTML file to make or replace.
        title: of the page.
        sections: in their order; those without parts are left out.
        footer: below them.

    Raises:
        ConfigError: the file cannot be written.
    """
    page = _page(title, [section for section in sections if section.parts], footer)
    with staged_file(path) as staging:
        staging.write_bytes(page.encode())


def _page(title: str, sections: Sequence[Section], footer: str) -> str:
    body = "\n".join(
        f"<section>\n<h2>{escaped(section.title)}</h2>\n" + "\n".join(map(_part, section.parts)) + "\n</section>"
        for section in sections
    )
    style = _STYLE % {
        "light": _colours(_LIGHT),
        "dark": _colours(_DARK),
        "classes": "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(len(_LIGHT))),
    }
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escaped(title)}</h1>\n{body}\n</main>\n<footer>{escaped(footer)}</footer>\n"
        "</body>\n</html>\n"
    )


def _colours(values: Sequence[str]) -> str:
    return "".join(f"--c{index}:{value};" for index, value in enumerate(values))


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escaped(part, 2000)}</p>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Gallery):
        return f'<div class="gallery">{"".join(map(_picture, part.pictures))}</div>'
    drawn = part.drawing.to_svg(part.description)
    if part.drawing.narrow is not None:
        narrow = part.drawing.narrow.to_svg(part.description)
        drawn = f'<div class="screen">{drawn}</div>\n<div class="phone">{narrow}</div>'
    return (
        f'<figure>\n<div class="wide">{drawn}</div>\n'
        f"<figcaption>{escaped(part.caption, 1000)}</figcaption>\n"
        f"<details><summary>The figures behind it</summary>\n{_table(part.table)}\n</details>\n</figure>"
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.jpeg).decode()
    image = f'<img loading="lazy" alt="{escaped(picture.name)}" src="data:image/jpeg;base64,{data}">' if data else ""
    return (
        f"<figure>{image}<figcaption><bdi>{escaped(picture.caption)}</bdi><br>"
        f"<bdi>{escaped(picture.name)}</bdi></figcaption></figure>"
    )


def _table(table: Table) -> str:
    right = [
        bool(table.rows) and all(isinstance(row[column], int | float | None) for row in table.rows)
        for column in range(len(table.header))
    ]
    kinds = [' class="n"' if numeric else "" for numeric in right]
    head = "".join(
        f'<th scope="col"{kind}>{escaped(name)}</th>' for name, kind in zip(table.header, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(place, value, kinds[place]) for place, value in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escaped(table.caption)}</caption>" if table.caption else ""
    header = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return f'<div class="wide"><table>{caption}{header}\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(place: int, value: Cell, kind: str) -> str:
    words = "–" if value is None else number(value) if isinstance(value, float) else escaped(value)
    # A name may be written from right to left: it must not turn its neighbours.
    return f'<th scope="row"{kind}><bdi>{words}</bdi></th>' if place == 0 else f"<td{kind}><bdi>{words}</bdi></td>"
