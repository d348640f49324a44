"""Base models that bitsandbytes and torchao hold quantized."""

import models
import peft
import pytest
import torch
from torch import nn

import hal_kernels

from . import zoo

LLAMA = zoo.BY_NAME["llama"]


class Doubled(torch.Tensor):
    """A weight that only its own F.linear reads rightly, as torchao's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        x, weight, *bias = args
        return 2 * func(x, weight.as_subclass(torch.Tensor), *bias)


def test_any_tensor_subclass_keeps_its_own_forward():
    """q, k and v too, which would compute as one."""
    base = LLAMA.base()
    for name, layer in base.named_modules():
        if name.endswith("_proj"):
            weight = layer.weight.detach().as_subclass(Doubled)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    inputs = models.batch(base)
    expected = zoo.logits(base, inputs)
    assert zoo.relative_error(expected, zoo.logits(LLAMA.base(), inputs)) > 0.01
    model = peft.get_peft_model(base, LLAMA.config())
    assert torch.equal(zoo.logits(model, inputs), expected)
    with pytest.raises(ValueError, match="weight of a Linear can't take ΔW; export_lora"):
        model.merge_adapter()


def test_merge_of_plain_layers_beside_quantized_ones():
    ao = pytest.importorskip("torchao.quantization")
    model = models.net()
    ao.quantize_(model.up, ao.Int8WeightOnlyConfig())
    hal_kernels.patch_model(model, 2, hypernet="direct", targets=["down.0", "down.1"])
    model.hal.lam.data.normal_()
    model.hal.forget()
    inputs = models.batch(model)
    expected = zoo.logits(model, inputs)
    merged = zoo.logits(hal_kernels.merge(model), inputs)
    assert zoo.relative_error(merged, expected) < 2e-5  # as of all merges in float32
