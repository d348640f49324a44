"""The computed sizes of what is sent, against models that are there."""

import pytest
from torch import nn

import hal_kernels
from bench import communication, report
from bench.communication import Shape

SHAPES = (Shape(2, 8, 12), Shape(1, 12, 8), Shape(3, 8, 8))


def model():
    layers = [nn.Linear(s.d_in, s.d_out) for s in SHAPES for _ in range(s.count)]
    return nn.ModuleList(layers)


def trained(rank, **options):
    patched = hal_kernels.patch_model(model(), rank, init_rank=rank, seed=0, **options)
    return sum(p.numel() for p in patched.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 4])
def test_parameters(rank):
    assert communication.hypernetwork_parameters(SHAPES, rank) == trained(rank, hypernet="bert")
    factors = communication.factor_parameters(SHAPES, rank)
    assert factors == trained(rank)
    assert factors + communication.directions(SHAPES, rank) == trained(rank, hypernet="direct")


def test_a_ring_sends_each_byte_nearly_twice():
    assert communication.sent(1000, 1) == 0
    assert communication.sent(1000, 2) == 1000
    assert communication.sent(1000, 1000) == pytest.approx(1998)


def test_the_documented_table_is_this_one():
    text = (report.ROOT / "docs" / "distributed.md").read_text()
    assert report.updated(text) == text
