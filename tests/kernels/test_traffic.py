"""The traffic model, against numbers worked out by hand."""

import dataclasses

import pytest

from hal_kernels.kernels.configs import (
    ARCHITECTURES,
    DEFAULT,
    SM_90,
    Tile,
    apart_us,
    fused_tile,
    fused_us,
)
from tools import traffic
from tools.traffic import Traffic

H200 = (4.3e6, 790e6)  # measured: bytes and flops per µs
LARGE = (8192, 4096, 4096)


def megabytes(part: Traffic) -> float:
    return part.moved / 1e6


def test_floor_is_the_longer_of_memory_and_matrix_work():
    part = Traffic(3_000_000, 1_000_000, 8_000_000)
    assert part.moved == 4_000_000
    assert part.floor_us(1e6, 1e6) == 8.0
    assert part.floor_us(1e6, 4e6) == 4.0
    assert part + part == Traffic(6_000_000, 2_000_000, 16_000_000)


def test_design_figures():
    """T = 8192, 4096 → 4096, r = 16, bf16: one pass over x 67.9 MB; x and dy once more 135.8 MB."""
    T, d_in, d_out = LARGE
    assert traffic.gemm(T, d_in, d_out).floor_us(*H200) == pytest.approx(348, rel=0.01)
    shrink = traffic.shrink(T, d_in, 16)
    assert megabytes(shrink) == pytest.approx(67.9, abs=0.05)
    assert shrink.floor_us(*H200) == pytest.approx(15.8, abs=0.1)
    backward = traffic.gradients_dy(T, d_out, 16) + traffic.gradients_x(T, d_in, 16, dx=False)
    # 135.8 MB of dy, x and u, and the factors with their gradients.
    assert megabytes(backward) == pytest.approx(135.8, abs=3)


def test_what_accumulating_costs():
    """A prepared output is read by the GEMM; one added to afterwards is read and written."""
    T, d_in, d_out = LARGE
    y = T * d_out * 2
    prepared = traffic.expand(T, d_out, 16) + traffic.gemm(T, d_in, d_out, beta=1)
    added = traffic.gemm(T, d_in, d_out) + traffic.expand(T, d_out, 16, base=True)
    assert prepared.moved == added.moved
    assert prepared.moved - traffic.gemm(T, d_in, d_out).moved == pytest.approx(2 * y, rel=0.01)


def test_partial_sums_are_counted():
    one, many = (traffic.shrink(100, 64, 3, splits=n) for n in (1, 4))
    assert many.written - one.written == 3 * 100 * 3 * 4
    one, many = (traffic.expand(100, 64, 3, splits=n) for n in (1, 4))
    assert many.read - one.read == 3 * 1200 and many.written - one.written == 1200
    one, many = (traffic.gradients_dy(100, 64, 3, splits=n, parts=n, blocks=n) for n in (1, 4))
    assert many.written - one.written == 3 * 1200 + (4 * 4 - 1) * 3 * 64 * 4
    assert many.read - one.read == 3 * 4 * 3 * 64 * 4
    apart = traffic.gradients_dy(100, 64, 3, apart=True)
    assert apart.read - one.read == 100 * 64 * 2
    one, many = (traffic.gradients_x(100, 64, 3, splits=n, parts=n) for n in (1, 4))
    assert many.written - one.written == 3 * (3 * 64 + 3) * 4
    assert traffic.reduce(64, 32, 3, splits=4, splits_q=2).read == (4 * 3 * 65 + 2 * 3 * 32) * 4
    added = traffic.gradients_x(100, 64, 3, add=True)
    assert added.read - one.read == 100 * 64 * 2
    assert traffic.gradients_x(100, 64, 3, dx=False).written == 3 * 65 * 4


def test_fused_recomputes_the_rank_product():
    narrow, wide = (traffic.fused(64, 512, d, 16, columns=128) for d in (128, 512))
    assert narrow.flops == 2 * 64 * 512 * 128 + 2 * 64 * 16 * (512 + 128)
    assert wide.flops == 2 * 64 * 512 * 512 + 2 * 64 * 16 * (4 * 512 + 512)


@pytest.mark.parametrize("width, full", [(2, True), (4, True), (4, False)])
def test_the_choice_of_a_launch_counts_the_same(width, full):
    """Without other limits, kernels/configs.py expects of fused and apart what moves here."""
    T, d_in, d_out, r = 4096, 768, 1024, 16
    gpu = dataclasses.replace(SM_90, launch_us=0.0, gemm_slowdown=1.0)
    vendor = rate = gpu.matrix_rate * {2: 1.0, 4: 0.125 if full else 0.5}[width]
    if width == 4 and full:
        vendor = gpu.float32_rate
    adapter = traffic.shrink(T, d_in, r, width=width) + traffic.expand(T, d_out, r, width=width)
    floors = [
        traffic.gemm(T, d_in, d_out, width=width).floor_us(gpu.bandwidth, vendor),
        adapter.floor_us(gpu.bandwidth, rate),
    ]
    assert apart_us(gpu, T, d_in, d_out, r, width, full) == pytest.approx(sum(floors))
    gpu = dataclasses.replace(gpu, matrix_rate=1e30, cache_bandwidth=1e30)
    fused = traffic.fused(T, d_in, d_out, r, width=width)
    found = fused_us(gpu, Tile(16, 16, 4, 2, 64), T, d_in, d_out, r, width)
    assert found == pytest.approx(fused.moved / gpu.bandwidth)


def choose(gpu, T, d_in, d_out, r=16, width=2):
    return fused_tile(gpu, gpu.svd_tiles(r, True).fused, T, d_in, d_out, r, width)


def test_fused_for_small_T_and_narrow_outputs():
    assert choose(SM_90, 128, 768, 768) is not None
    assert choose(SM_90, 16, 4096, 4096) is not None
    assert choose(SM_90, *LARGE) is None
    assert choose(SM_90, 8192, 4096, 4096, r=128) is None
    assert choose(SM_90, 2048, 4096, 14336) is None


@pytest.mark.parametrize("gpu", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("d", [768, 4096])
def test_fused_pays_up_to_some_T_and_not_beyond(gpu, d):
    pays = [choose(gpu, T, d, d) is not None for T in (1, 16, 64, 256, 1024, 4096, 16384, 65536)]
    assert pays == sorted(pays, reverse=True)
    assert pays[0] or d == 4096
    assert not pays[-1] or d == 768


def test_dearer_launches_favour_the_fused_kernel():
    for us, fused in ((0.0, False), (1e6, True)):
        gpu = dataclasses.replace(SM_90, launch_us=us)
        assert (choose(gpu, 4096, 4096, 4096) is not None) is fused


def test_tiles_that_fill_the_gpu_win():
    small, large = Tile(32, 32, 4, 2, 64), Tile(128, 128, 8, 2, 64)
    assert fused_tile(DEFAULT, (large, small), 32, 512, 1024, 8, always=True) is small
    assert fused_tile(DEFAULT, (small, large), 8192, 512, 4096, 8, always=True) is large


def test_the_penalty_costs_less_for_all_layers_at_once():
    """docs/operators.md: a launch more a layer costs more than the reads of P and Q it saves."""
    layers, d, r = 96, 4096, 16
    batched = traffic.penalty_residual(2 * layers, r, d) + traffic.penalty_sum(2 * layers)
    gram = traffic.gram(d, r, splits=SM_90.column_parts)
    apart = gram + gram + traffic.finish(r, splits_p=16, splits_q=16)
    saved = batched.moved - layers * apart.moved
    assert saved > 0
    assert saved / SM_90.bandwidth < 0.05 * (layers - 2) * SM_90.launch_us
