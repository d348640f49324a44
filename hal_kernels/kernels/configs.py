"""What kernels are launched with, per GPU architecture: tile sizes, bounds, and the GPU's own size.

A tile is chosen by shape class (rank, width of the element type, alignment; for a GEMM also by what
it would cost), never measured inside a training step. An unknown GPU takes `DEFAULT`, whose tiles
fit the 64 KiB of shared memory that every supported GPU has. ``python -m tools.tune`` looks for
better tiles on the GPU it runs on and prints them as they are written here.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch

from .launch import padded

HIGHEST_RANK = 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's share of a ``[T, d]`` matrix, and how it is compiled."""

    rows: int
    columns: int  # the SVD adapter's: of 16-bit elements, half as many of 32 bits
    num_warps: int
    num_stages: int
    depth: int = 0  # the step along a summed dimension; counted as columns are

    def columns_of(self, dtype: torch.dtype) -> int:
        """Columns of elements of `dtype`, equal in bytes."""
        return self.columns * 2 // dtype.itemsize

    def depth_of(self, dtype: torch.dtype) -> int:
        """Depth in elements of `dtype`, equal in bytes."""
        return self.depth * 2 // dtype.itemsize

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside its arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(frozen=True)
class SVDTiles:
    """Tiles of the SVD adapter's kernels for one class of ranks."""

    shrink: Tile  # x → h
    expand: Tile  # h → y
    dy: Tile  # dy → u, dQ, of 16 bits
    dy32: Tile  # the same of 32 bits, which are split for three products: half the rows
    x: Tile  # x → dP, dΛ, dx
    fused: tuple[Tile, ...]  # x → y, h; one is chosen by `fused_tile`

    def dy_of(self, dtype: torch.dtype) -> Tile:
        return self.dy if dtype.itemsize == 2 else self.dy32


@dataclasses.dataclass(frozen=True)
class PenaltyTiles:
    """Tiles of the orthogonality penalty, of as many rows as the class of ranks has."""

    residual: Tile  # F → FFᵀ − I
    gradient: Tile  # R, F → RF; depth along R


_PENALTY = {
    16: PenaltyTiles(Tile(16, 64, 2, 4), Tile(16, 128, 4, 1, 16)),
    32: PenaltyTiles(Tile(32, 64, 4, 3), Tile(32, 64, 4, 1, 32)),
    64: PenaltyTiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2, 32)),
    128: PenaltyTiles(Tile(128, 16, 8, 3), Tile(128, 32, 8, 2, 32)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A GPU as the launch functions see it. Rates are what large kernels reach, not peaks."""

    name: str
    multiprocessors: int
    bandwidth: float  # of memory, bytes per µs
    cache_bandwidth: float  # of the level-2 cache, bytes per µs
    matrix_rate: float  # flop per µs, 16-bit inputs
    float32_rate: float  # the same of the vendor's GEMM of full float32
    svd: Mapping[int, SVDTiles]  # by the highest rank of each class
    penalty: Mapping[int, PenaltyTiles] = dataclasses.field(default_factory=lambda: _PENALTY)
    launch_us: float = 5.0  # what one more launch costs a step, host and device together
    gemm_slowdown: float = 1.2  # of a Triton GEMM over the vendor's
    prepare: bool = True  # the base GEMM adds to the adapter's output; False: the other way round
    column_parts: int = 16  # at most, of one block of rows: sums of so many partial h or u
    row_splits: int = 16  # at most, of one tile of columns: sums of so many partial dP or dQ
    block_splits: tuple[int, int] = (8, 64)  # the same where a program adds to dQ in memory
    partial_bytes: int = 32 << 20  # of partial dQ then, as far as `block_splits` allows

    def svd_tiles(self, rank: int, aligned: bool) -> SVDTiles:
        """The SVD adapter's tiles for a rank. Without 16-byte alignment: small ones, `ODD`."""
        by_class = self.svd if aligned else ODD
        return next(tiles for highest, tiles in by_class.items() if rank <= highest)

    def penalty_tiles(self, rank: int) -> tuple[int, PenaltyTiles]:
        """(padded rank, tiles) of the orthogonality penalty of matrices of up to `rank` rows."""
        return next(item for item in self.penalty.items() if rank <= item[0])

    def column_parts_of(self, row_blocks: int, d: int, columns: int) -> int:
        """Parts of d columns, in tiles of `columns`: blocks × parts are about two a multiprocessor.

        A power of two, the nearest by ratio, since kernels are compiled for each number of parts.
        """
        most, parts = min(self.column_parts, -(-d // columns)), 1
        while parts < most and parts * row_blocks < 2**0.5 * self.multiprocessors:
            parts *= 2
        return parts

    def chunks_of(self, row_blocks: int, d: int, columns: int) -> tuple[int, int]:
        """(chunks, columns of each) of d columns, without a sum over them: more programs than fit.

        At least two a multiprocessor, where there are as many tiles of `columns`.
        """
        wanted = -(-2 * self.multiprocessors // row_blocks)
        chunk = chunk_of(d, columns, min(-(-d // columns), wanted))
        return -(-d // chunk), chunk

    def split_rows(self, row_blocks: int, tiles: int) -> tuple[int, int]:
        """(splits, blocks of each) of the rows, so that splits × tiles fill the GPU about once."""
        return _shared(
            row_blocks, min(self.row_splits, max(1, round(self.multiprocessors / tiles)))
        )

    def bound_rows(self, row_blocks: int, bytes_of_partial: int) -> tuple[int, int]:
        """(splits, blocks of each) of the rows, as many as the bytes of partial sums allow."""
        least, most = self.block_splits
        return _shared(row_blocks, min(most, max(least, self.partial_bytes // bytes_of_partial)))


def chunk_of(d: int, columns: int, parts: int) -> int:
    """Columns of each of `parts` of d columns: whole tiles of `columns`."""
    tiles = -(-d // columns)
    return -(-tiles // parts) * columns


def _shared(blocks: int, splits: int) -> tuple[int, int]:
    """(splits, blocks of each), none of them empty, of which there are at most `splits`."""
    each = -(-blocks // splits)
    return -(-blocks // each), each


# By class of ranks; tiles as rows, columns, warps, stages(, depth).
_SMALL = {
    32: SVDTiles(
        Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2),
        Tile(64, 32, 8, 2), (Tile(64, 64, 8, 2, 64), Tile(32, 32, 4, 2, 64)),
    ),
    128: SVDTiles(
        Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2),
        Tile(32, 32, 8, 2), (Tile(32, 32, 8, 2, 32),),
    ),
}  # fmt: skip
_AMPERE = {
    16: SVDTiles(
        Tile(64, 128, 4, 4), Tile(64, 128, 8, 3), Tile(128, 32, 8, 4), Tile(64, 32, 8, 3),
        Tile(64, 128, 8, 3), (Tile(128, 128, 8, 3, 32), Tile(32, 64, 4, 3, 64)),
    ),
    32: SVDTiles(
        Tile(64, 64, 4, 4), Tile(64, 128, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3),
        Tile(64, 64, 8, 3), (Tile(128, 64, 8, 3, 64), Tile(32, 64, 4, 3, 64)),
    ),
    128: SVDTiles(
        Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2),
        Tile(32, 32, 8, 2), (Tile(64, 32, 8, 3, 64), Tile(32, 32, 8, 3, 64)),
    ),
}  # fmt: skip
_HOPPER = {
    16: SVDTiles(
        Tile(64, 128, 4, 4), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3),
        Tile(64, 128, 8, 3),
        (Tile(128, 128, 8, 3, 64), Tile(64, 64, 4, 4, 64), Tile(32, 64, 4, 4, 64)),
    ),
    32: SVDTiles(
        Tile(64, 128, 4, 3), Tile(64, 128, 8, 3), Tile(64, 64, 8, 3), Tile(64, 32, 4, 3),
        Tile(64, 128, 8, 3),
        (Tile(128, 128, 8, 3, 64), Tile(64, 64, 4, 4, 64), Tile(32, 64, 4, 4, 64)),
    ),
    128: SVDTiles(
        Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3),
        Tile(64, 64, 8, 2), (Tile(128, 64, 8, 3, 64), Tile(32, 32, 8, 3, 64)),
    ),
}  # fmt: skip
ODD = {
    32: SVDTiles(
        Tile(64, 32, 8, 1), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1),
        Tile(64, 32, 8, 1), (Tile(32, 32, 4, 1, 32),),
    ),
    128: SVDTiles(
        Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1),
        Tile(32, 32, 8, 1), (Tile(32, 32, 8, 1, 32),),
    ),
}  # fmt: skip

DEFAULT = Architecture("default", 80, 0.8e6, 2.5e6, 120e6, 12e6, _SMALL)
SM_80 = Architecture("sm_80", 108, 1.7e6, 4e6, 260e6, 15e6, _AMPERE)
SM_89 = Architecture("sm_89", 128, 0.85e6, 4e6, 160e6, 45e6, _SMALL)
SM_90 = Architecture("sm_90", 132, 4.3e6, 7e6, 790e6, 50e6, _HOPPER)
SM_100 = Architecture("sm_100", 148, 6.5e6, 10e6, 1600e6, 60e6, _HOPPER)
GFX942 = Architecture("gfx942", 304, 4.0e6, 8e6, 600e6, 90e6, _SMALL)

ARCHITECTURES = {a.name: a for a in (DEFAULT, SM_80, SM_89, SM_90, SM_100, GFX942)}


@functools.cache
def _of_gpu(index: int) -> Architecture:
    """The architecture of a GPU, by its name, or `DEFAULT`; with the GPU's own multiprocessors."""
    gpu = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = gpu.gcnArchName.split(":")[0]
    else:
        name = f"sm_{gpu.major}{gpu.minor}"
    architecture = ARCHITECTURES.get(name, DEFAULT)
    return dataclasses.replace(architecture, multiprocessors=gpu.multi_processor_count)


_in_use: Architecture | None = None


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a tensor's device, asked for once; `DEFAULT` for what isn't a GPU."""
    if _in_use is not None:
        return _in_use
    return _of_gpu(device.index or 0) if device.type == "cuda" else DEFAULT


@contextlib.contextmanager
def using(gpu: Architecture) -> Iterator[None]:
    """Launch as for `gpu`, whatever the device: to measure and to test tiles."""
    global _in_use
    before, _in_use = _in_use, gpu
    try:
        yield
    finally:
        _in_use = before


def _rates(gpu: Architecture, width: int, full: bool) -> tuple[float, float]:
    """(Triton's, the vendor's) flop per µs; `full` float32 is three products of TF32 in Triton."""
    if width == 2:
        return gpu.matrix_rate, gpu.matrix_rate
    return (gpu.matrix_rate / 8, gpu.float32_rate) if full else (gpu.matrix_rate / 2,) * 2


def fused_us(
    gpu: Architecture,
    tile: Tile,
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    width: int = 2,
    full: bool = True,
) -> float:
    """Estimated time of one GEMM that computes y and h, in tiles of `tile`.

    The longest of: the flops of whole tiles, each with xP of its own, on the multiprocessors that
    have a tile; the tiles' operands from the cache; the bytes from memory, which half of the
    multiprocessors saturate. A Triton GEMM takes `gpu.gemm_slowdown` times that. `width` is the
    bytes of an element of x, y and W; P, Λ, Q and h are float32. `full`: float32 is not rounded to
    TF32.
    """
    columns, (rate, _) = tile.columns * 2 // width, _rates(gpu, width, full)
    tiles = -(-T // tile.rows) * -(-d_out // columns)
    busy = min(1.0, tiles / gpu.multiprocessors)
    flops = tiles * 2 * tile.rows * d_in * (columns + padded(r))
    operands = tiles * (tile.rows + columns) * d_in * width
    moved = (T * d_in + d_in * d_out + T * d_out) * width + (T + d_in + d_out + 1) * r * 4
    return gpu.gemm_slowdown * max(
        flops / (rate * busy),
        operands / (gpu.cache_bandwidth * busy),
        moved / (gpu.bandwidth * min(1.0, 2 * busy)),
    )


def apart_us(
    gpu: Architecture, T: int, d_in: int, d_out: int, r: int, width: int = 2, full: bool = True
) -> float:
    """Least time of the same in three launches: the vendor's GEMM, h = xP, and y += s·(h ⊙ Λ)Q."""
    rate, vendor = _rates(gpu, width, full)
    moved = (T * d_in + d_in * d_out + T * d_out) * width
    base = max(moved / gpu.bandwidth, 2 * T * d_in * d_out / vendor)
    moved = T * (d_in + d_out) * width + (2 * T + d_in + d_out + 1) * r * 4
    adapter = max(moved / gpu.bandwidth, 2 * T * (d_in + d_out) * r / rate)
    return base + adapter + 2 * gpu.launch_us


def fused_tile(
    gpu: Architecture,
    tiles: tuple[Tile, ...],
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    width: int = 2,
    full: bool = True,
    always: bool = False,
) -> Tile | None:
    """The one of `tiles` with which a fused launch costs the least; None where it does not pay.

    The fused kernel serves small T, where launches count, and narrow outputs, where few tiles
    multiply x with P again: without launches and slowdown that is d_out < columns · width ·
    matrix_rate / (2 · bandwidth · R), about 1500 for 128 columns and r = 16 on an H200.
    """
    times = [fused_us(gpu, tile, T, d_in, d_out, r, width, full) for tile in tiles]
    best = min(times)
    pays = always or best < apart_us(gpu, T, d_in, d_out, r, width, full)
    return tiles[times.index(best)] if pays else None
