"""Rendered glyphs: seeded, shaped like the scans, deformed but readable."""

import numpy as np
import pytest
import torch

from fastfsl.demo import fonts, glyphs
from fastfsl.demo.digits import enlarge


@pytest.fixture(scope="module")
def atlas():
    return fonts.build_atlas({"DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold")}, "0123456789iI")


def draw(atlas, seed, warp=None):
    generator = torch.Generator().manual_seed(seed)
    fields, half_widths = torch.from_numpy(atlas.fields), torch.from_numpy(atlas.half_widths)
    return glyphs.render_counts(fields, half_widths, generator=generator, warp=warp)


def test_held_out_fonts_are_not_trained_on():
    train = {name for files in fonts.TRAIN_FAMILIES.values() for name in files}
    held_out = {name for files in fonts.HELD_OUT_FAMILIES.values() for name in files}
    assert train.isdisjoint(held_out)
    assert len(held_out) >= 4


def test_atlas_has_every_character_of_every_font(atlas):
    assert atlas.fields.shape == (24, 2, fonts.CELL, fonts.CELL)
    assert atlas.concepts.tolist() == [*range(10), 18, 18] * 2
    assert (atlas.half_widths[12:] > atlas.half_widths[:12]).all()  # the bold font


def test_a_dotted_zero_is_left_out():
    concepts = fonts.build_atlas({"mono": ("DejaVuSansMono", "DejaVuSans")}, "01").concepts
    assert concepts.tolist() == [1, 0, 1]


def test_fields_are_distances(atlas):
    outline, pen = atlas.fields[:, 0], atlas.fields[:, 1]
    steps = np.abs(np.diff(atlas.fields, axis=-1))
    assert steps.max() <= 1.5  # a distance grows by at most a pixel per pixel, and half a pixel more across the outline
    ink = outline < 0
    assert ((pen == 0) <= ink).all()  # the skeleton lies in the ink
    assert (pen[ink] <= 2 * atlas.half_widths.max()).all()  # and everywhere near it


def test_thinning_keeps_the_shape_connected_and_thin():
    from scipy.ndimage import label

    ink = np.zeros((2, 40, 40), dtype=bool)
    ink[0, 5:35, 10:16] = True  # a bar
    ink[1, 5:35, 5:35] = True  # a ring
    ink[1, 12:28, 12:28] = False
    skeletons = fonts.thin(ink)
    eight = np.ones((3, 3))
    assert [label(skeleton, eight)[1] for skeleton in skeletons] == [1, 1]
    assert label(~skeletons[1])[1] == 2  # the hole is still closed
    assert skeletons[0].sum(axis=1).max() == 1
    assert 22 <= skeletons[0].sum() <= 30


def test_counts_are_shaped_and_bounded(atlas):
    counts = draw(atlas, 0)
    assert counts.shape == (24, 8, 8)
    assert counts.dtype == torch.float32
    assert torch.equal(counts, counts.round())
    assert 0 <= counts.min() <= counts.max() <= 16
    assert (counts.sum((1, 2)) > 16).all()  # no glyph vanished


def test_rendering_is_seeded(atlas):
    assert torch.equal(draw(atlas, 3), draw(atlas, 3))
    assert not torch.equal(draw(atlas, 3), draw(atlas, 4))


def test_the_ink_fills_the_box(atlas):
    still = glyphs.Warp(
        rotation=0, slant=0, perspective=0, elastic=(), pen_probability=0, weight=(0, 0), roughness=0, free_width=0
    )
    counts = draw(atlas, 0, still)
    assert (counts[:, [0, -1]].sum(2) > 0).all()
    wide = draw(atlas, 0, glyphs.Warp(free_width=1, box_width=(32, 32), roughness=0))
    assert (wide[..., [0, -1]].sum(1) > 0).all()
    # Undeformed, a one keeps its proportions and a zero its hole.
    assert counts[10, :, :2].sum() == 0
    assert counts[0, 3:5, 3:5].sum() == 0


def test_a_broader_pen_leaves_more_ink(atlas):
    thin, broad = (
        draw(atlas, 0, glyphs.Warp(pen_probability=1, pen_radius=(radius, radius))).sum() for radius in (0.03, 0.09)
    )
    assert broad > 1.5 * thin


def test_enlarging_matches_the_real_images():
    counts = np.random.default_rng(0).integers(0, 17, (20, 8, 8)).astype(np.uint8)
    ours = (glyphs.enlarge_counts(torch.from_numpy(counts).float()) * 255).round()[:, 0].numpy()
    theirs = np.stack([enlarge(image) for image in counts])
    assert np.abs(ours - theirs).max() <= 1
