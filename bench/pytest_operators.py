"""Each operator, forward and backward, under pytest-benchmark: its tables, files and comparisons.

    python -m pytest bench/pytest_operators.py [-k svd_linear] [--benchmark-autosave]
    python -m pytest bench/pytest_operators.py --benchmark-compare --benchmark-compare-fail=min:10%

The small sizes of bench.operators, each implementation checked against the formula in float64
first. Implementations follow one another here, so beside each other they say less than in
bench.operators, which takes turns: this is for one implementation before and after a change.
"""

from typing import Any

import pytest
import torch

from .operator_cases import Case, Function, cases
from .operators import BOUNDS, error, implementations, synchronize, trained

ID = str.maketrans({" ": "-", "→": "-"})  # pytest would write an arrow as its escape sequence
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: Any) -> None:
    found = [
        pytest.param(case, name, function, id=f"{case.operator} {case.size} {name}".translate(ID))
        for case in cases(DEVICE, quick=True, check=False)
        for name, function in implementations(case, compiled=False).items()
    ]
    metafunc.parametrize(("case", "name", "function"), found)


def test_operator(benchmark: Any, case: Case, name: str, function: Function) -> None:
    if name != "base GEMM":  # no adapter: nothing to compare with
        assert error(function, case, None) <= BOUNDS[case.dtype]
    benchmark.group = f"{case.operator} {case.size}"
    step = trained(function, case)

    def until_done() -> None:
        step()
        synchronize()

    benchmark(until_done)
