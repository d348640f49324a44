"""compact: the same function from smaller factors, and training that goes on."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict, prune, prune_layer, unchanged
from training import adam, batches, kept, train, trainable

import hal_kernels
from hal_kernels import compact, factors, rank_pattern

# Λ, P and Q per direction of a Net: two layers 16 -> 24 and two 24 -> 16.
PER_DIRECTION = 16 + 24 + 1

SCHEDULES = {
    # 4 layers of rank 3, budget 2: two directions after two steps, the other two after four
    "partly": ({"interval": 2, "prune_per_interval": 2}, 3, 10),
    "fixed": ({"interval": 2, "prune_per_interval": 2}, 4, 8),
    "cubic": ({"schedule": "cubic", "interval": 2, "total_step": 6, "tfinal": 1}, 6, 8),
}

pytestmark = pytest.mark.usefixtures("small_hypernets")


def trained(schedule, **options):
    """A model after some steps of a schedule, its optimizer, and the directions it keeps."""
    schedule_options, steps, left = SCHEDULES[schedule]
    options = {"init_rank": 3} | schedule_options | options
    dtype = options.get("dtype", torch.float32)
    model = patched(models.net(dtype=dtype), **options)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, steps))
    assert sum(kept(model)) == left
    return model, optimizer, left


# -- the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "hypernet", "update"),
    [
        ("partly", None, "spectral"), ("cubic", None, "spectral"), ("fixed", "direct", "anchor"),
        ("cubic", "direct", "anchor"), ("partly", "bert", "anchor"), ("cubic", "bert", "replace"),
        ("fixed", "bert", "residual"), ("partly", "mlp", "residual"), ("fixed", "cnn", "replace"),
    ],
)  # fmt: skip
def test_same_function(schedule, hypernet, update):
    model, _, left = trained(schedule, hypernet=hypernet, update=update, dtype=torch.float64)
    before, ranks, expected = factors(model), rank_pattern(model), predict(model)
    assert compact(model) is model
    # Sums over directions run in another order and attention over shorter rows: float64 roundings.
    assert (predict(model) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert rank_pattern(model) == ranks == {n: len(f.lam) for n, f in factors(model).items()}
    for name, f in factors(model).items():
        mask = before[name].mask > 0
        torch.testing.assert_close(f.p, before[name].p[:, mask], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(f.q, before[name].q[mask], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(f.lam, before[name].lam[mask], rtol=1e-10, atol=1e-12)
    assert sum(f.p.numel() + f.lam.numel() + f.q.numel() for f in factors(model).values()) == (
        left * PER_DIRECTION
    )
    stored = model.hal.packed().tensors()
    assert sum(t.numel() for t in stored) == left * PER_DIRECTION
    assert model.hal.mask.shape == (left,)


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_a_layer_that_keeps_nothing(hypernet):
    model = patched(models.net(dtype=torch.float64), hypernet=hypernet, dtype=torch.float64)
    prune_layer(model, "up.1")
    expected = predict(model)
    compact(model)
    assert rank_pattern(model)["up.1"] == 0 and "rank=0" in repr(model.up[1])
    torch.testing.assert_close(predict(model), expected, rtol=1e-12, atol=1e-12)
    assert factors(model)["up.1"].p.shape == (16, 0)
    assert not factors(model)["up.1"].delta().any()
    train(model, adam(model), batches(model, 3))
    x = torch.randn(4, 16, dtype=torch.float64)
    base = torch.nn.functional.linear(x, model.up[1].weight, model.up[1].bias)
    assert torch.equal(model.up[1](x), base)


def test_a_width_that_no_layer_keeps():
    model = patched(models.net(dtype=torch.float64), dtype=torch.float64, targets=["0"])
    prune_layer(model, "up.0")
    expected = predict(model)
    compact(model)
    assert model.hal.p_16.shape == (0, 16) and model.hal.q_24.shape == (0, 24)
    torch.testing.assert_close(predict(model), expected, rtol=1e-12, atol=1e-12)
    train(model, adam(model), batches(model, 3))
    assert model.hal.steps == 3


def test_merge_and_unmerge_after_it():
    model, *_ = trained("fixed", dtype=torch.float64)
    expected = predict(compact(model))
    with unchanged(model):
        hal_kernels.merge(model)
        torch.testing.assert_close(predict(model), expected, rtol=1e-12, atol=1e-12)
        hal_kernels.unmerge(model)


def test_nothing_pruned_nothing_changed():
    model = patched(init_rank=3)
    train(model, adam(model), batches(model, 2))
    with unchanged(model):
        assert compact(model) is model


def test_twice():
    model, optimizer, _ = trained("partly", dtype=torch.float64)
    compact(model)
    with unchanged(model):
        compact(model)
    assert model.hal.mask.shape == (10,)
    train(model, optimizer, batches(model, 3))  # past the second allocation
    assert sum(kept(model)) == 8
    expected = predict(model)
    compact(model)
    assert model.hal.mask.shape == (8,)
    torch.testing.assert_close(predict(model), expected, rtol=1e-12, atol=1e-12)


# -- optimizer and training ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimizer_state_is_cut_to_the_rows_kept(kind):
    model = patched(init_rank=3, interval=2, prune_per_interval=4)
    momentum = {} if kind is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = kind(trainable(model), lr=1e-3, **momentum)
    train(model, optimizer, batches(model, 3))
    adapter = model.hal
    mask = adapter.mask > 0
    rows = {"lam": mask}
    for side, groups, order in (
        ("p", adapter.layout.p.groups, adapter.rows_p),
        ("q", adapter.layout.q.groups, adapter.rows_q),
    ):
        parts = mask[order].split([group.rows for group in groups])
        rows |= {f"{side}_{g.width}": part for g, part in zip(groups, parts, strict=True)}
    assert rows.keys() == dict(adapter.named_parameters()).keys()
    values = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    moments = {n: copy.deepcopy(optimizer.state[p]) for n, p in adapter.named_parameters()}
    head = copy.deepcopy(optimizer.state[model.classifier.weight])
    objects = dict(model.named_parameters())
    compact(model)
    assert all(p is objects[n] for n, p in model.named_parameters())
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, values[name][rows[name]])
        for key, old in moments[name].items():
            new = optimizer.state[parameter][key]
            whole = torch.is_tensor(old) and old.shape == values[name].shape
            assert torch.equal(new, old[rows[name]]) if whole else new == old, (name, key)
    for key, value in head.items():
        assert value is None or torch.equal(optimizer.state[model.classifier.weight][key], value)


def test_optimizer_that_only_loaded_its_state():
    """A resumed run: the optimizer has the state of a run before and has not stepped yet."""
    model, optimizer, _ = trained("fixed")
    resumed = copy.deepcopy(model)
    again = adam(resumed, 1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, resumed):
        compact(each)
    data = batches(model, 2)
    assert train(resumed, again, data) == train(model, optimizer, data)


@pytest.mark.parametrize(
    ("schedule", "hypernet"),
    [*((s, "direct") for s in SCHEDULES), *(("partly", h) for h in ("bert", "mlp", "cnn"))],
)
def test_training_goes_on_as_with_the_mask(schedule, hypernet):
    """A masked direction takes no part in the task loss, so gamma=0 makes both runs equal."""
    model, optimizer, _ = trained(schedule, hypernet=hypernet, dtype=torch.float64, gamma=0.0)
    twin = copy.deepcopy(model)
    other = adam(twin, 1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compact(model)
    data = batches(model, 6)
    expected = train(twin, other, data)
    torch.testing.assert_close(train(model, optimizer, data), expected, rtol=1e-10, atol=0)
    assert rank_pattern(model) == rank_pattern(twin) and sum(kept(model)) == 8
    for name, f in factors(model).items() if hypernet == "direct" else ():
        torch.testing.assert_close(f.delta(), factors(twin)[name].delta(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_training_with_penalty_and_scores_goes_on(hypernet):
    model, optimizer, left = trained("partly", hypernet=hypernet, allocation="ema", gamma=0.1)
    compact(model)
    for prefix in ("", "importance_", "uncertainty_"):
        assert model.hal.packed(prefix).lam.shape == (left,)
    train(model, optimizer, batches(model, 4))
    assert sum(kept(model)) == 8
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert torch.isfinite(predict(model)).all()


def test_gradients_are_cut_alike():
    model, optimizer, _ = trained("fixed")
    models.loss_of(model(**models.batch(model))).backward()
    expected = model.hal.lam.grad[model.hal.mask > 0].clone()
    compact(model)
    assert torch.equal(model.hal.lam.grad, expected)
    assert model.hal.p_16.grad.shape == model.hal.p_16.shape
    optimizer.step()


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_a_graph_from_before_stays_harmless(hypernet):
    """A user keeps the last loss in a variable: its graph holds accumulators of the old shapes."""
    model, optimizer, _ = trained("fixed", hypernet=hypernet)
    before = model(**models.batch(model))
    models.loss_of(before).backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    compact(model)
    train(model, optimizer, batches(model, 3))
    assert before["loss"].isfinite()


def test_a_copy_of_a_compacted_model():
    model, *_ = trained("fixed")
    twin = copy.deepcopy(compact(model))
    assert torch.equal(predict(twin), predict(model))
    train(twin, adam(twin), batches(twin, 2))


# -- refusals --------------------------------------------------------------------------------------


def test_everything_pruned():
    model = patched()
    prune(model, *range(12))
    with unchanged(model), pytest.raises(ValueError, match=r"compact: every direction is pruned"):
        compact(model)


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_cubic_before_its_last_allocation(hypernet):
    options = {"schedule": "cubic", "interval": 2, "total_step": 6, "tfinal": 1, "init_rank": 3}
    model = patched(hypernet=hypernet, **options)
    train(model, adam(model, 1e-3), batches(model, 4))
    assert sum(kept(model)) < 12
    message = r"cubic schedule is still allocating \(step 4 of 5\)"
    with unchanged(model), pytest.raises(ValueError, match=message):
        compact(model)
    train(model, adam(model, 1e-3), batches(model, 1))
    compact(model)
    assert model.hal.mask.shape == (8,)
