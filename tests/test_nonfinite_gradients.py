"""A step whose gradients hold NaN or Inf changes nothing."""

import copy
import warnings

import models
import pytest
import torch
from pruning import BUDGET, CUBIC, HYPERNETS, LAST_ALLOCATION, patched_net
from training import adam, assert_equal, batches, budget_used, kept, state, train, trainable

import hal_kernels

LEFT_OUT = "an optimizer step is left out"
pytestmark = [
    pytest.mark.usefixtures("small_hypernets"),
    pytest.mark.filterwarnings(f"ignore:hal_kernels. {LEFT_OUT}"),
]


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


@pytest.mark.parametrize(
    ("hypernet", "allocation", "poison", "scaled"),
    [  # every pair of two settings of each of "direct" and "bert"
        ("direct", "ema", "nan", False), ("direct", "sensitivity", "inf", True),
        ("direct", "sensitivity", "one nan", False), ("direct", "ema", "one inf", True),
        ("bert", "ema", "nan", True), ("bert", "sensitivity", "inf", False),
        ("bert", "sensitivity", "one nan", True), ("bert", "ema", "one inf", False),
        (None, "sensitivity", "one nan", True), (None, "magnitude", "inf", False),
    ],
)  # fmt: skip
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
    options = CUBIC | {"allocation": allocation}
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


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_skip_nonfinite_can_be_switched_off(hypernet):
    model = patched_net(hypernet, skip_nonfinite=False)
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


# ---- steps with a closure ----------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is usually written (github.com/davda54/sam)."""

    def __init__(self, parameters, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure):
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        for p in moved:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=float(self.defaults["rho"] / (norm + 1e-12)))
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p in moved:
            if p.grad is not None:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def by_position(optimizer, closure):
    return optimizer.step(closure)


def by_name(optimizer, closure):
    return optimizer.step(closure=closure)


def sharpness_aware(optimizer, closure):
    closure()
    return optimizer.step(closure)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), by_position),
        (lambda p: torch.optim.AdamW(p, lr=1e-3), by_name),
        (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), by_position),
        (lambda p: SAM(p, lr=1e-2), sharpness_aware),
    ],
    ids=["position", "name", "LBFGS", "SAM"],
)
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_nonfinite_step_with_a_closure(hypernet, make, call):
    """Gradients are made inside step(), as Lightning does: a bad batch leaves no trace either."""
    model, clean = (patched_net(hypernet) for _ in range(2))
    optimizer, clean_optimizer = make(trainable(model)), make(trainable(clean))

    def step(model, optimizer, inputs, factor=1.0):
        def closure():
            optimizer.zero_grad()
            loss = models.loss_of(model(**inputs)) * factor
            loss.backward()
            return loss

        call(optimizer, closure)

    for index, inputs in enumerate(batches(model, 4)):
        if index == 2:
            step(model, optimizer, inputs, float("nan"))
            assert model.hal.steps == 2
        step(model, optimizer, inputs)
        step(clean, clean_optimizer, inputs)
        assert model.hal.steps == index + 1
    assert_equal(state(model), state(clean))
    assert all(tensor.isfinite().all() for tensor in state(model).values())


# ---- what is said about it ---------------------------------------------------------------------


def test_skipped_steps_are_warned_of():
    """The first one, and once more when most of them are: not each."""
    model = patched_net("direct")
    optimizer = adam(model)
    inputs = models.batch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(40):
            poison = POISONS["nan"] if index % 8 else None
            step_once(model, optimizer, None, inputs, poison)
            assert len(caught) == (0 if index < 1 else 1 if index < 12 else 2)
    assert LEFT_OUT in str(caught[0].message)
    assert "more than half of the last 20" in str(caught[1].message)
    assert {w.filename for w in caught} == {__file__}  # the line that calls step()
    assert model.hal.steps == 5
