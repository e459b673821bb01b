import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.kernels.tiles import (
    ARCHITECTURES,
    CHUNK_ROWS,
    ROW_CLASSES,
    SHARED_MEMORY,
    column_tiles,
    flow_tile,
    row_bucket,
    row_class,
)

DIMS = range(16, 1281, 16)


@given(st.integers(1, CHUNK_ROWS))
def test_buckets_hold_the_rows_and_waste_less_than_half(rows):
    bucket = row_bucket(rows)
    assert rows <= bucket < 2 * rows + 1
    assert row_bucket(bucket) == bucket
    # A graph of the bucket and a launch of the rows use the same tile, and so the same compiled kernels.
    assert row_class(bucket) == row_class(rows)


def test_buckets_are_few():
    buckets = sorted({row_bucket(rows) for rows in range(1, CHUNK_ROWS + 1)})
    assert buckets == [1, 2, 4, 8, 16, 32, 64, 128, *range(256, 1025, 128), *range(2048, 8193, 1024)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_fit_the_width(arch, dtype):
    for dim in DIMS:
        for limit in ROW_CLASSES:
            tile = flow_tile(arch, dim, limit or CHUNK_ROWS, dtype)
            assert dim % tile.depth == 0
            assert tile.depth >= 16
            assert dim <= column_tiles(dim, tile) * tile.columns < dim + tile.columns
            for size in (tile.rows, tile.columns, tile.depth, tile.warps):
                assert size & (size - 1) == 0


def test_an_unknown_card_has_the_tile_of_the_one_before():
    assert flow_tile(121, 512, 8192, "bf16") == flow_tile(120, 512, 8192, "bf16")
    assert flow_tile(103, 512, 8192, "bf16") == flow_tile(100, 512, 8192, "bf16")
    assert flow_tile(75, 512, 8192, "bf16") == flow_tile(80, 512, 8192, "bf16")


def test_operands_in_flight_fit_the_shared_memory():
    # A lower bound, 16-bit operands of the stages before the last; the compiler's figure is held where it is compiled.
    for arch in ARCHITECTURES:
        for dim in DIMS:
            tile = flow_tile(arch, dim, CHUNK_ROWS, "bf16")
            assert (tile.stages - 1) * 2 * tile.depth * (tile.rows + tile.columns) <= SHARED_MEMORY[arch]
