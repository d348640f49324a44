"""What no operator takes, in any of its arguments: a message that names the argument, before
anything is read. (A tensor on another device once reached native code.)"""

import copy
import re

import pytest
import torch

from hal_kernels import ops

T, D_IN, D_OUT, R = 5, 8, 6, 2


def layer():
    return {
        "x": torch.randn(T, D_IN), "weight": torch.randn(D_OUT, D_IN), "bias": torch.randn(D_OUT),
        "p": torch.randn(R, D_IN), "lam": torch.randn(R), "q": torch.randn(R, D_OUT),
    }  # fmt: skip


def packed():
    return [torch.rand(R, D_IN), torch.rand(R), torch.rand(R, D_OUT)]


mask, seed = torch.ones(R), torch.tensor(3)
grouped = {name: value if name == "x" else [value] for name, value in layer().items()}
adapter = {k: v for k, v in layer().items() if k in ["x", "p", "lam", "q"]}
ends = torch.tensor([0, R])

CASES = {
    "svd_linear": layer() | {
        "mask": mask, "seed": seed, "dropout": 0.5, "scaling": 0.5, "tangent": 0.5,
    },
    "svd_linear_group": grouped | {"scaling": 0.5},
    "svd_adapter_add": adapter | {
        "y": torch.randn(T, D_OUT), "seed": seed, "dropout": 0.5, "scaling": 0.5,
    },
    "orthogonality_penalty": {
        "factors": packed()[::2], "offsets": [ends, ends], "max_ranks": [R, R], "weight": 0.5,
    },
    "update_importance_": {
        "importance": packed(), "uncertainty": packed(), "values": packed(),
        "gradients": packed(), "beta1": 0.5, "beta2": 0.5,
    },
    "importance_scores": {
        "importance": packed(), "uncertainty": packed(), "positions_p": torch.arange(R),
        "positions_q": torch.arange(R), "count_p": 1,
    },
    "prune_smallest": {"scores": torch.rand(4), "count": 2},
}  # fmt: skip


def test_every_operator_is_here():
    public = {n for n in ops.__all__ if n[0].islower() and not n.endswith("_reference")}
    assert public == {*CASES, "spectral_step_"}  # whose arguments are in test_spectral_step.py


def places(value, *path):
    """(path, leaf) of every tensor and number in a nested argument."""
    if isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from places(entry, *path, index)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from places(entry, *path, name)
    else:
        yield path, value


def put(value, path, new):
    """`value` with another leaf."""
    if not path:
        return new
    if isinstance(value, dict):
        return value | {path[0]: put(value[path[0]], path[1:], new)}
    items = list(value)
    items[path[0]] = put(items[path[0]], path[1:], new)
    return type(value)(items)


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_no_operator_takes(name):
    """On another device, sparse, of integers, or none at all."""
    operator, good = getattr(ops, name), CASES[name]
    operator(**copy.deepcopy(good))
    tensors = [(path, leaf) for path, leaf in places(good) if isinstance(leaf, torch.Tensor)]
    assert tensors
    for path, tensor in tensors:
        wrong = [tensor.to_sparse() if tensor.dim() else tensor.bool(), 3]
        if path[0] != "mask":  # ones and zeros of any dtype will do
            wrong.append(tensor.to(torch.int8))
        if len(tensors) > 1:
            wrong.append(tensor.to("meta"))
        if path[0] not in ("bias", "seed", "mask"):
            wrong.append(None)
        for value in wrong:
            # The first of several tensors may as well be the one that the others differ from.
            message = r"meta" if getattr(value, "is_meta", False) else re.escape(path[0])
            with pytest.raises((TypeError, ValueError), match=message):
                operator(**put(copy.deepcopy(good), path, value))


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_no_operator_takes(name):
    operator, good = getattr(ops, name), CASES[name]
    for path, number in places(good):
        if isinstance(number, torch.Tensor):
            continue
        for value in ("a", None, True, 10**400, float("nan"), torch.ones(2)):
            with pytest.raises(
                (TypeError, ValueError), match=rf"{re.escape(path[0])}.* is .*expected|too"
            ):
                operator(**put(copy.deepcopy(good), path, value))


LISTS = [
    ("orthogonality_penalty", "factors"),
    ("importance_scores", "importance"),
    ("importance_scores", "uncertainty"),
    *(("update_importance_", n) for n in ("importance", "uncertainty", "values", "gradients")),
]


@pytest.mark.parametrize(("name", "argument"), LISTS)
def test_lists_that_are_none(name, argument):
    good = copy.deepcopy(CASES[name])
    for value, error in ((torch.rand(3, 2), TypeError), ({}, TypeError), ([], ValueError)):
        with pytest.raises(error, match=rf"{argument} is (a|empty).*, expected (a list|at least)"):
            getattr(ops, name)(**good | {argument: value})
