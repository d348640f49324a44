"""Initial directions out of the first steps' gradients (init="gradient")."""

import copy

import lifecycle
import models
import pytest
import torch
from training import adam, assert_equal, batches, state, train

import hal_kernels
from hal_kernels.nn.alignment import STEPS

HYPERNETS = ["direct", "bert"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    lifecycle.small_hypernets(monkeypatch)


def patched(hypernet="bert", *, dtype=torch.float64, **options):
    options = {"init_rank": 2, "seed": 0, "init": "gradient"} | options
    return hal_kernels.patch_model(
        models.net(dtype=dtype), 2, hypernet=hypernet, dtype=dtype, **options
    )


def frozen_head(model):
    """With its head fixed every step sees the same function, so gradients add up."""
    model.classifier.requires_grad_(False)
    return model


def weight_gradients(data):
    """Of the bare model's layers, summed over the batches."""
    bare = models.net(dtype=torch.float64)
    for inputs in data:
        models.loss_of(bare(**inputs)).backward()
    return {n: m.weight.grad for n, m in bare.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_directions_are_the_singular_vectors(hypernet):
    """Of a batch of two rows: gradients of rank two, which sketches hold without loss."""
    model = frozen_head(patched(hypernet))
    data = [models.batch(model, 2)] * STEPS
    train(model, adam(model), data)
    truth = weight_gradients(data)
    for name, f in hal_kernels.factors(model).items():
        u, values, vh = torch.linalg.svd(truth[name])
        assert values[2] < 1e-12 * values[0] < 1e-3 * values[1]
        q = f.q / f.q.norm(dim=-1, keepdim=True)
        # Up to a common sign; generated factors start exactly at their anchors. 1e-9: pinv.
        for i in range(2):
            p_i, q_i = f.p.t()[i], q[i]
            assert abs(float(p_i @ vh[i])) == pytest.approx(1.0, abs=1e-9)
            assert abs(float(q_i @ u[:, i])) == pytest.approx(1.0, abs=1e-9)
            assert float(q_i @ truth[name] @ p_i) < 0  # growing Λ lowers the loss


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_the_function_stays_as_it_is(hypernet):
    model = frozen_head(patched(hypernet, gamma=0.0))
    bare, inputs = models.net(dtype=torch.float64), models.batch(model)
    data = batches(model, STEPS)
    losses = train(model, adam(model, 1e-2), data)
    assert losses == [models.loss_of(bare(**batch)).item() for batch in data]
    model.eval()
    torch.testing.assert_close(
        models.logits_of(model(**inputs)), models.logits_of(bare(**inputs)), rtol=0, atol=0
    )


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_it_ends(hypernet):
    model = patched(hypernet)
    optimizer, data = adam(model), batches(model, STEPS + 1)
    before = state(model)
    train(model, optimizer, data[:STEPS])
    for name, rows in zip(model.hal._names, model.hal.packed().tensors(), strict=True):
        assert name == "lam" or not torch.equal(rows, before[f"hal.{name}"])
        if hypernet != "direct":
            assert torch.equal(rows, getattr(model.hal, f"anchor_{name}"))
    assert not model.hal.lam.any() and model.hal.steps == STEPS
    train(model, optimizer, data[STEPS:])
    assert all(f.lam.any() for f in hal_kernels.factors(model).values())


@pytest.mark.parametrize("count, size", [(2, 4), (8, 1)])
def test_micro_batches_add_up(count, size):
    whole, parts = patched(), patched()
    inputs = models.batch(whole, 8)
    for model, n, m in ((whole, 1, 8), (parts, count, size)):
        optimizer = adam(model)
        for i in range(n):
            rows = {k: v[i * m : (i + 1) * m] for k, v in inputs.items()}
            (models.loss_of(model(**rows)) / n).backward()
        optimizer.step()
    for one, other in zip(whole.hal._alignment.sums, parts.hal._alignment.sums, strict=True):
        # float64 sums in another order
        assert float((one - other).norm()) <= 1e-12 * float(one.norm())


@pytest.mark.parametrize("at", range(1, STEPS + 1))
@pytest.mark.parametrize("patched_before", [False, True])
def test_resumed_in_the_middle(at, patched_before, tmp_path):
    model = patched(dtype=torch.float32)
    optimizer, data = adam(model), batches(model, STEPS + 2)
    train(model, optimizer, data[:at])
    hal_kernels.save_adapter(model, tmp_path)
    resumed = patched(dtype=torch.float32, seed=5) if patched_before else models.net()
    hal_kernels.load_adapter(resumed, tmp_path)
    other = adam(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[at:])
    train(resumed, other, data[at:])
    assert_equal(state(resumed), state(model))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_directions_in_use_are_kept(hypernet, tmp_path):
    """Λ that was loaded without the step counter, say, makes P and Q count from the first step."""
    model, start = patched(hypernet), patched(hypernet)
    for each in (model, start):
        lifecycle.stir(each)
    before = lifecycle.predict(start)
    train(model, torch.optim.SGD(model.hal.parameters(), lr=0.0), batches(model, 2))
    if hypernet == "direct":
        torch.testing.assert_close(lifecycle.predict(model), before, rtol=0, atol=0)
    assert model.hal._alignment is None and model.hal.get_extra_state().tolist() == [2]
    hal_kernels.save_adapter(model, tmp_path)  # at a step that others look in
    resumed = hal_kernels.load_adapter(models.net(dtype=torch.float64), tmp_path)
    assert resumed.hal._alignment is None
    assert_equal(state(resumed), state(model))


def test_a_foreign_extra_state_is_refused():
    model = patched()
    with pytest.raises(ValueError, match="_extra_state has 4 numbers"):
        model.hal.set_extra_state(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert model.hal.steps == 0


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_copies_go_on_alike(hypernet):
    model = patched(hypernet)
    data = batches(model, STEPS + 1)
    train(model, adam(model), data[:2])
    twin = copy.deepcopy(model).to(torch.float64)
    for each in (model, twin):
        train(each, torch.optim.SGD(each.hal.parameters(), lr=0.0), data[2:])
    assert_equal(state(twin), state(model))


@pytest.mark.filterwarnings("ignore:hal_kernels. an optimizer step is left out")
def test_a_step_with_nan_is_looked_at_by_nobody():
    model, twin = patched(dtype=torch.float32), patched(dtype=torch.float32)
    data = batches(model, STEPS)
    spoilt = data[0] | {"x": torch.full_like(data[0]["x"], torch.nan)}
    train(twin, adam(twin), data)
    train(model, adam(model), [spoilt, *data])
    assert model.hal.steps == STEPS
    assert_equal(state(model), state(twin))


def test_nan_that_is_not_skipped_leaves_random_directions():
    model = patched(dtype=torch.float32, skip_nonfinite=False)
    before = state(model)
    inputs = models.batch(model)
    optimizer = torch.optim.SGD(model.hal.parameters(), lr=0.0)
    train(model, optimizer, [inputs | {"x": torch.full_like(inputs["x"], torch.nan)}] * STEPS)
    assert torch.equal(model.hal.p_16, before["hal.p_16"])


@pytest.mark.parametrize("interval, steps", [(1, 0), (2, 1), (100, STEPS)])
def test_it_is_over_before_ranks_are_allocated(interval, steps):
    model = patched(init_rank=4, interval=interval)
    found = 0
    while model.hal._alignment is not None:
        found += 1
        train(model, adam(model), batches(model, 1))
    assert found == steps and model.hal.mask.all()


def test_the_penalty_counts_and_moves_nothing():
    model = patched(gamma=0.5)
    hal_kernels.penalty(model).backward()
    assert all(not p.grad.any() for p in model.hal.parameters() if p.grad is not None)
    assert hal_kernels.penalty(model).item() > 0


def test_every_parameter_has_a_gradient():
    """Of zero, but there: DistributedDataParallel waits for all of them."""
    for hypernet in HYPERNETS:
        model = patched(hypernet)
        models.loss_of(model(**models.batch(model))).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.hal.parameters())


@pytest.mark.parametrize("update", ["replace", "residual"])
def test_other_rules_start_at_random(update):
    assert patched(init=None, update=update).hal._alignment is None
    assert patched("direct", init=None).hal._alignment is None
    assert patched(init=None).hal._alignment is not None
    if update == "replace":
        with pytest.raises(ValueError, match="init is 'gradient'"):
            patched(update=update)
