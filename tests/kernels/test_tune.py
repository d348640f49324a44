"""What can be tested of tuning without a GPU: the search, and what it measures on."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hal_kernels.kernels import configs
from hal_kernels.kernels.configs import ARCHITECTURES, DEFAULT, SM_90, Tile
from tools import problems, tune
from tools.problems import Sizes
from tools.tiles import tiles_of, with_tiles

from .harness import DEVICE

ROOT = Path(__file__).parents[2]
SMALL = Sizes((24, 64), (20, 64), 2)


def changed(gpu=SM_90):
    """Every tile, moved to its first neighbour."""
    return {name: tune.neighbours(name, tile)[0] for name, tile in tiles_of(gpu).items()}


def same(one, other):
    """Architectures compare by identity."""
    return dataclasses.asdict(one) == dataclasses.asdict(other)


@pytest.mark.parametrize("gpu", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_names_of_tiles(gpu):
    tiles = tiles_of(gpu)
    assert same(with_tiles(gpu, {}), gpu)
    moved = with_tiles(gpu, changed(gpu))
    assert tiles_of(moved) == changed(gpu)
    assert all(tile != tiles[name] for name, tile in tiles_of(moved).items())
    assert {name.split(".")[0] for name in tiles} == {"svd", "penalty"}


def test_neighbours():
    tile = Tile(16, 512, 4, 1, 64)
    found = tune.neighbours("svd.16.fused.0", tile)
    steps = [
        {"rows": 32}, {"columns": 256}, {"depth": 32}, {"depth": 128}, {"num_warps": 2},
        {"num_warps": 8}, {"num_stages": 2},
    ]  # fmt: skip
    assert found == [dataclasses.replace(tile, **step) for step in steps]
    # A field that a kernel does not use stays zero, and a penalty's rows are the class of ranks.
    assert {t.depth for t in tune.neighbours("svd.16.shrink", Tile(16, 64, 8, 2))} == {0}
    assert {t.rows for t in tune.neighbours("penalty.64.residual", Tile(64, 32, 4, 3))} == {64}
    assert all(t.columns >= 32 for t in tune.neighbours("svd.16.dy", Tile(64, 32, 4, 3)))


def test_search_goes_on_until_no_neighbour_is_better():
    """On a cost that falls towards one tile; what cannot be measured is gone around."""
    goal, seen, lines = Tile(128, 256, 8, 3), [], []

    def cost(tile):
        seen.append(tile)
        if tile.num_warps == 16:
            return float("inf"), "OutOfResources: shared memory"
        away = abs(tile.rows - goal.rows) + abs(tile.columns - goal.columns)
        return 1.0 + away + abs(tile.num_warps - 8) + abs(tile.num_stages - 3), ""

    best, found, before = tune.search("svd.16.shrink", Tile(32, 64, 4, 5), cost, lines.append)
    assert best == goal and found == 1.0 and before == 1.0 + 96 + 192 + 4 + 2
    assert len(seen) == len(set(seen)) == len(lines)
    assert any("OutOfResources" in line for line in lines)


def test_search_of_one_step():
    """As long as each is better, a search goes on; a quick one stops."""
    best, found, _ = tune.search(
        "svd.16.shrink", Tile(128, 64, 4, 2), lambda t: (float(t.rows), ""), lambda line: None, 1
    )
    assert best.rows == 64 and found == 64.0


def test_search_leaves_a_tile_that_does_not_compile():
    best, found, _ = tune.search(
        "svd.16.shrink", Tile(64, 64, 4, 2),
        lambda t: (float(t.rows), "") if t.rows < 64 else (float("inf"), "no"), lambda line: None,
    )  # fmt: skip
    assert best.rows == 16 and found == 16.0


def test_every_tile_has_problems_that_its_kernel_solves():
    """In 16 and in 32 bits, and with a neighbouring tile."""
    timed = []
    for name, tile in changed(DEFAULT).items():
        if name.startswith(("svd.128", "penalty.64", "penalty.128")):
            continue  # as another of its kind
        cases = list(problems.problems(name, torch.device(DEVICE), SMALL))
        assert cases
        cost, wrong = problems.seconds_per(
            DEFAULT, name, tile, cases, lambda run: timed.append(run) or 2.0
        )
        assert wrong == "" and cost == pytest.approx(2.0), name
    assert len(timed) > 20


def test_a_wrong_result_is_not_a_candidate():
    device = torch.device(DEVICE)
    (case, *_) = problems.problems("svd.32.shrink", device, SMALL)
    assert case.wrong() == ""
    off = dataclasses.replace(case, expected=[case.expected[0] * 1.1])
    assert "relative error 0.09" in off.wrong()
    nan = dataclasses.replace(case, results=lambda out: [out[0].sum(0) * float("nan")])
    assert "relative error nan" in nan.wrong()
    tile = Tile(64, 32, 4, 2)
    cost, wrong = problems.seconds_per(DEFAULT, "svd.32.shrink", tile, [off], lambda run: 1.0)
    assert cost == float("inf") and "relative error" in wrong
    broken = dataclasses.replace(case, run=lambda: 1 // 0)
    cost, wrong = problems.seconds_per(DEFAULT, "svd.32.shrink", tile, [broken], lambda run: 1.0)
    assert cost == float("inf") and wrong.startswith("ZeroDivisionError: ")


def test_tuning_finds_the_faster_tile():
    """By a clock that counts columns; one kernel of each kind."""
    only = ["penalty.16.residual", "svd.32.expand"]
    clock = []

    def bench(run):
        gpu = configs.architecture_of(torch.device(DEVICE))
        tiles = (gpu.penalty[16].residual, gpu.svd[32].expand)
        clock.append(sum(t.columns + t.rows + t.num_warps + t.num_stages for t in tiles))
        return clock[-1] * 1e-6

    small = dataclasses.replace(SMALL, large=(17, 64), small=(17, 64))
    gpu = dataclasses.replace(DEFAULT, svd={32: DEFAULT.svd[32], 128: DEFAULT.svd[128]})
    lines: list[str] = []
    found = dict(tune.tune(gpu, torch.device(DEVICE), only, bench, small, lines.append))
    assert found == {
        "svd.32.expand": Tile(16, 32, 1, 1),
        "penalty.16.residual": Tile(16, 16, 1, 1),
    }
    assert "svd.32.expand" in lines and any("times as fast" in line for line in lines)


def test_rates():
    sizes = dataclasses.replace(SMALL, large=(64, 64), small=(32, 64))
    seconds = iter([1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
    rates = tune.measured_rates(DEFAULT, torch.device(DEVICE), lambda run: next(seconds), sizes)
    assert rates["bandwidth"] == pytest.approx(2 * 64 * 64 * 2)
    assert rates["matrix_rate"] == pytest.approx(2 * 64**3 / 2)
    assert rates["prepare"] is True  # 3 µs against 4
    assert rates["launch_us"] > 0 and rates["gemm_slowdown"] > 0
    dataclasses.replace(DEFAULT, **rates)  # each is one of its fields


def test_only():
    names = ("shrink", "expand", "dy", "dy32", "x", "fused.0", "fused.1", "fused.2")
    assert list(tune.selected(SM_90, ["svd.16"])) == [f"svd.16.{n}" for n in names]
    assert list(tune.selected(SM_90, ["penalty.16.residual"])) == ["penalty.16.residual"]
    assert tune.selected(SM_90, []) == tiles_of(SM_90)
    with pytest.raises(ValueError, match=r"no tile is named 'svd.1', expected one of \['svd.16.s"):
        tune.selected(SM_90, ["svd.1"])


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, "-m", "tools.tune", *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_command_without_a_gpu():
    done = command()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("no GPU: tiles are measured on the one that is to use them")


def test_dry_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--dry-run", "--only", "svd.32.shrink", "penalty.16.residual"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert names == ["svd.32.shrink", "penalty.16.residual"]
    assert lines[0] == "svd.32.shrink: 64×32, 4 warps, 2 stages"
    assert lines[1] == "  32×32, 4 warps, 2 stages"
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--dry-run", "--only", "nonsense"])
    assert "no tile is named 'nonsense'" in capsys.readouterr().err


def test_interpreted_kernels_are_not_measured(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "architecture_of", lambda device: SM_90)
    with pytest.raises(SystemExit, match="2"):
        tune.main([])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@pytest.mark.parametrize("options, wanted_steps", [([], math.inf), (["--quick"], 1)])
def test_a_run_prints_what_differs(options, wanted_steps, monkeypatch, capsys):
    """All of `main`, on a GPU that is made up."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    properties = dataclasses.make_dataclass("Properties", ["multi_processor_count"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties(114))
    monkeypatch.setattr(tune, "architecture_of", lambda device: SM_90)
    rates = {"bandwidth": 3e6, "prepare": False}
    monkeypatch.setattr(tune, "measured_rates", lambda *rest: rates)

    def tuned_tiles(gpu, device, only, bench, sizes, steps):
        assert steps == wanted_steps
        assert only == ["svd.16"] and gpu.bandwidth == 3e6 and gpu.multiprocessors == 114
        yield "svd.16.x", Tile(32, 64, 4, 2)
        yield "svd.16.dy", SM_90.svd[16].dy
        yield "svd.16.fused.0", Tile(64, 128, 8, 3, 64)

    monkeypatch.setattr(tune, "tune", tuned_tiles)
    assert tune.main(["--only", "svd.16", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "",
        "sm_90 in kernels/configs.py, from NVIDIA H100 80GB HBM3:",
        "multiprocessors: 114",
        "bandwidth: 3e+06",
        "prepare: False",
        "svd.16.x: Tile(32, 64, 4, 2)",
        "svd.16.fused.0: Tile(64, 128, 8, 3, 64)",
    ]
