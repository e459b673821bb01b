"""Tiles of the Gram kernels: that they cover what is asked for, and are compiled without a card into what was meant."""

from __future__ import annotations

import itertools

import pytest

from fastfsl.kernels import gram_kernels
from fastfsl.kernels.aot_jobs import Job, check_budgets, compile_jobs
from fastfsl.kernels.gram_rows import UNIT_WIDTH
from fastfsl.kernels.gram_tiles import FAMILY, gram_tile, gram_variants, loss_variant, num_products, num_slices
from fastfsl.kernels.tiles import ARCHITECTURES, DTypeName

DIMS = (16, 80, 128, 512, 640, 768, 1024, 1152, 1280)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, 75, 103])
def test_tiles_cover_rows_and_columns(arch, dtype):
    for n, dim in itertools.product((1, 5, 50, 64, 65, 197, 224, 225, 256, 257, 577, 640, 641, 2304), DIMS):
        tile = gram_tile(arch, n, dim, dtype)
        assert dim % tile.tile.depth == 0
        assert tile.width % UNIT_WIDTH.value == 0
        if tile.whole:
            assert (tile.parts - 1) * tile.tile.columns < n <= tile.parts * tile.tile.columns
        else:
            columns = tile.parts * tile.width
            assert (num_slices(tile, dim) - 1) * columns < dim <= num_slices(tile, dim) * columns


def test_what_a_loss_costs_is_known():
    assert num_products(gram_tile(90, 197, 768, "bf16"), 768, "bf16", normalize=True) == 3
    sliced = gram_tile(90, 2304, 768, "bf16")  # 2 x 384 columns
    assert (sliced.parts * sliced.width, num_products(sliced, 768, "bf16", normalize=True)) == (384, 5)
    assert num_products(gram_tile(90, 9, 128, "fp32"), 128, "fp32", normalize=True) == 4


def test_a_name_holds_all_compile_time_constants():
    dtypes: tuple[DTypeName, ...] = ("fp16", "fp32")
    for arch, dtype, dim in itertools.product((80, 90, 100), dtypes, (80, 768)):
        variants = list(gram_variants(arch, dtype, dim))
        assert len(set(variants)) == len(variants)
        kernels = {variant.name.split(maxsplit=1)[0] for variant in variants}
        assert kernels == set(gram_kernels.FLOW) - ({"whole"} if dtype == "fp32" else set())
        for variant in variants:
            constants = gram_kernels.constants(variant.name, dim, variant.tile)
            named = {name for name in gram_kernels.FLOW[variant.name].arg_names if name not in gram_kernels.KINDS}
            assert set(constants) == named
            assert constants["D"] == dim


def test_kernels_are_compiled_to_wgmma_without_spills():
    """Two of those that .ci/kernels_check.py compiles."""
    jobs = []
    for arch, n in ((90, 197), (80, 2304)):
        variant = loss_variant(arch, n, 128, "bf16", squared=False, normalize=True, tf32=False)
        jobs.append(Job(variant.name, 128, "bf16", arch, variant.tile, family=FAMILY))
    built = compile_jobs(jobs)
    check_budgets(built)
    hopper, ampere = (built[job] for job in jobs)
    # Two column tiles of two products, 4 deep, and of the gradient's product, 8 deep; more where the loop is peeled.
    assert hopper.ptx.count("wgmma.mma_async") >= 2 * (2 * 4 + 8)
    assert "cp.async" in hopper.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ampere.ptx
    assert [name for name, _ in hopper.arguments] == [
        "features", "reference", "stats", "values", "gradient", "units", "weight", "n",
    ]  # fmt: skip
