"""Which Gram kernels are launched, and in what tiles, as data.

Standard library only: the launchers and the ahead-of-time compiler read the same. Nothing here was measured on a card
yet: the sizes rest on registers (255 a thread and no spills, by the compiler's report) and on counts of products and
bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fastfsl.kernels.tiles import DTypeName, Tile

FAMILY = "fastfsl.kernels.gram_kernels"
Family = Literal["ampere", "hopper", "blackwell"]


@dataclass(frozen=True)
class GramTile:
    """How loss and gradient are computed.

    Args:
        whole: a program keeps the weights W of its rows for all columns of D; else the gradient of some columns.
        tile: rows and columns of a tile of D; its depth divides d.
        parts: column tiles of D if whole, else column tiles of the gradient.
        width: columns of a tile of the gradient.
    """

    whole: bool
    tile: Tile
    parts: int
    width: int


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel for a width and a dtype.

    Args:
        name: the kernel, and its compile-time constants but for those that follow from width and tile.
        tile: sizes, warps and stages.
    """

    name: str
    tile: Tile


# `whole`: largest N, width and tile. N = 197 = 3 * 64 + 5 and 257 = 4 * 64 + 1 leave a tile nearly empty whatever its
# size is; loads of rows past N are masked, so it costs products, not bytes.
# hopper: wgmma takes 64 rows, its two warp groups half of the columns each. (64, 197, 768) makes 256 programs of 64
# rows, two for each of 132 SMs less 3 %, and (32, 197, 512) one; 128 rows would leave half of the SMs idle there.
# Column tiles of 128 load the rows half as often as 64, and 5 of them are as much of W as there are registers for.
# Triton 3.6 keeps all but one tile of W in shared memory, 16 KiB each: past 256 rows that leaves room for three stages.
# ampere (and every card with mma.sync and 99 KiB): narrower tiles, because a warp has all columns of its rows.
# blackwell: fewer than 64 rows keep to mma.sync. Of tcgen05, whose accumulators would go through registers in every
# block anyway, Triton 3.6 makes nothing here, and 3.9 not always.
_WHOLE: dict[Family, tuple[tuple[int, int, Tile], ...]] = {
    "hopper": (
        (64, 128, Tile(64, 64, 64, 4, 4)),
        (256, 128, Tile(64, 128, 64, 8, 4)),
        (512, 64, Tile(64, 128, 64, 8, 3)),
        (640, 32, Tile(64, 128, 64, 8, 3)),
    ),
    "ampere": ((224, 64, Tile(64, 32, 32, 4, 3)),),
    "blackwell": ((224, 64, Tile(32, 32, 32, 2, 3)),),
}
# Parts times width is what fits in registers beside a tile of D.
_SLICED: dict[Family, GramTile] = {
    "hopper": GramTile(False, Tile(64, 64, 64, 8, 3), 4, 128),
    "ampere": GramTile(False, Tile(64, 32, 32, 4, 3), 1, 128),
    "blackwell": GramTile(False, Tile(32, 32, 32, 2, 3), 1, 128),
}
# A float32 product is three of TF32, whose operands take registers: small tiles on every card.
_SLICED_FLOAT32 = GramTile(False, Tile(32, 32, 16, 4, 2), 2, 64)
_VALUE: dict[Family, Tile] = {
    "hopper": Tile(64, 128, 64, 8, 3),
    "ampere": Tile(64, 128, 32, 8, 3),
    "blackwell": Tile(32, 64, 32, 4, 3),
}
_VALUE_FLOAT32 = Tile(32, 32, 16, 4, 3)

# Passes over memory.
_ROWS = Tile(8, 1, 128, 4, 3)
_FINISH = Tile(32, 128, 1, 4, 1)


def family(arch: int) -> Family:
    """Which tensor cores an architecture has: compute capability times ten."""
    return "hopper" if arch == 90 else "blackwell" if arch in {100, 103} else "ampere"


@cache
def gram_tile(arch: int, n: int, dim: int, dtype: DTypeName) -> GramTile:
    """The kernel and the tile that compute loss and gradient of (N, d) features, d a multiple of 16."""
    if dtype != "fp32":
        for largest, width, tile in _WHOLE[family(arch)]:
            if n <= largest:
                return GramTile(True, _divided(tile, dim), -(-n // tile.columns), width)
    sliced = _SLICED_FLOAT32 if dtype == "fp32" else _SLICED[family(arch)]
    # As few parts as the number of slices allows: 768 is 2 x 384, not 512 and 256.
    parts = -(-dim // sliced.width)
    return GramTile(False, _divided(sliced.tile, dim), -(-parts // -(-parts // sliced.parts)), sliced.width)


def num_slices(tile: GramTile, dim: int) -> int:
    """How many programs share the columns of a row's gradient, each computing D for itself."""
    return 1 if tile.whole else -(-dim // (tile.parts * tile.width))


def num_products(tile: GramTile, dim: int, dtype: DTypeName, *, normalize: bool) -> int:
    """Products of N^2 d multiplications that a loss with its gradient takes."""
    return (2 + (dtype == "fp32" and normalize)) * num_slices(tile, dim) + 1


@cache
def rows_variant(dim: int, *, normalize: bool) -> Variant:
    """The pass that takes statistics of rows."""
    return Variant(f"rows NORMALIZE={normalize:d}", _divided(_ROWS, dim))


@cache
def loss_variant(
    arch: int, n: int, dim: int, dtype: DTypeName, *, squared: bool, normalize: bool, tf32: bool
) -> Variant:
    """The kernel that computes loss and gradient."""
    tile = gram_tile(arch, n, dim, dtype)
    name = f"whole CHUNKS={tile.parts}" if tile.whole else f"sliced SLICE={tile.parts}"
    options = f"SQUARED={squared:d} NORMALIZE={normalize:d} PRECISION={_precision(dtype, tf32=tf32)}"
    return Variant(f"{name} BLOCK_D={tile.width} {options}", tile.tile)


@cache
def value_variant(
    arch: int, dim: int, dtype: DTypeName, *, squared: bool, normalize: bool, tf32: bool, write: bool
) -> Variant:
    """The kernel that computes the loss alone, or writes D."""
    tile = _VALUE_FLOAT32 if dtype == "fp32" else _VALUE[family(arch)]
    options = f"SQUARED={squared:d} NORMALIZE={normalize:d} PRECISION={_precision(dtype, tf32=tf32)} WRITE={write:d}"
    return Variant(f"value {options}", _divided(tile, dim))


@cache
def finish_variant(*, normalize: bool) -> Variant:
    """The pass that makes the gradient of what the kernels leave."""
    return Variant(f"finish BLOCK_D={_FINISH.columns} NORMALIZE={normalize:d}", _FINISH)


def gram_variants(arch: int, dtype: DTypeName, dim: int) -> Iterator[Variant]:
    """All variants that are launched for a width and dtype, with N from 1 on, without allowing TF32."""
    lengths = [n for n in range(1, 1281, 32) if gram_tile(arch, n, dim, dtype).whole] + [1 << 14]
    for normalize in (False, True):
        yield rows_variant(dim, normalize=normalize)
        yield finish_variant(normalize=normalize)
        for squared in (False, True):
            options = {"squared": squared, "normalize": normalize, "tf32": False}
            yield from {loss_variant(arch, n, dim, dtype, **options): 0 for n in lengths}
            yield value_variant(arch, dim, dtype, **options, write=False)
        yield value_variant(arch, dim, dtype, squared=False, normalize=normalize, tf32=False, write=True)


def _precision(dtype: DTypeName, *, tf32: bool) -> str:
    return "ieee" if dtype != "fp32" else "tf32" if tf32 else "tf32x3"


def _divided(tile: Tile, dim: int) -> Tile:
    depth = next(size for size in (128, 64, 32, 16) if size <= tile.depth and dim % size == 0)
    return Tile(tile.rows, tile.columns, depth, tile.warps, tile.stages)
