"""The glyphs that the tiny CLIP is pretrained on: digits and letters of the fonts that matplotlib ships.

Every glyph is drawn once, large, and kept as two distance fields. A distance field survives warping at a low
resolution, and a stroke of any thickness is then one comparison:

    outline field   signed distance to the outline, negative inside the ink   ink = field < offset   (the printed shape)
    pen field       distance to the thinned skeleton                          ink = field < radius   (a pen's stroke)

The pen field is what brings print nearer to handwriting: serifs, weight and stroke contrast disappear, the path stays.
Thinning: T. Y. Zhang and C. Y. Suen, "A fast parallel algorithm for thinning digital patterns", CACM 27(3), 1984.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastfsl.demo.digits import CLASS_NAMES as DIGIT_NAMES
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

# matplotlib's remaining files hold symbols only, or old-style figures (cmmi10).
TRAIN_FAMILIES: dict[str, tuple[str, ...]] = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "Computer Modern": ("cmr10", "cmb10", "cmti10", "cmtt10"),
}
"""Fonts that are trained on."""

HELD_OUT_FAMILIES: dict[str, tuple[str, ...]] = {
    "STIX General": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern Sans": ("cmss10",),
}
"""Fonts that the recipe is judged on and that no weight ever sees."""

_DOTTED_ZERO = "DejaVuSansMono"
"""These files put a dot in the zero to tell it from O, as no pen does: their zero is left out."""

CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase
CONCEPTS = (*DIGIT_NAMES, *string.ascii_lowercase)
"""What a caption names: ten digits and 26 letters. Both cases of a letter are one concept, for a glyph that is
normalised to its box tells c from C no more than a caption in lower case does."""

CELL = 64
"""Side of a distance field, in pixels."""
GLYPH = 40
"""Longer side of a glyph within its cell, in pixels: the margin leaves room for the field around it."""
_LARGE = 160
"""Font size a glyph is first drawn at, in pixels."""


@dataclass(frozen=True)
class GlyphAtlas:
    """Distance fields of all glyphs of some fonts.

    Attributes:
        fields: Outline and pen field in cell pixels, float32, shape (num_glyphs, 2, CELL, CELL).
        half_widths: Mean half width of each glyph's own stroke in cell pixels, float32, shape (num_glyphs,).
        concepts: Index into `CONCEPTS` of every glyph, int64, shape (num_glyphs,).
    """

    fields: NDArray[np.float32]
    half_widths: NDArray[np.float32]
    concepts: NDArray[np.int64]


def concept_of(character: str) -> int:
    """Index into `CONCEPTS` of a digit or letter."""
    if character in string.digits:
        return int(character)
    return 10 + string.ascii_lowercase.index(character.lower())


def build_atlas(families: dict[str, tuple[str, ...]], characters: Iterable[str] = CHARACTERS) -> GlyphAtlas:
    """Draw the characters in every font of the families and measure their distance fields.

    Args:
        families: Font files (without suffix) by family, from matplotlib's `fonts/ttf`.
        characters: Digits and letters to draw.

    Returns:
        The atlas, fonts in the given order, all characters of a font together.

    Raises:
        ConfigError: matplotlib (whose fonts these are), a font file, or scipy is missing.
    """
    import numpy as np

    try:
        from matplotlib import get_data_path
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ConfigError(f"pretraining draws matplotlib's fonts: pip install matplotlib scipy ({error})") from error

    folder = Path(get_data_path()) / "fonts" / "ttf"
    characters = tuple(characters)
    drawn = [
        (name, character)
        for files in families.values()
        for name in files
        for character in characters
        if not (name.startswith(_DOTTED_ZERO) and character == "0")
    ]
    ink = np.stack([_draw(folder / f"{name}.ttf", character) for name, character in drawn])
    skeletons = thin(ink)
    fields = np.empty((len(ink), 2, CELL, CELL), dtype=np.float32)
    half_widths = np.empty(len(ink), dtype=np.float32)
    for i, (mask, skeleton) in enumerate(zip(ink, skeletons, strict=True)):
        inside = distance_transform_edt(mask)
        # The outline runs between pixel centres, half a pixel from either side.
        fields[i, 0] = np.where(mask, 0.5 - inside, distance_transform_edt(~mask) - 0.5)
        fields[i, 1] = distance_transform_edt(~skeleton)
        half_widths[i] = inside[skeleton].mean()
    concepts = np.array([concept_of(character) for _, character in drawn], dtype=np.int64)
    return GlyphAtlas(fields, half_widths, concepts)


def _draw(path: Path, character: str) -> NDArray[np.bool_]:
    """One glyph as ink in a (CELL, CELL) mask, its longer side GLYPH pixels, centred."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    try:
        font = ImageFont.truetype(str(path), _LARGE)
    except OSError as error:
        raise ConfigError(f"cannot read the font {path}: {error}; reinstall matplotlib") from error
    canvas = Image.new("L", (3 * _LARGE, 3 * _LARGE))
    ImageDraw.Draw(canvas).text((_LARGE, _LARGE), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        raise ConfigError(f"the font {path} draws nothing for {character!r}; reinstall matplotlib")
    glyph = canvas.crop(box)
    scale = GLYPH / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    cell = Image.new("L", (CELL, CELL))
    cell.paste(glyph.resize(size, Image.Resampling.BOX), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return np.asarray(cell) >= 128


def thin(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Zhang-Suen thinning of many masks at once.

    Args:
        ink: Masks with an empty border, shape (n, height, width).

    Returns:
        Skeletons, about one pixel wide and connected as the masks are, shape (n, height, width).
    """
    import numpy as np

    skeleton = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    height, width = ink.shape[1:]
    clockwise = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # from the north: p2 .. p9
    while True:
        removed = False
        for first in (True, False):
            around = [skeleton[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in clockwise]
            north, _, east, _, south, _, west, _ = around
            neighbours = sum(a.astype(np.int8) for a in around)
            rises = sum((~a & b).astype(np.int8) for a, b in zip(around, [*around[1:], around[0]], strict=True))
            kept = (east & south & (north | west)) if first else (north & west & (east | south))
            inner = skeleton[:, 1:-1, 1:-1]
            drop = inner & (neighbours >= 2) & (neighbours <= 6) & (rises == 1) & ~kept
            removed |= bool(drop.any())
            inner[drop] = False
        if not removed:
            return skeleton[:, 1:-1, 1:-1].copy()
