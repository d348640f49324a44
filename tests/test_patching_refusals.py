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


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = models.Net()
    refuse(model, ValueError, r"'up\.0' is on the meta device; load the weights before patching")


def test_cpu_and_meta_weights_are_refused():
    model = models.net()
    model.down[1].to("meta")
    refuse(model, ValueError, r"'down\.1' is on the meta device")


def test_several_devices_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = models.net()
    with FakeTensorMode():
        elsewhere = torch.empty(24, 16, device="cuda")
    model.up[1].weight = nn.Parameter(elsewhere, requires_grad=False)
    refuse(model, ValueError, r"several devices, \['cpu', 'cuda:0'\]")


def test_lazy_layer_is_refused():
    model = models.net()
    model.up[0] = nn.LazyLinear(24)
    message = r"'up\.0' .*LazyLinear|LazyLinear.*'up\.0'|'up\.0'.*(uninitialized|initialised)"
    with pytest.raises((TypeError, ValueError), match=message):
        patch_model(model, 2)


def test_forward_of_the_instance_is_refused():
    model = models.net()
    layer = model.down[0]
    layer.forward = lambda x: F.linear(x, layer.weight)
    refuse(model, ValueError, r"'down\.0' has a forward function of its own")


def test_patching_twice_is_refused():
    model = patched()
    refuse(model, ValueError, r"model is patched already \(up\.0 is adapted\)")


def test_a_part_of_a_patched_model_is_refused():
    model = patched()
    with unchanged(model):
        refuse(model.up, ValueError, r"model is patched already \(0 is adapted\)")


def test_a_model_that_holds_a_patched_part_is_refused():
    refuse(models.Holder(part=patched()), ValueError, r"patched already \(part\.up\.0 is adapted\)")


def test_attribute_in_the_way_is_refused():
    model = models.net()
    model.hal = 3
    refuse(model, ValueError, r"model has an attribute 'hal'")


def test_rank_wider_than_a_layer_is_refused():
    model = models.net(hidden=5)
    refuse(model, ValueError, r"rank is 6, expected at most 5", rank=6)
    refuse(model, ValueError, r"init_rank is 6, expected at most 5", rank=5, init_rank=6)
    patch_model(model, 5, hypernet="direct")  # init_rank is held to what the layer allows
    assert set(rank_pattern(model).values()) == {5}
