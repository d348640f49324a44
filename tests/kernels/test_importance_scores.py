"""The scores' kernel: values, that it ran, and what it leaves to the default implementation."""

import importlib

import pytest
import torch
from ops.test_importance_scores import BOUNDS, exact, make
from ops.util import laid_out, relative_error

from .harness import DEVICE, Guarded, launches

kernels = importlib.import_module("hal_kernels.kernels.importance_scores")
operator = importlib.import_module("hal_kernels.ops.importance_scores")


def run(inputs, mask=None):
    with launches(kernels) as log, Guarded():
        out = kernels.importance_scores(*inputs.values(), mask)
    return out, log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "p, q", [(((4, 7), (3, 5)), ((7, 6),)), (((9, 64),), ((3, 33), (0, 9), (6, 1500)))]
)
def test_matches_the_formula(dtype, p, q):
    inputs = make(p, q, dtype)
    out, log = run(inputs)
    assert log == ["importance_scores"]
    assert relative_error(out, exact(inputs)) <= BOUNDS[dtype]


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_pruned_directions(mask_dtype):
    inputs = make()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0], device=DEVICE).to(mask_dtype)
    (out, log), (plain, _) = run(inputs, mask), run(inputs)
    assert log == ["importance_scores"]
    assert torch.equal(out[mask > 0], plain[mask > 0]) and (out[mask == 0] == -torch.inf).all()


def test_nan_reaches_its_own_direction_only():
    inputs = make()
    inputs["importance"][0][1, 2] = torch.nan
    out, _ = run(inputs)
    assert out.isnan().nonzero().tolist() == [[inputs["positions_p"].tolist().index(1)]]


def test_what_the_default_implementation_takes():
    inputs = make()
    for name in ("importance", "uncertainty"):
        inputs[name] = [laid_out(t, "sliced") for t in inputs[name]]
    for case in (inputs, make(dtype=torch.float64), make(((0, 3),), ((0, 4),))):
        with launches(kernels) as log:
            out = operator._cuda(*case.values(), None)
        assert log == [] and (not out.numel() or relative_error(out, exact(case)) <= 1e-6)
