"""bench.hyper_peft: PEFT's layers with A and B of hypernetworks, which alone are trained."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from bench import models
from bench.methods import HYPER_PEFT, Method

pytestmark = pytest.mark.usefixtures("small_hypernets")
CPU, STEPS = torch.device("cpu"), 6
BASE = models.roberta_base(layers=2, width=64, vocabulary=80, length=64)
ROWS = {"input_ids": torch.arange(5, 37).view(4, 8), "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture
def method(request):
    return Method(request.param, BASE.build(CPU), BASE, CPU, lr=1e-3)


each = pytest.mark.parametrize("method", HYPER_PEFT, indirect=True)


def layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


@each
def test_it_starts_as_the_base_model(method):
    base = BASE.build(CPU).eval()
    with torch.no_grad():
        found, expected = method.model.eval()(**ROWS), base(**ROWS)
    # DoRA divides by norms that it multiplies by
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


@each
def test_every_trained_parameter_gets_a_gradient_and_no_other(method, monkeypatch):
    names = {n for n, p in method.model.named_parameters() if p.requires_grad}
    generated = {n for n in names if n.startswith("factors.")}
    magnitudes = {n for n in names if "lora_magnitude_vector" in n}
    assert len(magnitudes) == (len(layers(method.model)) if method.name == "hyper-dora" else 0)
    assert generated and all(".classifier." in n for n in names - generated - magnitudes)
    assert not any("lora_A" in n or "lora_B" in n for n, _ in method.model.named_parameters())
    for _ in range(2):  # B leaves zero, then A's output projection
        method.step(ROWS)
    monkeypatch.setattr(method.optimizer, "zero_grad", lambda: None)
    method.step(ROWS)
    for name, parameter in method.model.named_parameters():
        if name in names:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@each
def test_the_loss_falls_and_directions_part(method):
    losses = []
    for _ in range(STEPS):
        method.step(ROWS)
        losses.append(torch.nn.functional.cross_entropy(method.logits, ROWS["labels"]))
    assert losses[-1] < losses[0]
    for layer in layers(method.model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        linear = layer.get_base_layer()
        assert a.shape == (3, linear.in_features) and b.shape == (linear.out_features, 3)
        assert a.isfinite().all() and b.isfinite().all()
        assert torch.linalg.matrix_rank(b) == 3  # B's rows were equal at the start


@each
def test_each_step_generates_once_from_what_the_last_one_gave(method):
    seen, given = [], []
    factors = method.model.factors
    factors.inputs[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    factors.register_forward_hook(lambda m, args, made: given.append(made[0].detach()))
    for _ in range(STEPS):
        method.step(ROWS)
    method.model.eval()
    with torch.no_grad():
        outer = method.model(**ROWS).logits
        # as generate() calls it, past the whole model's hooks
        inner = method.model.get_base_model()(**ROWS).logits
    assert len(seen) == STEPS + 2 and torch.equal(inner, outer)
    assert torch.equal(seen[0], factors.initial_0) and torch.equal(seen[-2], seen[-1])
    for taken, before in zip(seen[1:-1], given, strict=False):
        assert torch.equal(taken, before)
    assert not torch.equal(given[STEPS - 1], given[0])
