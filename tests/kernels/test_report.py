"""The ahead-of-time report."""

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hal_kernels.kernels
import hal_kernels.ops
from hal_kernels.kernels.configs import ARCHITECTURES, SM_90
from tools import model, report, svd_cases
from tools.kernel_cases import CASES
from tools.sass import Loop, loops_in

svd_kernels = importlib.import_module("hal_kernels.ops.svd_linear.triton_kernels")
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tools import report
arguments = ["--kernel", "spectral_step.gram", "--arch", "sm_90", "--jobs", "1"]
fits = report.main([*arguments, "--json", sys.argv[1]])
report.TARGETS["sm_90"] = report.TARGETS["sm_90"]._replace(block_shared=-1)
print(fits, report.main(arguments))
"""


def test_a_kernel_that_fits_and_one_that_does_not(tmp_path):
    """A process of its own: here kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 compiled, 0 with a problem" in done.stdout
    assert "6 compiled, 6 with a problem" in done.stdout
    assert "shared memory above -1" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 1"  # exit statuses
    rows = json.loads(path.read_text())
    assert [row["kernel"] for row in rows] == ["spectral_step.gram_kernel"] * 6
    for row in rows:
        assert row["arch"] == "sm_90" and row["spills"] == 0 and not row["problem"]
        assert 8 <= row["registers"] <= 255 and 0 < row["occupancy"] <= 1


@pytest.mark.parametrize(
    "found, problem",
    [
        ({}, ""),
        ({"spills": 4}, "spills"),
        ({"shared": 232448}, ""),
        ({"shared": 232449}, "shared memory above 232448"),
        ({"least": (1, 2)}, "0 of 1 loops load ahead"),
        ({"least": (1, 2), "loops": (Loop(9, 1, 512),), "blocks": 1}, "fewer than 2 blocks"),
        ({"least": (1, 2), "loops": (Loop(9, 1, 512),), "blocks": 2}, ""),
        ({"error": "CompilationError: why"}, "CompilationError: why"),
    ],
)
def test_problems(found, problem):
    assert report.Row("sm_90", "kernel", "case", "4x3", **found).problem == problem


def test_quick_takes_each_kernel_once_an_architecture():
    """Another of its cases on each, so that all kinds of them are compiled somewhere."""
    rows = [report.Row(a, k, str(n), "") for a in report.QUICK for k in "ab" for n in range(8)]
    kept = [rows[i] for i in report._few(rows)]
    assert [(r.arch, r.kernel) for r in kept] == [(a, k) for a in report.QUICK for k in "ab"]
    assert [r.label for r in kept] == ["0", "0", "2", "2", "4", "4", "6", "6"]


def test_nothing_to_compile_is_an_error(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        report.main(["--kernel", "nonsense"])
    assert "no kernel's name contains 'nonsense'" in capsys.readouterr().err


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


SASS = """
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDGSTS.E [R4], desc[UR4][R2.64] ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
        /*0050*/              @P2  BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0070*/              @!P3 BRA.U `(.L_x_2) ;
        /*0080*/               @P4 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_innermost_loops_of_sass():
    """Not the one around two others, nor a jump ahead, nor the one in which a kernel ends."""
    assert loops_in(SASS) == [Loop(3, 2, 32 * 20), Loop(2, 0, 0)]


def adapter(kernel, dtype, **constants):
    tile = SM_90.svd_tiles(16, True).x
    sizes = {"BT": 64, "BK": 128, "R": 16, "PRECISION": "tf32", "p_seed": None, **constants}
    return svd_cases.adapter_case(kernel, "sm_90", tile, dtype, True, **sizes)


def test_which_loops_are_to_load_ahead():
    x = svd_kernels.gradients_x_kernel
    for parts, loops in ((1, 2), (4, 2), (8, 1)):
        assert model.ahead(adapter(x, torch.bfloat16, PARTS=parts)) == loops
    case = adapter(x, torch.bfloat16, PARTS=1)
    assert model.ahead(case._replace(aligned=())) == 0
    assert report._least_blocks(case) == 2
    assert report._least_blocks(adapter(x, torch.float32, PARTS=1)) == 1


def test_the_model_is_slower_than_the_floor():
    """By the ramp alone; where a warp issues more than memory gives time for; and where few bytes
    are in flight."""
    shrink = adapter(svd_kernels.shrink_kernel, torch.bfloat16, gram=None, GRAM=None)
    floor, quick = model.times(shrink, [Loop(160, 12, 3072)], 2)
    assert 15 < floor < 17 and quick == pytest.approx(floor + model.RAMP)
    _, slow = model.times(shrink, [Loop(16000, 12, 3072)], 2)
    assert slow > 10 * floor
    _, cached = model.times(shrink, [Loop(160, 12, 9216)], 2)
    assert 2 * floor < cached < slow
    _, thin = model.times(
        shrink._replace(config={"num_warps": 8, "num_stages": 2}), [Loop(160, 12, 3072)], 1
    )
    assert thin > quick
    assert model.times(shrink, [Loop(160, 0, 0)], 2) is None


def test_every_architecture_has_a_target():
    assert report.TARGETS.keys() == ARCHITECTURES.keys()


def test_every_kernel_is_compiled():
    """A kernel is what the package launches: a jitted function named so."""
    kernels = set()
    packages = hal_kernels.kernels, hal_kernels.ops
    files = [pkgutil.walk_packages(p.__path__, f"{p.__name__}.") for p in packages]
    for file in itertools.chain(*files):
        for name, value in vars(importlib.import_module(file.name)).items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                kernels.add(value.__name__)
    assert kernels == {case.kernel.__name__ for cases in CASES.values() for case in cases()}


@pytest.mark.parametrize("module", CASES)
def test_cases_name_every_argument_on_every_architecture(module):
    cases = list(CASES[module]())
    assert {case.architecture for case in cases} == ARCHITECTURES.keys()
    for case in cases:
        given = case.signature.keys() | case.constexprs.keys()
        assert set(case.kernel.arg_names) <= given, case.kernel.__name__


@pytest.mark.parametrize(
    "registers, shared, warps, expected",
    [(32, 0, 4, 1.0), (255, 0, 8, 0.125), (64, 116000, 4, 0.0625), (33, 0, 4, 0.75)],
)
def test_occupancy(registers, shared, warps, expected):
    """sm_90: 65536 registers, 228 KiB, 64 warps, 32 blocks."""
    assert report._occupancy(report.TARGETS["sm_90"], registers, shared, warps) == expected
