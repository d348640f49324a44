"""factors, rank_pattern, penalty and step: what an adapter tells, and foreign optimizers."""

import models
import pytest
import torch
from lifecycle import HYPERNETS, patched, predict, prune, prune_layer
from torch import nn
from torch.nn import functional as F
from training import adam, assert_equal, batches, state, train, trainable

import hal_kernels
from hal_kernels import factors, penalty, rank_pattern, step

pytestmark = pytest.mark.usefixtures("small_hypernets")


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypernet", "update"),
    [(None, "spectral"), ("direct", "anchor"), ("bert", "anchor"), ("bert", "replace"),
     ("mlp", "residual"), ("cnn", "replace")],
)  # fmt: skip
def test_factors_are_what_the_layers_compute_with(hypernet, update):
    model = patched(models.net(dtype=torch.float64), dtype=torch.float64, hypernet=hypernet,
                    update=update, init_rank=3, interval=1)  # fmt: skip
    train(model, adam(model, 1e-3), batches(model, 2))
    found = factors(model)
    assert list(found) == ["up.0", "up.1", "down.0", "down.1"]
    hidden = {}
    for name in found:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, a, y, n=name: hidden.update({n: (a[0], y)}))
    predict(model)
    for name, f in found.items():
        d_out, d_in = model.get_submodule(name).weight.shape
        assert f.p.shape == (d_in, 3) and f.q.shape == (3, d_out)
        assert f.lam.shape == f.mask.shape == (3,) and f.scaling == 4.0
        assert not any(t.requires_grad for t in f[:4])
        explicit = f.scaling * torch.einsum("ro,r,ir->oi", f.q, f.lam * f.mask, f.p)
        torch.testing.assert_close(f.delta(), explicit, rtol=1e-12, atol=1e-12)
        x, y = hidden[name]
        layer = model.get_submodule(name)
        expected = F.linear(x, layer.weight + f.delta(), layer.bias)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert not all(f.mask.all() for f in found.values())


def test_direct_factors_can_be_set_in_place():
    model = patched()
    f = factors(model)["down.0"]
    before = predict(model)
    f.lam.zero_()
    others = {n: g.lam.clone() for n, g in factors(model).items()}
    assert not others.pop("down.0").any() and all(lam.any() for lam in others.values())
    assert not torch.equal(predict(model), before)


@pytest.mark.parametrize(
    ("hypernet", "name"), [("direct", "lam"), ("bert", "hypernet.lam_out.weight")]
)
def test_changes_by_hand_are_seen_at_once(hypernet, name):
    """Averaged weights copied in: no step and no forward with gradients between."""
    model, x = patched(hypernet=hypernet), torch.randn(3, 16)

    def views():
        with torch.no_grad():  # the model's forward, one layer called by itself, the factors
            return predict(model), model.up[0](x), factors(model)["up.0"].delta()

    before = views()
    with torch.no_grad():
        model.hal.get_parameter(name).mul_(0.5)
    assert not any(map(torch.equal, before, views()))


# -- rank_pattern ----------------------------------------------------------------------------------


def test_rank_pattern_counts_the_directions_kept():
    model = patched(init_rank=3)
    assert rank_pattern(model) == {"up.0": 3, "up.1": 3, "down.0": 3, "down.1": 3}
    prune(model, 1, 4)
    prune_layer(model, "down.0")
    expected = {"up.0": 2, "up.1": 2, "down.0": 0, "down.1": 3}
    assert rank_pattern(model) == expected
    assert all(type(rank) is int for rank in rank_pattern(model).values())
    hal_kernels.compact(model)
    assert rank_pattern(model) == expected


# -- summary ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rate", "moments"),
    [({}, "0.001", 1), ({"hypernet": "direct"}, "0.01", 2), ({"hypernet": "mlp"}, "0.0001", 2)],
)
def test_summary_says_what_a_run_will_take(options, rate, moments):
    model = hal_kernels.patch_model(models.net(), rank=2, init_rank=3, total_step=6, **options)
    said = dict(line.split(maxsplit=1) for line in hal_kernels.summary(model).splitlines())
    count, total = (sum(p.numel() for p in ps) for ps in (trainable(model), model.parameters()))
    assert said["adapted"] == "layers   4"
    share = f"{100 * count / total:.2f}"
    assert said["trained"] == f"{count:,} of {total:,} parameters ({share} %)"
    assert said["rank"].endswith("12 directions at first, 8 from step 4 on")
    assert said["learning"].endswith(f"{rate} to start with")
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, 1))
    kept = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    kept += [t for name, t in model.hal.named_buffers() if name.startswith("momentum_")]
    size = sum(t.numel() * t.element_size() for t in kept)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert size == 4 * (moments * count + (2 - moments) * head)
    assert said["memory"].endswith(f"{size / 1e6:.3g} MB of optimizer state (Adam)")


def test_summary_of_a_language_model_whose_ranks_stay():
    model = hal_kernels.patch_model(models.llama(), rank=2, init_rank=2)
    said = hal_kernels.summary(nn.Sequential(model))
    assert "28 directions, fixed" in said and "0.001 to start with" in said


# -- penalty ---------------------------------------------------------------------------------------


def reference_penalty(model, kind):
    terms = []
    for f in factors(model).values():
        one = torch.eye(f.lam.shape[0], dtype=f.lam.dtype)
        terms += [torch.linalg.norm(m - one) for m in (f.p.t() @ f.p, f.q @ f.q.t())]
    terms = torch.stack(terms)
    return terms.square().sum() / (len(terms) / 2) if kind == "squared" else terms.mean()


@pytest.mark.parametrize("kind", ["squared", "frobenius"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_penalty_is_the_formula(kind, hypernet):
    model = patched(models.net(dtype=torch.float64), dtype=torch.float64, hypernet=hypernet,
                    penalty=kind, gamma=0.3)  # fmt: skip
    found, expected = penalty(model), 0.3 * reference_penalty(model, kind)
    assert found.dim() == 0 and found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(penalty(model), expected, rtol=1e-10, atol=0)
    with hal_kernels.disabled(model):
        torch.testing.assert_close(penalty(model), expected, rtol=1e-10, atol=0)


def test_penalty_alone_orthogonalises():
    model = patched(gamma=1.0)
    optimizer = torch.optim.Adam(model.hal.parameters(), lr=0.02)
    start = penalty(model).item()
    for _ in range(60):
        penalty(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert penalty(model).item() < 0.05 * start


# -- step ------------------------------------------------------------------------------------------


def sgd_by_hand(model, lr):
    """An optimizer that is not torch's."""
    with torch.no_grad():
        for parameter in trainable(model):
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-lr)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_step_for_a_foreign_optimizer(hypernet):
    options = {"hypernet": hypernet, "init_rank": 3, "interval": 2, "allocation": "ema"}
    model, twin = patched(**options), patched(**options)
    data = batches(model, 5)
    for inputs in data:
        models.loss_of(model(**inputs)).backward()
        sgd_by_hand(model, 1e-3)
        step(model)
        model.zero_grad()
    train(twin, torch.optim.SGD(trainable(twin), lr=1e-3), data)
    assert model.hal.steps == 5 and not model.hal.mask.all()
    assert_equal(state(model), state(twin))


@pytest.mark.filterwarnings("ignore:hal_kernels. an optimizer step is left out")
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_step_without_gradients_or_with_bad_ones_does_nothing(hypernet):
    model = patched(hypernet=hypernet, init_rank=3, interval=1)
    before = state(model)
    step(model)
    assert_equal(state(model), before)
    models.loss_of(model(**models.batch(model))).backward()
    next(model.hal.parameters()).grad.fill_(float("nan"))
    step(model)
    assert_equal(state(model), before)
    assert model.hal.steps == 0
