"""What the kernels must reach on a card, as data, and which of it a run reached."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Error of a kernel against float64, over that of plain torch in the same dtype.
MOST_TIMES_PLAIN_ERROR = 2.0
# Share of the signs of S - S' off the diagonal that are those of the exact value for the same 16-bit inputs.
LEAST_SIGN_AGREEMENT = 0.999
# The same with normalisation inside: no bound is set, what is reached is reported (99.5 % on paper), less is wrong.
LEAST_NORMALISED_AGREEMENT = 0.98
LONG_GRAM, WIDE_GRAM, LARGE_GRAM = (64, 197, 768), (32, 197, 512), (8, 2304, 1024)


@dataclass(frozen=True)
class Bound:
    """A figure of ours that is to be at least, or at most, so much.

    Args:
        section: whose rows are looked at.
        where: values that pick the row of `name`.
        name: whose row.
        value: column of that row that is judged; with `against` the other's value over ours.
        limit: what it is held to.
        against: the competitor; None judges the value itself.
        sense: which side of the limit is right.
    """

    section: str
    where: Mapping[str, Any]
    name: str
    value: str
    limit: float
    against: str | None = None
    sense: Literal["at least", "at most"] = "at least"

    def said(self) -> str:
        """The bound in words."""
        at = ", ".join(f"{key} {value}" for key, value in self.where.items())
        against = "" if self.against is None else f" against {self.against}"
        return f"{self.section}, {at}: {self.value} of {self.name}{against}"


def _flow(batch: int, limit: float, against: str) -> Bound:
    return Bound("flow", {"batch": batch}, "euler_flow", "ms", limit, against)


def _gram(shape: tuple[int, ...], value: str, limit: float, against: str) -> Bound:
    return Bound("gram", {"shape": list(shape)}, "kernel", value, limit, against)


# Speed: medians of one process, width 512, 12 blocks, 10 steps.
BOUNDS: tuple[Bound, ...] = (
    _flow(1, 8.0, "module, eager"),
    _flow(4096, 3.0, "module, eager"),
    *(_flow(batch, 1.5, "tables, compiled") for batch in (1, 8, 64, 256)),
    *(_flow(batch, 1.2, "tables, compiled") for batch in (4096, 65536)),
    Bound("flow", {"batch": 65536}, "euler_flow", "share_of_peak", 0.45),
    *(
        _gram(shape, value, limit, against)
        for shape in (LONG_GRAM, WIDE_GRAM)
        for value in ("ms", "device_ms")
        for limit, against in ((3.0, "plain, eager"), (1.5, "plain, compiled"))
    ),
    Bound("gram", {"shape": list(LARGE_GRAM)}, "kernel", "memory_share", 0.05, sense="at most"),
)


def judged(documents: Mapping[str, Mapping[str, Any]], bounds: Sequence[Bound] = BOUNDS) -> Iterator[dict[str, Any]]:
    """Every bound with what was reached: `met` is True, False, or None where nothing was measured.

    Args:
        documents: JSON documents of the sections, by name.
        bounds: which.
    """
    for bound in bounds:
        document = documents.get(bound.section)
        measured = document is not None and not document["dry_run"]
        rows = document["rows"] if document is not None and measured else []
        ours = _row(rows, bound.where, bound.name)
        theirs = ours if bound.against is None else _row(rows, bound.where, bound.against)
        got = None
        if ours is not None and theirs is not None and None not in {ours.get(bound.value), theirs.get(bound.value)}:
            got = ours[bound.value] if bound.against is None else theirs[bound.value] / ours[bound.value]
        met = None if got is None else got >= bound.limit if bound.sense == "at least" else got <= bound.limit
        yield {
            "bound": bound.said(),
            "expected": f"{bound.sense} {bound.limit:g}",
            "got": got,
            "met": met,
            "ms": None if ours is None else ours.get("ms"),
            "roofline_ms": None if ours is None else ours.get("roofline_ms"),
        }


def _row(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["name"] == name and where.items() <= row.items()), None)
