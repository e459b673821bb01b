"""Glyphs of fonts, warped towards handwriting and degraded to the resolution of the demo's scans.

scikit-learn's digits are documented as 32x32 bitmaps, normalised to the box of the ink and cut into 4x4 blocks whose
ink pixels are counted: 8x8 values 0..16. `render_counts` goes the same way from a glyph's distance field, in torch and
for a whole batch at once:

    field  --affine, perspective, elastic-->  warped field  --box-->  32x32 bitmap  --blocks-->  8x8 counts

and `enlarge_counts` takes the counts to the 32x32 image as `digits.enlarge` does with the real ones. The strengths in
`Warp` were set beforehand from what varies between hands (slant, proportion, stroke, size of the loops), not fitted to
any scan. Elastic fields: P. Simard, D. Steinkraus, J. Platt, "Best Practices for Convolutional Neural Networks Applied
to Visual Document Analysis", ICDAR 2003.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastfsl.demo.fonts import CELL, GLYPH

if TYPE_CHECKING:
    from torch import Generator, Tensor

BITMAP = 32
"""Side of the bitmap that the blocks are counted in, in pixels."""
BLOCK = 4
"""Side of a block, in bitmap pixels."""
_CANVAS = 48
"""Side of the warped field, in pixels."""
_ROOM = 1.35
"""Width of the canvas over that of the cell: room for slanted and rotated glyphs."""


@dataclass(frozen=True)
class Warp:
    """Strengths of the random deformations. Lengths are fractions of the glyph's size, `sd` of a normal distribution.

    Attributes:
        rotation: Rotation sd, radians.
        slant: Horizontal shear sd.
        perspective: Perspective sd (relative growth of one side of the glyph).
        elastic: Displacement sd of the smooth random field for each grid size (knots per side, sd).
        pen_probability: Share of glyphs drawn with a pen along their skeleton instead of in print.
        pen_radius: Range of the pen's radius, as a fraction of the glyph's size.
        weight: Range of the printed stroke's change of half width, relative to that half width.
        roughness: Sd of the ink's edge, bitmap pixels.
        free_width: Share of glyphs normalised to a box of random width; the others keep their proportions.
        box_width: Range of that width, bitmap pixels; the height is the whole bitmap.
    """

    rotation: float = 0.15
    slant: float = 0.25
    perspective: float = 0.15
    elastic: tuple[tuple[int, float], ...] = ((3, 0.09), (5, 0.05))
    pen_probability: float = 0.7
    pen_radius: tuple[float, float] = (0.035, 0.09)
    weight: tuple[float, float] = (-0.3, 0.6)
    roughness: float = 0.4
    free_width: float = 0.6
    box_width: tuple[float, float] = (14.0, 28.0)


def render_counts(fields: Tensor, half_widths: Tensor, *, generator: Generator, warp: Warp | None = None) -> Tensor:
    """Draw each glyph once, deformed at random.

    Args:
        fields: Outline and pen fields from a `GlyphAtlas`, cell pixels, shape (n, 2, CELL, CELL).
        half_widths: Half widths of the printed strokes, cell pixels, shape (n,).
        generator: Source of all randomness.
        warp: Strengths; the defaults if None.

    Returns:
        Ink pixels per block, whole numbers 0..16 as float32, shape (n, 8, 8).
    """
    warp = warp or Warp()
    n = len(fields)
    pen = torch.rand(n, generator=generator) < warp.pen_probability
    radius = _uniform(n, warp.pen_radius, generator) * GLYPH
    offset = _uniform(n, warp.weight, generator) * half_widths
    field = torch.where(pen[:, None, None], fields[:, 1], fields[:, 0])
    field = field - torch.where(pen, radius, offset)[:, None, None]  # the ink is where the field is negative
    grid = _random_grid(n, warp, generator)
    field = F.grid_sample(field[:, None], grid, padding_mode="border", align_corners=False)
    field = F.grid_sample(
        field, _box_grid(field[:, 0] < 0, warp, generator), padding_mode="border", align_corners=False
    )
    edge = torch.randn(n, 1, BITMAP // 2, BITMAP // 2, generator=generator) * warp.roughness
    field = field + F.interpolate(edge, size=(BITMAP, BITMAP), mode="bilinear", align_corners=False)
    ink = (field < 0).float()
    return (F.avg_pool2d(ink, BLOCK) * BLOCK**2).round()[:, 0]


def enlarge_counts(counts: Tensor) -> Tensor:
    """Counts to grey images, as `digits.enlarge` does with Pillow (equal to it within one grey level).

    Args:
        counts: Ink pixels per block, 0..16, shape (n, 8, 8).

    Returns:
        Grey levels 0..1 in steps of 1/255, shape (n, 1, 32, 32).
    """
    image = (counts[:, None] * (255 / BLOCK**2)).round()
    side = counts.shape[-1]
    for size in ((side, BITMAP), (BITMAP, BITMAP)):  # Pillow goes along the rows first and rounds between the passes
        # antialias=True selects Pillow's bicubic kernel (a = -0.5); torch's own has a = -0.75.
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
        image = image.round().clamp(0, 255)
    return image / 255


def _uniform(n: int, bounds: tuple[float, float], generator: Generator) -> Tensor:
    """n uniform numbers between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(n, generator=generator)


def _random_grid(n: int, warp: Warp, generator: Generator) -> Tensor:
    """Where each canvas pixel looks into the cell: affine, perspective and elastic, shape (n, _CANVAS, _CANVAS, 2)."""
    line = (torch.arange(_CANVAS) + 0.5) * (2 * _ROOM / _CANVAS) - _ROOM
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle, slant, tilt_x, tilt_y = torch.randn(4, n, 1, 1, generator=generator)
    angle, slant = angle * warp.rotation, slant * warp.slant
    glyph = GLYPH / CELL  # half the glyph's size in grid coordinates, which run from -1 to 1
    depth = (1 + warp.perspective * (tilt_x * x + tilt_y * y) / (2 * glyph)).clamp(min=0.5)
    x, y = x / depth, y / depth
    x, y = x * torch.cos(angle) - y * torch.sin(angle), x * torch.sin(angle) + y * torch.cos(angle)
    x = x + slant * y
    grid = torch.stack((x, y), dim=-1)
    for knots, sd in warp.elastic:
        coarse = torch.randn(n, 2, knots, knots, generator=generator) * (sd * 2 * glyph)
        shift = F.interpolate(coarse, size=(_CANVAS, _CANVAS), mode="bicubic", align_corners=True)
        grid = grid + shift.permute(0, 2, 3, 1)
    return grid


def _box_grid(ink: Tensor, warp: Warp, generator: Generator) -> Tensor:
    """Where each bitmap pixel looks on the canvas so that the ink fills its box, shape (n, BITMAP, BITMAP, 2)."""
    n = len(ink)
    left, width = _extent(ink.any(dim=1))
    top, height = _extent(ink.any(dim=2))
    # Keeping the proportions: the longer side fills the bitmap.
    longer = torch.maximum(width, height)
    kept = torch.stack((width / longer, height / longer)) * BITMAP
    free = torch.stack((_uniform(n, warp.box_width, generator), torch.full((n,), float(BITMAP))))
    box_width, box_height = torch.where(torch.rand(n, generator=generator) < warp.free_width, free, kept)
    line = torch.arange(BITMAP) + 0.5 - BITMAP / 2  # bitmap pixels from the middle
    x = (left + width / 2)[:, None] + line * (width / box_width)[:, None]
    y = (top + height / 2)[:, None] + line * (height / box_height)[:, None]
    x, y = x * (2 / _CANVAS) - 1, y * (2 / _CANVAS) - 1
    return torch.stack((x[:, None, :].expand(n, BITMAP, BITMAP), y[:, :, None].expand(n, BITMAP, BITMAP)), dim=-1)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First occupied position and the extent from it, of shape (n,) each; the whole row where nothing is occupied."""
    length = occupied.shape[1]
    occupied = occupied | ~occupied.any(dim=1, keepdim=True)
    first = occupied.int().argmax(dim=1)
    last = length - 1 - occupied.flip(1).int().argmax(dim=1)
    return first.float(), (last - first + 1).float()
