"""What patch_model refuses, and leaves as it was."""

import models
import pytest
import torch
from lifecycle import patched, unchanged
from torch import nn
from torch.nn import functional as F

from hal_kernels import patch_model, rank_pattern


def refuse(model, error, message, **options):
    with unchanged(model), pytest.raises(error, match=message):
        patch_model(model, **options)


def changed(change):
    """A net after `change`."""

    def make():
        model = models.net()
        change(model)
        return model

    return make


def own_forward(model):
    layer = model.down[1]
    layer.forward = lambda x: F.linear(x, layer.weight)


def elsewhere(model):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(24, 16, device="cuda")
    model.up[1].weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(lambda m: m.to("meta")), r"'up\.0' is on the meta device; load the weights"),
        (changed(lambda m: m.down[1].to("meta")), r"'down\.1' is on the meta device"),
        (changed(elsewhere), r"several devices, \['cpu', 'cuda:0'\]"),
        (changed(own_forward), r"'down\.1' has a forward function of its own"),
        (changed(lambda m: setattr(m, "hal", 3)), r"model has an attribute 'hal'"),
        (patched, r"model is patched already \(up\.0 is adapted\)"),
        (lambda: models.Holder(part=patched()), r"patched already \(part\.up\.0 is adapted\)"),
    ],
)
def test_models_that_cannot_be_patched(make, message):
    refuse(make(), ValueError, message)


def test_a_part_of_a_patched_model():
    model = patched()
    with unchanged(model):
        refuse(model.up, ValueError, r"model is patched already \(0 is adapted\)")


def test_a_lazy_layer():
    model = models.net()
    model.up[0] = nn.LazyLinear(24)
    message = r"'up\.0' .*LazyLinear|LazyLinear.*'up\.0'|'up\.0'.*(uninitialized|initialised)"
    with pytest.raises((TypeError, ValueError), match=message):
        patch_model(model, 2)


def test_a_rank_wider_than_a_layer():
    model = models.net(hidden=5)
    refuse(model, ValueError, r"rank is 6, expected at most 5", rank=6)
    refuse(model, ValueError, r"init_rank is 6, expected at most 5", rank=5, init_rank=6)
    patch_model(model, 5, hypernet="direct")  # init_rank is held to what the layer allows
    assert set(rank_pattern(model).values()) == {5}
