"""What may not go wrong while training: dtypes, resume, bad gradients, odd loops, copies, caches.

Several of these are measured failures of PEFT's AdaLoRA.
"""

import contextlib
import copy
import io

import lifecycle
import models
import pytest
import torch
from torch import nn
from training import (
    adam,
    assert_close,
    assert_equal,
    batches,
    budget_used,
    gradients,
    kept,
    state,
    train,
    trainable,
)

import hal_kernels

HYPERNETS = ["direct", "bert"]
# Four layers of rank 4 -> 2: eight directions to prune, two at a time, at steps 2, 4, 6 and 8.
PRUNING = {"init_rank": 4, "interval": 2, "prune_per_interval": 2, "seed": 0}
LAST_ALLOCATION = 8
BUDGET = 2 * 4
CUBIC = {
    "init_rank": 4, "interval": 1, "schedule": "cubic", "tinit": 2, "tfinal": 3, "total_step": 12,
    "allocation": "ema", "seed": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    lifecycle.small_hypernets(monkeypatch)


def patched_net(hypernet, **options):
    return hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **(PRUNING | options))


def cross_entropy(output, labels):
    return nn.functional.cross_entropy(models.logits_of(output), labels)


# ---- dtypes of the base model ------------------------------------------------------------------


@pytest.mark.parametrize("hypernet", HYPERNETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base(hypernet, dtype):
    """Only the adapter and the modules trained in full train; every dtype is the one asked for."""
    model = models.bert(dtype=dtype)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "classifier" not in n}
    hal_kernels.patch_model(model, 2, hypernet=hypernet, interval=1, seed=0)
    for name, parameter in model.named_parameters():
        expected = name.startswith(("hal.", "classifier."))
        assert parameter.requires_grad == expected, name
        assert parameter.dtype == (torch.float32 if name.startswith("hal.") else dtype), name
    for name, buffer in model.hal.named_buffers():
        assert not buffer.requires_grad, name
        assert buffer.dtype in (torch.float32, torch.int64), name
    before = state(model)
    # no Adam: its epsilon of 1e-8 is zero in float16
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    losses = train(model, optimizer, batches(model, 3))
    assert torch.tensor(losses).isfinite().all()
    after = state(model)
    assert all(t.isfinite().all() for t in after.values())
    assert not torch.equal(after["hal.lam"], before["hal.lam"])
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter), f"{name} changed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factor_dtype(dtype):
    model = patched_net("direct", dtype=dtype)
    train(model, adam(model), batches(model, 2))
    assert {p.dtype for p in model.hal.parameters()} == {dtype}
    assert model.hal.mask.dtype == dtype


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_autocast_training(hypernet):
    """Mixed precision over a float32 model: the adapter's own arithmetic stays in float32."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    for inputs in batches(model, 3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = models.loss_of(model(**inputs))
        loss.backward()
        assert {p.grad.dtype for p in trainable(model)} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert model.hal.steps == 3


# ---- resume ------------------------------------------------------------------------------------


def resumed(model, optimizer, folder, *, into):
    """A fresh process's model and optimizer, from files alone."""
    hal_kernels.save_adapter(model, folder)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    fresh = models.net()
    if into == "patched":
        hypernet, allocation = model.hal.config.hypernet, model.hal.config.allocation
        options = {"hypernet": hypernet, "allocation": allocation, "seed": 9}
        hal_kernels.patch_model(fresh, 2, init_rank=4, **options)
    hal_kernels.load_adapter(fresh, folder)
    again = adam(fresh)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    return fresh, again


@pytest.mark.parametrize("into", ["plain", "patched"])
@pytest.mark.parametrize("compacted", [False, True], ids=["", "compact"])
@pytest.mark.parametrize("at", [1, 5, 10], ids=["before", "during", "after"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_resume_is_bitwise(hypernet, at, compacted, into, tmp_path):
    data = batches(models.net(), 13)

    def start():
        model = patched_net(hypernet)
        optimizer = adam(model)
        train(model, optimizer, data[:at])
        if compacted:
            hal_kernels.compact(model)
        return model, optimizer

    whole, optimizer = start()
    expected = train(whole, optimizer, data[at:])

    model, optimizer = resumed(*start(), tmp_path, into=into)
    assert model.hal.steps == at
    assert train(model, optimizer, data[at:]) == expected
    assert_equal(state(model), state(whole))
    assert budget_used(model) == BUDGET


@pytest.mark.parametrize("at", [1, 6, 10], ids=["before", "during", "after"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_resume_is_bitwise_under_cubic(hypernet, at, tmp_path):
    """Moving averages and masks that may still change come back too."""
    data = batches(models.net(), 13)
    whole = hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **CUBIC)
    expected = train(whole, adam(whole), data)

    model = hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **CUBIC)
    optimizer = adam(model)
    losses = train(model, optimizer, data[:at])
    resumed_model, resumed_optimizer = resumed(model, optimizer, tmp_path, into="plain")
    assert losses + train(resumed_model, resumed_optimizer, data[at:]) == expected
    assert_equal(state(resumed_model), state(whole))
    # saving left the first model as it was
    assert losses + train(model, optimizer, data[at:]) == expected


# ---- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CUBIC], ids=["fixed", "cubic"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_rank_equal_to_init_rank_prunes_nothing(hypernet, options):
    options = {"interval": 1, "seed": 0} | options | {"init_rank": 2}
    model = hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **options)
    train(model, adam(model), batches(model, 13))
    assert set(hal_kernels.rank_pattern(model).values()) == {2}
    assert model.hal.steps == 13


def test_init_rank_below_rank_is_an_error():
    model = models.net()
    with pytest.raises(ValueError, match="init_rank is 3, expected at least rank = 4"):
        hal_kernels.patch_model(model, 4, init_rank=3)
    assert not hasattr(model, "hal")
    assert all(p.requires_grad for p in model.parameters())


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_loaded_adapter_evaluates_with_labels(hypernet, with_gradients, tmp_path):
    model = hal_kernels.patch_model(models.bert(), 2, hypernet=hypernet, seed=0, gamma=10.0)
    train(model, adam(model), batches(model, 2))
    hal_kernels.save_adapter(model, tmp_path)

    loaded = hal_kernels.load_adapter(models.bert(), tmp_path).eval()
    inputs = models.batch(loaded)
    with torch.set_grad_enabled(with_gradients):
        output = loaded(**inputs)
    assert torch.equal(models.loss_of(output), cross_entropy(output, inputs["labels"]))
    assert torch.equal(models.logits_of(output), models.logits_of(model.eval()(**inputs)))

    training = models.loss_of(loaded.train()(**inputs))
    penalty = hal_kernels.penalty(loaded)
    assert penalty > 0.1, "the penalty is too small to be noticed"
    torch.testing.assert_close(training, models.loss_of(output) + penalty)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_no_grad_training_loss_has_no_penalty_graph(hypernet):
    """A loss computed under no_grad is a number to report: never more than the task's loss."""
    model = patched_net(hypernet, gamma=10.0)
    inputs = models.batch(model)
    with torch.no_grad():
        output = model(**inputs)
    assert torch.equal(models.loss_of(output), cross_entropy(output, inputs["labels"]))


@pytest.mark.parametrize("hypernet", HYPERNETS)
@pytest.mark.parametrize("make", [models.net, models.bert, models.llama, models.gpt2])
def test_eval_computes_what_training_computes(make, hypernet):
    """Without dropout, cached factors (no_grad) and generated ones (with a graph) are the same."""
    model = hal_kernels.patch_model(make(), 2, hypernet=hypernet, seed=0)
    train(model, adam(model), batches(model, 2))
    inputs = models.batch(model)
    training = models.logits_of(model(**inputs))
    with torch.no_grad():
        assert torch.equal(models.logits_of(model(**inputs)), training)
        assert torch.equal(models.logits_of(model.eval()(**inputs)), training)
    assert torch.equal(models.logits_of(model.eval()(**inputs)), training)
    with torch.inference_mode():  # sums in another order: layers that share an input run alone here
        torch.testing.assert_close(models.logits_of(model(**inputs)), training)


def in_place(parameter):
    with torch.no_grad():
        parameter.add_(0.1)


def data_swap(parameter):
    parameter.data = parameter.data + 0.1


def data_in_place(parameter):
    """The idiom of many moving-average helpers; autograd's version counter doesn't see it."""
    parameter.data.copy_(parameter.data + 0.1)


@pytest.mark.parametrize("change", [in_place, data_swap, data_in_place])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_no_grad_sees_changed_parameters(hypernet, change):
    """The factors that evaluation keeps between calls follow every parameter."""
    model = patched_net(hypernet)
    train(model, adam(model), batches(model, 1))
    inputs = models.batch(model)
    for parameter in model.hal.parameters():
        with torch.no_grad():
            model(**inputs)
        change(parameter)
        with torch.no_grad():
            cached = models.logits_of(model(**inputs))
        assert torch.equal(cached, models.logits_of(model(**inputs)))


@pytest.mark.parametrize("change", [in_place, data_swap])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodules_under_no_grad_see_changed_parameters(hypernet, change):
    """Called outside the model's forward they share factors that are kept between calls."""
    model = patched_net(hypernet)
    train(model, adam(model), batches(model, 1))
    x = models.batch(model)["x"]
    for parameter in model.hal.parameters():
        with torch.no_grad():
            model.features(x)
        change(parameter)
        with torch.no_grad():
            kept_factors = model.features(x)
        assert torch.equal(kept_factors, model.features(x))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_no_grad_sees_a_loaded_state_dict(hypernet):
    model, other = patched_net(hypernet), patched_net(hypernet, seed=1)
    train(other, adam(other), batches(other, 3))
    inputs = models.batch(model)
    with torch.no_grad():
        model(**inputs)
        model.load_state_dict(other.state_dict())
        assert torch.equal(models.logits_of(model(**inputs)), models.logits_of(other(**inputs)))
    assert model.hal.steps == 3


# ---- gradients that are NaN or Inf -------------------------------------------------------------


def poison_loss(value):
    """All gradients are NaN or Inf."""
    return lambda model, loss: loss * value


def poison_one(value):
    """One element of one gradient is; everything else is fine."""

    def poisoned(model, loss):
        parameter = trainable(model)[-1]
        handle = parameter.register_hook(lambda g: g.flatten().scatter(
            0, torch.tensor([0]), torch.tensor([value], dtype=g.dtype)).view_as(g))  # fmt: skip
        model.__dict__["_poison"] = handle
        return loss

    return poisoned


POISONS = {
    "nan": poison_loss(float("nan")),
    "inf": poison_loss(float("inf")),
    "one nan": poison_one(float("nan")),
    "one inf": poison_one(float("-inf")),
}


def step_once(model, optimizer, scaler, inputs, poison=None, set_to_none=True):
    loss = models.loss_of(model(**inputs))
    if poison is not None:
        loss = poison(model, loss)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=set_to_none)
    if "_poison" in model.__dict__:
        model.__dict__.pop("_poison").remove()
    return loss.item()


def gradient_scaler(used):
    # A power of two leaves every bit of the mantissa: losses can be compared exactly.
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6) if used else None


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("allocation", ["sensitivity", "ema"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_nonfinite_step_changes_nothing(hypernet, allocation, poison, scaled):
    """Not the factors, scores, masks, hypernetworks or moments; and pruning goes on after it."""
    model, clean = (patched_net(hypernet, allocation=allocation) for _ in range(2))
    optimizer, clean_optimizer = adam(model), adam(clean)
    scaler, clean_scaler = gradient_scaler(scaled), gradient_scaler(scaled)
    data = batches(model, LAST_ALLOCATION + 1)
    for index, inputs in enumerate(data):
        if index == 3:
            before = state(model)
            moments = copy.deepcopy(optimizer.state_dict())
            step_once(model, optimizer, scaler, models.batch(model, seed=99), POISONS[poison])
            assert_equal(state(model), before)
            for key, entry in optimizer.state_dict()["state"].items():
                assert_equal(entry, moments["state"][key])
            assert model.hal.steps == 3
            if scaled:  # what the scaler halved: its step must not show in what follows
                scaler.update(256.0)
        loss = step_once(model, optimizer, scaler, inputs)
        assert loss == step_once(clean, clean_optimizer, clean_scaler, inputs)
    assert_equal(state(model), state(clean))
    assert budget_used(model) == BUDGET


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_nonfinite_step_with_zeroed_gradients(hypernet, scaled):
    """zero_grad(set_to_none=False) leaves zeros instead of None: the next step counts as well."""
    model = patched_net(hypernet)
    optimizer, scaler = adam(model), gradient_scaler(scaled)
    for index, inputs in enumerate(batches(model, 4)):
        poison = POISONS["nan"] if index == 1 else None
        step_once(model, optimizer, scaler, inputs, poison, set_to_none=False)
    assert model.hal.steps == 3


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_nonfinite_micro_batch(hypernet):
    """One bad micro-batch spoils the sum: the whole optimizer step is left out."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    before = state(model)
    for index, inputs in enumerate(batches(model, 3)):
        loss = models.loss_of(model(**inputs)) / 3
        (loss * float("nan") if index == 1 else loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert_equal(state(model), before)
    assert model.hal.steps == 0
    train(model, optimizer, batches(model, 1))
    assert model.hal.steps == 1


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_nonfinite_step_with_two_optimizers(hypernet, first):
    """Parameters spread over two optimizers, stepped in either order: both leave it out."""
    model = patched_net(hypernet)
    parameters = list(model.hal.parameters())
    optimizers = [torch.optim.AdamW(parameters[:1]), torch.optim.AdamW(parameters[1:])]
    optimizers = optimizers[first:] + optimizers[:first]
    before = state(model)
    (models.loss_of(model(**models.batch(model))) * float("nan")).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_equal(state(model), before)
    assert model.hal.steps == 0


@pytest.mark.parametrize(
    ("hypernet", "allocation"),
    [("direct", "ema"), ("direct", "sensitivity"), ("bert", "sensitivity")],
)
def test_gradient_scaling_leaves_scores_alone(hypernet, allocation):
    """A scale that changes on the way (GradScaler's do) weighs no step's score more.

    Not so for averages with a hypernetwork, whose gradients no scaler sees (docs/method.md).
    """
    options = CUBIC | {"allocation": allocation, "init": "random"}  # sketches of it are scaled
    model, plain = (
        hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **options) for _ in range(2)
    )
    optimizer, plain_optimizer = adam(model), adam(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_factor=2.0, growth_interval=1)
    for inputs in batches(model, 12):
        step_once(model, optimizer, scaler, inputs)
        step_once(plain, plain_optimizer, None, inputs)
        # scales are powers of two and change no bit
        assert kept(model) == kept(plain)
        assert_equal(state(model), state(plain))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_skip_nonfinite_can_be_switched_off(hypernet):
    model = patched_net(hypernet, skip_nonfinite=False, init="random")
    optimizer = adam(model)
    step_once(model, optimizer, None, models.batch(model), POISONS["nan"])
    assert model.hal.steps == 1
    assert any(p.isnan().any() for p in model.hal.parameters())


def test_nonfinite_gradient_of_another_optimizer_is_not_ours():
    """A model that isn't patched trains next to a patched one as if that weren't there."""
    patched_net("direct")
    plain = models.net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    (models.loss_of(plain(**models.batch(plain))) * float("nan")).backward()
    optimizer.step()
    assert plain.classifier.weight.isnan().all()


# ---- odd loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("allocation", ["sensitivity", "ema", "magnitude"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_layer_unused_in_a_step(hypernet, allocation, gamma):
    """Mixture-of-experts models, layer drop: some layers see no tokens in some steps."""
    model = patched_net(hypernet, allocation=allocation, gamma=gamma)
    optimizer = adam(model)
    for index, inputs in enumerate(batches(model, LAST_ALLOCATION)):
        x = model.block(index % 2, inputs["x"])  # the other block sits this step out
        loss = nn.functional.cross_entropy(model.classifier(x), inputs["labels"])
        (loss + hal_kernels.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.hal.steps == index + 1
    assert budget_used(model) == BUDGET
    assert all(t.isfinite().all() for t in state(model).values())


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_unused_layer_inside_the_models_forward(hypernet):
    model = patched_net(hypernet, gamma=0.0)
    del model.up[1]  # the model's forward runs the first block only
    train(model, adam(model), batches(model, 3))
    assert model.hal.steps == 3


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_step_after_zero_grad(hypernet):
    """No gradients, no step: not for the factors, the counter, nor the ranks."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    train(model, optimizer, batches(model, 1))
    before = state(model)
    models.loss_of(model(**models.batch(model))).backward()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.step()
    assert_equal(state(model), before)
    assert model.hal.steps == 1
    train(model, optimizer, batches(model, 1))
    assert model.hal.steps == 2


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_optimizer_step_twice(hypernet):
    """The second step() is the optimizer's own business; the state advances once."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    models.loss_of(model(**models.batch(model))).backward()
    optimizer.step()
    advanced = {n: b.clone() for n, b in model.hal.named_buffers()}
    optimizer.step()
    assert model.hal.steps == 1
    assert_equal(dict(model.hal.named_buffers()), advanced)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_gradients_thrown_away(hypernet):
    """A backward pass whose gradients are dropped leaves no trace in the next step's scores."""
    model, clean = (patched_net(hypernet, allocation="ema") for _ in range(2))
    data = batches(model, 4)
    optimizer = adam(model)
    models.loss_of(model(**models.batch(model, seed=99))).backward()
    optimizer.zero_grad()
    assert train(model, optimizer, data) == train(clean, adam(clean), data)
    assert_equal(state(model), state(clean))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_evaluation_between_steps_leaves_no_trace(hypernet):
    model, clean = (patched_net(hypernet, allocation="ema") for _ in range(2))
    data = batches(model, 4)
    optimizer = adam(model)
    losses = []
    for inputs in data:
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                model.eval()(**models.batch(model, seed=99))
        model.train()
        losses += train(model, optimizer, [inputs])
    assert losses == train(clean, adam(clean), data)
    assert_equal(state(model), state(clean))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_exception_in_forward(hypernet):
    """An out-of-memory error or a keyboard interrupt in the model: the next step is as ever."""
    model, clean = (patched_net(hypernet) for _ in range(2))
    optimizer = adam(model)
    data = batches(model, 3)
    losses = []
    for inputs in data:
        with pytest.raises(ValueError, match="x has shape"):
            model(x=torch.zeros(2, 3))
        losses += train(model, optimizer, [inputs])
    assert losses == train(clean, adam(clean), data)
    assert_equal(state(model), state(clean))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_exception_in_a_pre_hook(hypernet):
    """A hook that runs before the adapter's and raises: the adapter's own never opened a pass."""
    model = patched_net(hypernet)
    broken = [True]

    def raise_once(module, args):
        if broken.pop():
            raise RuntimeError("not now")

    model.register_forward_pre_hook(raise_once, prepend=True)
    broken.append(False)
    with pytest.raises(RuntimeError, match="not now"):
        broken.append(True)
        model(**models.batch(model))
    broken[:] = [False] * 20
    clean = patched_net(hypernet)
    data = batches(model, 3)
    assert train(model, adam(model), data) == train(clean, adam(clean), data)
    x = data[0]["x"]
    with torch.no_grad():
        assert torch.equal(model.features(x), clean.features(x))


# ---- the state advances once per optimizer step ------------------------------------------------


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_one_advance_per_accumulated_step(hypernet):
    model = patched_net(hypernet)
    optimizer = adam(model)
    for index, inputs in enumerate(batches(model, 12)):
        models.loss_of(model(**inputs)).backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        assert model.hal.steps == (index + 1) // 3


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_one_advance_with_several_optimizers(hypernet, order):
    model, whole = patched_net(hypernet), patched_net(hypernet)
    adapter = list(model.hal.parameters())
    groups = [adapter[:2], adapter[2:], list(model.classifier.parameters())]
    optimizers = [torch.optim.SGD(group, lr=1e-3) for group in groups]
    data = batches(model, 5)
    for index, inputs in enumerate(data):
        models.loss_of(model(**inputs)).backward()
        for which in order:
            optimizers[which].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert model.hal.steps == index + 1
    if hypernet == "bert":
        train(whole, torch.optim.SGD(trainable(whole), lr=1e-3), data)
        assert_equal(state(model), state(whole))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_pruned_directions_stay_zero_with_several_optimizers(order):
    """P in one optimizer and Λ in another, stepped in either order."""
    model = patched_net("direct")
    adapter = list(model.hal.parameters())
    optimizers = [torch.optim.AdamW(group, lr=1e-2) for group in (adapter[:2], adapter[2:])]
    for inputs in batches(model, LAST_ALLOCATION + 1):
        models.loss_of(model(**inputs)).backward()
        for which in order:
            optimizers[which].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert budget_used(model) == BUDGET
    assert not model.hal.lam[model.hal.mask == 0].any()


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_optimizer_without_the_adapter(hypernet):
    """A step of an optimizer that holds none of the adapter's parameters isn't a step of it."""
    model = patched_net(hypernet)
    head = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    models.loss_of(model(**models.batch(model))).backward()
    head.step()
    assert model.hal.steps == 0


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_step_for_foreign_optimizers(hypernet):
    """An optimizer that torch's hooks don't see, and hal_kernels.step: the same run."""
    model, hooked = patched_net(hypernet), patched_net(hypernet)
    data = batches(model, LAST_ALLOCATION)
    for inputs in data:
        models.loss_of(model(**inputs)).backward()
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.sub_(parameter.grad, alpha=1e-3)
        hal_kernels.step(model)
        model.zero_grad()
    train(hooked, torch.optim.SGD(trainable(hooked), lr=1e-3), data)
    assert model.hal.steps == LAST_ALLOCATION
    assert_equal(state(model), state(hooked))


def test_step_after_a_noticed_step_does_nothing():
    model = patched_net("bert")
    optimizer = adam(model)
    models.loss_of(model(**models.batch(model))).backward()
    optimizer.step()
    before = state(model)
    hal_kernels.step(model)
    assert_equal(state(model), before)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_several_patched_models(hypernet):
    """Each follows its own optimizer; one optimizer may hold two of them."""
    first, second, third = (patched_net(hypernet, seed=index) for index in range(3))
    both = torch.optim.SGD([*trainable(first), *trainable(second)], lr=0.1)
    alone = torch.optim.SGD(trainable(third), lr=0.1)
    inputs = models.batch(first)
    loss = models.loss_of(first(**inputs)) + models.loss_of(second(**inputs))
    (loss + models.loss_of(third(**inputs))).backward()
    both.step()
    assert [m.hal.steps for m in (first, second, third)] == [1, 1, 0]
    alone.step()
    assert [m.hal.steps for m in (first, second, third)] == [1, 1, 1]


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hypernet", HYPERNETS)
@pytest.mark.parametrize("after", [0, 3])
def test_deepcopy_trains_independently(hypernet, after):
    model = patched_net(hypernet, allocation="ema")
    train(model, adam(model), batches(model, after))
    twin = copy.deepcopy(model)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    before = state(model)
    data = batches(model, LAST_ALLOCATION)
    losses = train(twin, adam(twin), data)
    assert twin.hal.steps == after + len(data)
    assert model.hal.steps == after
    assert_equal(state(model), before)
    assert train(model, adam(model), data) == losses
    assert_equal(state(model), state(twin))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_deepcopy_in_the_middle_of_a_step(hypernet):
    """Between forward and optimizer step, as a moving average of weights is often started."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    models.loss_of(model(**models.batch(model))).backward()
    twin = copy.deepcopy(model)
    optimizer.step()
    assert (model.hal.steps, twin.hal.steps) == (1, 0)
    twin.zero_grad()
    train(twin, adam(twin), batches(twin, 2))
    assert (model.hal.steps, twin.hal.steps) == (1, 2)


def test_dead_model_is_let_go():
    """Nothing global keeps a model, its adapter or a pass's graph alive."""
    import gc
    import weakref

    model = patched_net("bert")
    train(model, adam(model), batches(model, 1))
    loss = models.loss_of(model(**models.batch(model)))
    reference = weakref.ref(model.hal)
    del model, loss
    gc.collect()
    assert reference() is None


# ---- layers called outside the patched model's forward -----------------------------------------


def outside(model, inputs):
    """What model(**inputs) computes, from its parts, without the penalty."""
    x = model.features(inputs["x"])
    return nn.functional.cross_entropy(model.classifier(x), inputs["labels"])


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodules_train_like_the_whole(hypernet):
    model, whole = patched_net(hypernet), patched_net(hypernet)
    optimizer, whole_optimizer = adam(model), adam(whole)
    for inputs in batches(model, LAST_ALLOCATION):
        (outside(model, inputs) + hal_kernels.penalty(model)).backward()
        models.loss_of(whole(**inputs)).backward()
        # the order of sums differs: rounding errors of float32
        assert_close(gradients(model), gradients(whole), 1e-4)
        for m, o in ((model, optimizer), (whole, whole_optimizer)):
            for (_, p), q in zip(m.named_parameters(), whole.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()  # no drift apart
            o.step()
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        assert model.hal.steps == whole.hal.steps
    assert budget_used(model) == BUDGET


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodules_accumulate(hypernet):
    """One backward pass after another, in the same step."""
    model, whole = (
        hal_kernels.patch_model(
            models.net(dtype=torch.float64), 2, hypernet=hypernet, dtype=torch.float64, gamma=0.0,
            seed=0,
        )
        for _ in range(2)
    )  # fmt: skip
    for inputs in batches(model, 3):
        outside(model, inputs).backward()
        models.loss_of(whole(**inputs)).backward()
    assert_close(gradients(model), gradients(whole), 1e-12)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodules_two_forwards_before_two_backwards(hypernet):
    model = patched_net(hypernet)
    losses = [outside(model, inputs) for inputs in batches(model, 2)]
    for loss in losses:
        loss.backward()
    adam(model).step()
    assert model.hal.steps == 1


@pytest.mark.parametrize("gamma", [0.0, 3.0])
@pytest.mark.parametrize("penalty", ["squared", "frobenius"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_loss_outside_the_model(hypernet, penalty, gamma):
    """logits from the model, loss and hal_kernels.penalty outside: the built-in gradients."""
    options = {"hypernet": hypernet, "penalty": penalty, "gamma": gamma, "dtype": torch.float64}
    inside, model = (
        hal_kernels.patch_model(models.bert(dtype=torch.float64), 2, seed=0, **options)
        for _ in range(2)
    )
    for m in (inside, model):
        train(m, adam(m), batches(m, 2))
    inputs = models.batch(model)
    labels = inputs.pop("labels")
    output = model(**inputs)
    (cross_entropy(output, labels) + hal_kernels.penalty(model)).backward()
    models.loss_of(inside(**inputs, labels=labels)).backward()
    assert_close(gradients(model), gradients(inside), 1e-10)  # order of sums


# ---- outputs that carry the loss ---------------------------------------------------------------


class Wrapped(nn.Module):
    """Returns its loss in one of the forms that patch_model's documentation names."""

    def __init__(self, form):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.form = form

    def forward(self, x):
        logits = self.linear(x)
        return self.form(logits.square().mean(), logits)


@pytest.mark.parametrize(
    "form, read",
    [
        (lambda loss, logits: loss, lambda out: out),
        (lambda loss, logits: (loss, logits), lambda out: out[0]),
        (lambda loss, logits: [loss, logits], lambda out: out[0]),
        (lambda loss, logits: {"loss": loss, "logits": logits}, lambda out: out["loss"]),
    ],
    ids=["scalar", "tuple", "list", "dict"],
)
def test_penalty_is_added_to_the_returned_loss(form, read):
    torch.manual_seed(0)
    model = Wrapped(form)
    x = torch.randn(3, 8)
    task = read(model(x))
    hal_kernels.patch_model(model, 2, gamma=2.0, seed=0)
    output = model(x)
    assert type(output) is type(form(task, task))
    torch.testing.assert_close(read(output), task + hal_kernels.penalty(model))
    torch.testing.assert_close(read(model.eval()(x)), task)


@pytest.mark.parametrize(
    "form", [lambda loss, logits: logits, lambda loss, logits: (logits, loss)], ids=["bare", "2nd"]
)
def test_logits_are_left_alone(form):
    """A tensor that isn't a scalar is no loss."""
    torch.manual_seed(0)
    model = Wrapped(form)
    x = torch.randn(3, 8)
    before = model(x)
    hal_kernels.patch_model(model, 2, gamma=2.0, seed=0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


# ---- Hugging Face's loops ----------------------------------------------------------------------


def test_trainer_needs_no_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = hal_kernels.patch_model(models.bert(), 2, hypernet="bert", interval=1, seed=0)
    data = [{k: v[0] for k, v in models.batch(model, 1, seed=i).items()} for i in range(24)]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True, seed=0,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
        reported = trainer.evaluate()["eval_loss"]
    assert model.hal.steps == 12
    assert budget_used(model) == 2 * len(model.hal.layout.layers)
    with torch.no_grad():
        losses = [cross_entropy(model(row["input_ids"][None]), row["labels"][None]) for row in data]
    assert reported == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)  # no penalty


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_accelerate_needs_no_callback(micro_batches):
    accelerate = pytest.importorskip("accelerate")
    model, plain = (
        hal_kernels.patch_model(models.bert(), 2, hypernet="bert", interval=1, seed=0)
        for _ in range(2)
    )
    data = batches(plain, 12 * micro_batches)
    plain_optimizer = adam(plain)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model, optimizer = accelerator.prepare(model, adam(model))
    for index, inputs in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)  # divides
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e6)  # multiplies by exactly one
            optimizer.step()
            optimizer.zero_grad()
        expected = models.loss_of(plain(**inputs))
        assert loss.item() == expected.item()
        (expected / micro_batches).backward()
        if index % micro_batches == micro_batches - 1:
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    assert_equal(state(model), state(plain))
    assert model.hal.steps == 12
    assert budget_used(model) == 2 * len(model.hal.layout.layers)
