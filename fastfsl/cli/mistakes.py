"""Pictures of what a classifier got wrong, with the files' names: what a table of confusions cannot show."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from fastfsl.errors import DataError

if TYPE_CHECKING:
    from fastfsl.data.baselines import Predicted
    from fastfsl.report import Part, Picture

# With these a page stays below a megabyte.
MAX_PICTURES = 48
_PIXELS, _QUALITY = 160, 80


def mistake_parts(predicted: "Predicted", data: Path) -> "list[Part]":
    """The images that were taken for another class, the surest first; empty for features.

    Args:
        predicted: What was scored, with the images' paths.
        data: Where they lie: names are shown relative to it.
    """
    import numpy as np

    from fastfsl.report import Gallery

    if not predicted.paths:
        return []
    chosen = predicted.probabilities.argmax(axis=1)
    sure = predicted.probabilities.max(axis=1)
    wrong = np.flatnonzero(chosen != predicted.labels)
    if not wrong.size:
        return ["Every image was taken for its own class."]
    shown = wrong[np.argsort(-sure[wrong], kind="stable")][:MAX_PICTURES]
    names = predicted.class_names
    pictures = [
        _picture(
            predicted.paths[row],
            _shown_name(predicted.paths[row], data),
            f"{names[predicted.labels[row]]}, taken for {names[chosen[row]]} ({100 * sure[row]:.0f} %)",
        )
        for row in map(int, shown)
    ]
    few = f"the {len(shown)} surest of " if len(shown) < len(wrong) else ""
    return [f"Shown: {few}{len(wrong)} mistakes among {len(chosen)} images, the surest first.", Gallery(pictures)]


def _picture(path: Path, name: str, caption: str) -> "Picture":
    """A thumbnail of a file; without one if the file has gone or changed since it was scored."""
    from fastfsl.images import open_image
    from fastfsl.report import Picture

    try:
        image = open_image(path).convert("RGB")
    except DataError:
        return Picture(b"", name, caption)
    image.thumbnail((_PIXELS, _PIXELS))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=_QUALITY)
    return Picture(written.getvalue(), name, caption)


def _shown_name(path: Path, data: Path) -> str:
    folder = data if data.is_dir() else data.parent
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return str(path)
