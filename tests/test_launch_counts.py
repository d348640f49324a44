"""Per-step work over all layers is a constant number of torch calls, however many there are."""

import pytest
import torch
from ops.util import count_calls
from torch import nn
from training import trainable

import hal_kernels

DEPTHS = (2, 12, 48)
WIDTH = 16

pytestmark = pytest.mark.usefixtures("small_hypernets")


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def patched(depth, hypernet, method, schedule, norm_first=False):
    cubic = {"schedule": "cubic", "total_step": 9} if schedule == "cubic" else {}
    model = hal_kernels.patch_model(
        Deep(depth), 2, init_rank=4, hypernet=hypernet, allocation=method, interval=1, seed=0,
        norm_first=norm_first, **cubic,
    )  # fmt: skip
    step(model)
    return model


def step(model):
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    model(torch.ones(2, WIDTH)).backward()
    optimizer.step()
    optimizer.zero_grad()


def counts(model):
    """Torch calls of each part of a step, those inside of operators included."""
    adapter, found = model.hal, {}
    found["generation"] = count_calls(adapter.open_forward)
    outputs = [t for t in adapter._pass.live.effective.tensors() if t.requires_grad]
    adapter.close_forward()
    found["penalty"] = count_calls(lambda: hal_kernels.penalty(model))
    loss = hal_kernels.penalty(model)
    found["backward of the penalty"] = count_calls(loss.backward)
    ones = [torch.ones_like(t) for t in outputs]
    found["backward of the generation"] = count_calls(
        lambda: torch.autograd.backward(outputs, ones)
    )
    model.zero_grad()
    with torch.no_grad():
        found["generation without gradients"] = count_calls(adapter.open_forward)
        adapter.close_forward()

    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    model(torch.ones(2, WIDTH)).backward()
    found["check for NaN"] = count_calls(lambda: adapter.before_optimizer_step(optimizer))
    steps, mask = adapter.steps, adapter.mask.clone()
    found["advance and allocation"] = count_calls(adapter.after_optimizer_step)
    assert adapter.steps == steps + 1
    assert not torch.equal(adapter.mask, mask), "no allocation: nothing was counted"
    return found


@pytest.mark.parametrize("schedule", ["fixed", "cubic"])
@pytest.mark.parametrize("method", ["sensitivity", "ema", "magnitude"])
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_counts_do_not_grow_with_depth(hypernet, method, schedule):
    found = {depth: counts(patched(depth, hypernet, method, schedule)) for depth in DEPTHS}
    assert found[12] == found[2]
    assert found[48] == found[2]
    assert found[2]["advance and allocation"] > 0
    print(hypernet, method, schedule, found[2])  # pytest -s shows it


def test_norm_first_costs_as_many_calls():
    """The same sums, products and LayerNorms in another order, however many layers."""
    few, many, after = (
        counts(patched(depth, "bert", "sensitivity", "fixed", norm_first))
        for depth, norm_first in ((2, True), (12, True), (12, False))
    )
    assert many == few
    assert many["generation"] <= after["generation"]
    assert many["backward of the generation"] <= after["backward of the generation"]


@pytest.mark.parametrize("hypernet, depths", [("mlp", (2, 12)), ("cnn", (1, 3))])
def test_other_architectures(hypernet, depths):
    few, many = (counts(patched(depth, hypernet, "sensitivity", "fixed")) for depth in depths)
    assert many == few


def test_the_instrument_counts():
    x = [torch.ones(2) for _ in range(5)]
    assert count_calls(lambda: [t + 1 for t in x]) == 5
    assert count_calls(lambda: torch._foreach_add(x, 1)) == 1
