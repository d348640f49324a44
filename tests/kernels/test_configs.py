"""Architectures, tiles, and how rows and columns are shared out."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.kernels import configs, plan
from hal_kernels.kernels.configs import (
    ARCHITECTURES,
    DEFAULT,
    HIGHEST_RANK,
    ODD,
    Tile,
    architecture_of,
    chunk_of,
)
from hal_kernels.kernels.launch import dot_precision, padded


def test_names_are_the_keys():
    assert all(gpu.name == name for name, gpu in ARCHITECTURES.items())
    assert set(ARCHITECTURES) == {"default", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}


@pytest.mark.parametrize("gpu", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_tiles_are_what_a_dot_takes(gpu):
    """Sides are powers of two and at least 16 elements; 32-bit columns at least 16 as well."""
    for table in (gpu.svd, ODD):
        assert list(table) == sorted(table) and max(table) == HIGHEST_RANK
    for tiles in (*gpu.svd.values(), *ODD.values()):
        for tile in (tiles.shrink, tiles.expand, tiles.dy, tiles.dy32, tiles.x, *tiles.fused):
            sides = [tile.rows, tile.columns_of(torch.float32)]
            sides += [tile.depth_of(torch.float32)] if tile in tiles.fused else []
            assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
            assert tile.num_warps in (4, 8) and 1 <= tile.num_stages <= 4
        assert tiles.fused


@pytest.mark.parametrize("gpu", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_rank_classes(gpu):
    for rank in range(1, HIGHEST_RANK + 1):
        for even, table in ((True, gpu.svd), (False, ODD)):
            highest = min(r for r in table if r >= padded(rank))
            assert gpu.svd_tiles(rank, even) is table[highest]


def test_bytes_of_a_tile_do_not_depend_on_the_dtype():
    tile = Tile(64, 128, 4, 3, depth=64)
    assert tile.columns_of(torch.bfloat16) == 128 and tile.columns_of(torch.float32) == 64
    assert tile.depth_of(torch.float16) == 64 and tile.depth_of(torch.float32) == 32
    assert tile.options == {"num_warps": 4, "num_stages": 3}


def test_devices(monkeypatch):
    """No GPU: the default. A GPU: by capability, the default if that is unknown; asked for once."""
    assert architecture_of(torch.device("cpu")) is DEFAULT
    asked, fields = [], ["major", "minor", "multi_processor_count", "gcnArchName"]
    properties = dataclasses.make_dataclass("Properties", fields)

    def asked_of(index):
        asked.append(index)
        return properties(*{0: (9, 0), 1: (8, 9), 2: (12, 0), 3: (8, 6)}[index], 50 + index, "")

    monkeypatch.setattr(torch.cuda, "get_device_properties", asked_of)
    monkeypatch.setattr(torch.version, "hip", None)
    configs._of_gpu.cache_clear()
    try:
        names = [architecture_of(torch.device("cuda", i)).name for i in (0, 1, 2, 3, 0, 1)]
        assert names == ["sm_90", "sm_89", "default", "default", "sm_90", "sm_89"]
        assert asked == [0, 1, 2, 3]
        assert architecture_of(torch.device("cuda", 1)).multiprocessors == 51

        configs._of_gpu.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "6.0")
        amd = properties(9, 4, 304, "gfx942:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: amd)
        assert architecture_of(torch.device("cuda", 0)).name == "gfx942"
    finally:
        configs._of_gpu.cache_clear()


@given(st.integers(1, 5000), st.integers(1, 20000), st.sampled_from([16, 32, 64, 128, 256]))
def test_columns_are_shared_out_once(row_blocks, d, columns):
    """Parts cover all columns and are a power of two; chunks cover them, and none is empty."""
    for gpu in ARCHITECTURES.values():
        parts, tiles = gpu.column_parts_of(row_blocks, d, columns), -(-d // columns)
        assert chunk_of(d, columns, parts) % columns == 0
        assert d <= parts * chunk_of(d, columns, parts)
        assert parts <= gpu.column_parts and parts < 2 * tiles and parts & (parts - 1) == 0
        assert parts == 1 or parts * row_blocks < 2**1.5 * gpu.multiprocessors
        enough = parts * row_blocks >= 2**0.5 * gpu.multiprocessors
        assert enough or parts == gpu.column_parts or parts >= tiles
        chunks, chunk = gpu.chunks_of(row_blocks, d, columns)
        assert chunk % columns == 0 and (chunks - 1) * chunk < d <= chunks * chunk


@given(st.integers(1, 100000), st.integers(1, 5000), st.integers(1, 1 << 28))
def test_rows_are_shared_out_once(row_blocks, tiles, partial):
    for gpu in ARCHITECTURES.values():
        least, most = gpu.block_splits
        for (splits, each), bound in (
            (gpu.split_rows(row_blocks, tiles), gpu.row_splits),
            (gpu.bound_rows(row_blocks, partial), most),
        ):
            assert (splits - 1) * each < row_blocks <= splits * each
            assert splits <= bound
        assert splits <= least or splits * partial <= gpu.partial_bytes


def aligned(*tensors):
    return plan.aligned(*(plan.Kind(*kind) for kind in plan.kinds(*tensors)))


def test_alignment():
    x = torch.empty(5, 64, dtype=torch.bfloat16)
    assert aligned(x, torch.empty(3, 16))
    assert not aligned(x, torch.empty(3, 24))
    assert not aligned(x[:, 4:36], x)  # its rows start off a multiple of 16 bytes
    assert not aligned(torch.empty(5, 40)[:, :32])  # so do all but its first
    assert aligned(x[:, 8:24])


def test_precision(monkeypatch):
    assert dot_precision(torch.float32) == "tf32x3"
    assert dot_precision(torch.bfloat16) == "tf32"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert dot_precision(torch.float32) == dot_precision(torch.bfloat16) == "ieee"


def test_padded_ranks():
    assert [padded(r) for r in (1, 16, 17, 32, 33, 128)] == [16, 16, 32, 32, 64, 128]
