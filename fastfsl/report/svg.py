"""A small SVG drawing: lines, marks and text as strings, their colours left to the page's style sheet."""

from collections.abc import Sequence

from fastfsl.report.text import escaped

# The page's style sheet has this many colours (classes c0, c1, ...); beyond them marks differ by their shape.
NUM_COLOURS = 10
_SHAPES = 5

Point = tuple[float, float]


# What a phone of 375 pixels leaves beside the page's margins.
PHONE_WIDTH = 343


class Drawing:
    """Elements on a canvas of `width` x `height` pixels.

    Attributes:
        narrow: the same for a phone, no wider than `PHONE_WIDTH`; None if this one is narrow enough.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.narrow: Drawing | None = None
        self._elements: list[str] = []

    def line(self, start: Point, end: Point, kind: str = "grid") -> None:
        """A straight line of a class of the style sheet."""
        (x1, y1), (x2, y2) = start, end
        self._elements.append(f'<path class="{kind}" d="M{_at(x1)} {_at(y1)}L{_at(x2)} {_at(y2)}"/>')

    def path(self, points: Sequence[Point], colour: int, kind: str = "line") -> None:
        """A line through points; those beyond the colours are dashed."""
        steps = "L".join(f"{_at(x)} {_at(y)}" for x, y in points)
        dashed = " dashed" if colour // NUM_COLOURS % 2 else ""
        self._elements.append(f'<path class="{kind} c{colour % NUM_COLOURS}{dashed}" d="M{steps}"/>')

    def mark(self, at: Point, colour: int, size: float = 3.5, *, hollow: bool = False, note: str = "") -> None:
        """A mark whose colour and shape tell the series; `note` is shown when it is pointed at."""
        x, y = at
        kind = f'class="{"hollow" if hollow else "mark"} c{colour % NUM_COLOURS}"'
        title = f"<title>{escaped(note)}</title>" if note else ""
        r = size
        shape = (colour + colour // NUM_COLOURS) % _SHAPES
        if shape == 0:
            self._elements.append(f'<circle {kind} cx="{_at(x)}" cy="{_at(y)}" r="{_at(r)}">{title}</circle>')
            return
        corners = {
            1: ((-r, -r), (r, -r), (r, r), (-r, r)),
            2: ((0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)),
            3: ((0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r)),
            4: ((0, 1.2 * r), (1.2 * r, -r), (-1.2 * r, -r)),
        }[shape]
        outline = "L".join(f"{_at(x + dx)} {_at(y + dy)}" for dx, dy in corners)
        self._elements.append(f'<path {kind} d="M{outline}Z">{title}</path>')

    def cell(self, at: Point, size: Point, share: float, kind: str = "cell", note: str = "") -> None:
        """A rectangle filled to `share` of the full colour, from 0 to 1."""
        title = f"<title>{escaped(note)}</title>" if note else ""
        self._elements.append(
            f'<rect class="{kind}" x="{_at(at[0])}" y="{_at(at[1])}" width="{_at(size[0])}" height="{_at(size[1])}" '
            f'fill-opacity="{share:.3f}">{title}</rect>'
        )

    def text(
        self, at: Point, words: object, *, anchor: str = "start", kind: str = "", turned: bool = False, limit: int = 40
    ) -> None:
        """One line of text; `anchor` is start, middle or end, `turned` by a quarter against the clock."""
        x, y = at
        turn = f' transform="rotate(-90 {_at(x)} {_at(y)})"' if turned else ""
        style = f' class="{kind}"' if kind else ""
        self._elements.append(
            f'<text{style} x="{_at(x)}" y="{_at(y)}" text-anchor="{anchor}"{turn}>{escaped(words, limit)}</text>'
        )

    def to_svg(self, description: str) -> str:
        """The drawing as an element of a page; `description` is what a screen reader says in its place."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escaped(description)}" '
            f'viewBox="0 0 {self.width} {self.height}" style="--width:{self.width}px">'
            + "".join(self._elements)
            + "</svg>"
        )


def _at(value: float) -> str:
    """A coordinate to a tenth of a pixel, the same on every machine."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"
