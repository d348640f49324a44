"""DistributedDataParallel over gloo: alike everywhere, and one process on the joined batch."""

import copy
import functools

import models
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from training import adapter_state, assert_close, gradients, trainable

import hal_kernels
from bench.communication import Counter
from hal_kernels.nn import hypernet

from .processes import run, share

STEPS, ROWS = 5, 2  # rows a process and step
# name -> (hypernet, activation checkpointing, options)
CASES = {
    "direct": ("direct", False, {}),
    "bert": ("bert", False, {}),
    "bert magnitude": ("bert", False, {"allocation": "magnitude"}),
    "bert ema": ("bert", False, {"allocation": "ema"}),
    "direct ema": ("direct", False, {"allocation": "ema"}),
    "bert checkpointed": ("bert", True, {}),
    "spectral": ("direct", False, {"update": "spectral"}),
    "spectral checkpointed": ("direct", True, {"update": "spectral"}),
}
FOUR = ("direct ema", "bert ema", "spectral")  # cases of four processes, too
ALIKE = ("bert ema",)  # alike in all processes, but not the one process's run: see allocation


def build(case, seed=0):
    kind, checkpointed, options = CASES[case]
    model = models.bert(dtype=torch.float64)
    if checkpointed:
        model.gradient_checkpointing_enable()
    settings = {"init_rank": 4, "interval": 1, "seed": seed, "dtype": torch.float64} | options
    hal_kernels.patch_model(model, 2, hypernet=kind, **settings)
    # no Adam: it divides by gradients that only rounding may have made other than zero
    return model, torch.optim.SGD(trainable(model), lr=0.1)


def steps(model, wrapped, optimizer, rank, world, total):
    """Each step's gradients and mask, on this rank's share of `total` rows."""
    found = []
    for index in range(STEPS):
        mine = share(models.batch(model, total, seed=index), rank, world)
        models.loss_of(wrapped(**mine)).backward()
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        found[-1]["mask"] = model.hal.mask.clone()
    return found


def in_processes(rank, world):
    hypernet.HIDDEN, hypernet.INNER = 24, 32
    found = {}
    for case in CASES if world == 2 else FOUR:
        model, optimizer = build(case)
        wrapped = DistributedDataParallel(model)  # find_unused_parameters is off
        found[case] = steps(model, wrapped, optimizer, rank, world, ROWS * 4)
    return found


@functools.cache
def found_by(world):
    return run(in_processes, world)


@pytest.mark.parametrize(
    ("world", "case"), [*((2, case) for case in CASES), *((4, case) for case in FOUR)]
)
def test_processes_are_alike_and_equal_one(world, case, small_hypernets):
    ranks = copy.deepcopy(found_by(world))
    for index in range(STEPS):
        for rank in ranks[1:]:
            for name, tensor in ranks[0][case][index].items():
                assert torch.equal(rank[case][index][name], tensor), (index, name)
    assert ranks[0][case][-1]["mask"].sum() < ranks[0][case][0]["mask"].sum()
    if case in ALIKE:
        return
    model, optimizer = build(case)
    for found, expected in zip(
        ranks[0][case], steps(model, model, optimizer, 0, 1, ROWS * 4), strict=True
    ):
        # the order of sums over rows, in float64
        assert torch.equal(found.pop("mask"), expected.pop("mask"))
        assert_close(found, expected, 1e-9)


# ---- what may differ between processes at first, or in one of them alone -------------------------


def odd_processes(rank, world):
    hypernet.HIDDEN, hypernet.INNER = 24, 32
    found = {}

    # 1. Each draws other factors: the first one's are taken.
    torch.manual_seed(rank)
    model, optimizer = build("bert", seed=None)
    wrapped = DistributedDataParallel(model)
    steps(model, wrapped, optimizer, rank, world, ROWS * world)
    found["drawn"] = adapter_state(model)

    # 2. NaN in one of them: the step is left out everywhere.
    inputs = models.batch(model, ROWS, seed=rank)
    models.loss_of(wrapped(**inputs)).backward()
    if rank == 1:
        trainable(model)[0].grad.fill_(float("nan"))  # after gradients were averaged
    optimizer.step()
    optimizer.zero_grad()
    found["after NaN"] = adapter_state(model)

    # 3. What is sent in a step.
    for case in ("bert", "direct"):
        model, optimizer = build(case)
        wrapped = DistributedDataParallel(model)
        steps(model, wrapped, optimizer, rank, world, ROWS * world)  # allocates in every step
        with Counter() as counter:
            steps(model, wrapped, optimizer, rank, world, ROWS * world)
        size = sum(8 * p.numel() for p in trainable(model))
        allocations = model.hal.last_allocation - STEPS
        assert 0 < allocations < STEPS
        found[f"sent {case}"] = (counter.bytes, size, allocations * 8 * model.hal.layout.rows)

    # 4. Micro-batches whose loss is normalised over all processes, as Trainer does it.
    net = hal_kernels.patch_model(Counting(), 2, **COUNTING)
    wrapped = DistributedDataParallel(net)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (world * wrapped(x[2 * rank : 2 * rank + 2], num_items_in_batch=4)).backward()
    found["normalised"] = gradients(net)
    return found


COUNTING = {"hypernet": "direct", "seed": 0, "gamma": 3.0, "dtype": torch.float64}


class Counting(torch.nn.Module):
    """Takes num_items_in_batch, as transformers' models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, x, num_items_in_batch=None):
        return self.linear(x).square().sum() / (num_items_in_batch or len(x))


@pytest.fixture(scope="module")
def odd():
    return run(odd_processes, 2)


def test_the_first_process_settles_what_was_drawn(odd):
    first, second = (rank["drawn"] for rank in odd)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_a_step_is_left_out_by_all_or_none(odd):
    for rank in odd:
        for name, tensor in rank["drawn"].items():
            assert torch.equal(rank["after NaN"][name], tensor), name


@pytest.mark.parametrize("case", ["bert", "direct"])
def test_bytes_sent(case, odd):
    """The gradients, R scores where ranks are allocated, and whether a step counts."""
    found, gradient_bytes, score_bytes = odd[0][f"sent {case}"]
    assert found.pop("allreduce_") == STEPS * (gradient_bytes + 4) + score_bytes
    # DistributedDataParallel keeps the frozen model's own buffers alike
    frozen = sum(b.numel() * b.element_size() for b in models.bert(dtype=torch.float64).buffers())
    assert sum(found.values()) <= STEPS * frozen, found


def test_the_penalty_counts_once_over_all_processes(odd):
    net = hal_kernels.patch_model(Counting(), 2, **COUNTING)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net(x, num_items_in_batch=4).backward()
    assert_close(odd[0]["normalised"], gradients(net), 1e-12)  # order of sums
