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

import hal_kernels.kernels
import hal_kernels.ops
from hal_kernels.kernels.configs import ARCHITECTURES
from tools import report
from tools.kernel_cases import CASES

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
    assert "4 compiled, 0 with a problem" in done.stdout
    assert "4 compiled, 4 with a problem" in done.stdout
    assert "shared memory above -1" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 1"  # exit statuses
    rows = json.loads(path.read_text())
    assert [row["kernel"] for row in rows] == ["spectral_step.gram_kernel"] * 4
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
