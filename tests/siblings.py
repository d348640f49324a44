"""An attention whose q, k and v read one input, and what it computes with and without a group."""

import copy

import torch
from ops.util import CountCalls, relative_error
from torch import nn
from training import trainable

import hal_kernels

WIDTH = 16
SAME = 1e-13  # float64: sums in another order


class Attention(nn.Module):
    """q, k and v of one input, unless `reads` says what each of them is called with."""

    def __init__(self, names=("query", "key", "value"), widths=(WIDTH, WIDTH, WIDTH)):
        super().__init__()
        self.names = names
        for name, width in zip(names, widths, strict=True):
            setattr(self, name, nn.Linear(WIDTH, width, bias=name != names[1]))
        self.reads = None

    def forward(self, x):
        if self.reads is not None:
            return self.reads(self, x)
        return torch.cat([getattr(self, name)(x).tanh() for name in self.names], -1)


def patched(module=None, **options):
    """A patched model in float64 whose Λ is not zero, so that the adapters compute something."""
    torch.manual_seed(0)
    model = (Attention() if module is None else module).double()
    options = {"hypernet": "direct", "gamma": 0.0, "dtype": torch.float64, **options}
    hal_kernels.patch_model(model, 2, seed=0, modules_to_save=(), **options)
    with torch.no_grad():
        model.hal.lam.copy_(torch.rand_like(model.hal.lam) + 0.5)
        if model.hal.config.hypernet != "direct" and model.hal.config.update == "anchor":
            model.hal.anchor_lam.copy_(model.hal.lam)
    return model


def groups_of(model):
    slots = (layer._hal for layer in model.modules() if getattr(layer, "_hal", None) is not None)
    return list({id(s.shared_input): s.shared_input for s in slots if s.shared_input}.values())


def alone(model):
    """The same model with every layer by itself."""
    twin = copy.deepcopy(model)
    for group in groups_of(twin):
        group.given_up = True
    return twin


def outcome(model, x):
    """Output, gradients of x and of every parameter, and how often each operator was called."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with CountCalls() as counter:
        out = model(x)
    grads = torch.autograd.grad(
        out.square().sum(), [x, *trainable(model)], allow_unused=True, materialize_grads=True
    )
    return [out.detach(), *grads], set(counter.operators)


def assert_computes(model, x, *, together):
    """`model` gives what it gives with every layer by itself; whether a group was computed."""
    twin = alone(model)
    out, operators = outcome(model, x)
    ref, single = outcome(twin, x)
    assert "svd_linear_group" not in single
    assert ("svd_linear_group" in operators) is together
    for one, other in zip(out, ref, strict=True):
        assert relative_error(one, other) <= SAME


def x_of(*leading):
    torch.manual_seed(1)
    return torch.randn(*(leading or (3, 5)), WIDTH, dtype=torch.float64)


def step(model):
    """What an optimizer step tells the adapter: no pass and no graph is left."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    model(x_of()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
