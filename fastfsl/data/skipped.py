"""Files that were passed over: how many for which reason, and one of each to look at."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfsl.errors import DataError
from fastfsl.images import HEIF_ENDINGS

# Reasons that are no mistake: nothing that a user took for one of the images is lost.
HIDDEN = "hidden or of the system"
SIDECAR = "beside an image"
NOT_DRAWN = "not drawn"
OTHER_SPLIT = "in another split"
OTHER_CLASSES = "of classes left out"
SUPPORT = "trained on"
BESIDE = "beside the class folders"
_EXPECTED = (HIDDEN, SIDECAR, BESIDE, NOT_DRAWN, OTHER_SPLIT, OTHER_CLASSES, SUPPORT)

NOT_AN_IMAGE = "no image"
NO_READER = "image of a format that is not read"
BROKEN_LINK = "link that leads nowhere"
UNREADABLE = "unreadable"
NO_CLASS = "image outside the class folders"
NO_LABEL = "without a label"
NOT_LISTED = "not in the table"
LISTED_TWICE = "listed twice"


@dataclass
class Skipped:
    """A count of files by reason.

    Attributes:
        counts: by reason; the ending of the file's name stands behind it in brackets where it says something.
        examples: one file by reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: Path | str, number: int = 1, *, detail: str | None = None) -> None:
        """Count files; those of none are left out.

        Args:
            reason: why.
            path: one of them.
            number: how many.
            detail: the ending of their names, or what else tells them apart.
        """
        if number < 1:
            return
        key = reason if detail is None else f"{reason} ({detail})"
        self.counts[key] = self.counts.get(key, 0) + number
        self.examples.setdefault(key, str(path))

    def update(self, other: "Skipped") -> None:
        """Add another count."""
        for reason, number in other.counts.items():
            self.add(reason, other.examples[reason], number)

    def copy(self) -> "Skipped":
        """One that can be added to."""
        return Skipped(dict(self.counts), dict(self.examples))

    def __len__(self) -> int:
        """Files counted."""
        return sum(self.counts.values())

    @property
    def unexpected(self) -> dict[str, int]:
        """Counts by those reasons that may be a mistake; the others are sidecar and system files, and other splits."""
        return {reason: number for reason, number in self.counts.items() if not reason.startswith(_EXPECTED)}

    def words(self, counts: Mapping[str, int] | None = None) -> str:
        """Numbers and reasons, the most frequent first, with advice where there is some."""
        counts = self.counts if counts is None else counts
        ordered = sorted(counts.items(), key=lambda pair: -pair[1])
        shown = [f"{number} {reason}, such as {self.examples[reason]}" for reason, number in ordered[:8]]
        if len(ordered) > len(shown):
            shown.append(f"{sum(number for _, number in ordered[8:])} for other reasons")
        if any(reason.endswith(tuple(f"({ending})" for ending in HEIF_ENDINGS)) for reason in counts):
            shown.append("pip install 'fastfsl[heic]' to read HEIC")
        return "; ".join(shown)

    def warning(self, seen: int) -> str | None:
        """What to say of files that may have been meant; None if there are none."""
        unexpected = self.unexpected
        if not unexpected:
            return None
        return f"skipped {sum(unexpected.values())} of {seen} files: {self.words(unexpected)}"

    def check(self, *, strict: bool) -> None:
        """Refuse files that may have been meant, if that was asked for.

        Raises:
            DataError: there are some, and `strict` is set.
        """
        unexpected = self.unexpected
        if strict and unexpected:
            raise DataError(
                f"--strict: {sum(unexpected.values())} files would be skipped: {self.words(unexpected)}; move or mend "
                "them, or leave --strict out"
            )


def file_account(used: int, skipped: Skipped) -> dict[str, Any]:
    """What became of every file that was seen, as JSON values: seen = used + skipped, and why."""
    reasons = dict(sorted(skipped.counts.items(), key=lambda pair: (-pair[1], pair[0])))
    examples = {reason: skipped.examples[reason] for reason in reasons}
    return {
        "seen": used + len(skipped),
        "used": used,
        "skipped": len(skipped),
        "reasons": reasons,
        "examples": examples,
    }


def ending(name: str) -> str:
    """The ending of a file's name in lower case, or words for none."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix and suffix != "." else "no ending"


def some(names: Iterable[str], at_most: int = 5) -> str:
    """Names in quotes, the first few."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
