"""The tiles of the Gram loss, as data."""

from __future__ import annotations

import pytest

from fastfsl.kernels.gram_tiles import gram_tile
from fastfsl.kernels.tiles import SHARED_MEMORY


@pytest.mark.parametrize("n", [5, 64, 197, 256, 257, 384, 385, 512, 577, 640])
def test_operands_and_kept_weights_fit_the_shared_memory(n):
    """Triton 3.6 keeps all weights but those of one tile there; 3.9 takes less."""
    found = gram_tile(90, n, 768, "bf16")
    tile = found.tile
    assert found.whole
    operands = 2 * tile.stages * 2 * tile.depth * (tile.rows + tile.columns)
    assert operands + (found.parts - 1) * 2 * tile.rows * tile.columns <= SHARED_MEMORY[90]
