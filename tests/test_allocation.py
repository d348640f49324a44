"""Rank allocation: schedules, selection, scores by hand, and no waiting for the device."""

from fractions import Fraction

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import adam, batches, budget_used, by_layer, kept, train, trainable

import hal_kernels
from hal_kernels.nn import allocation, spectral

HYPERNETS = [None, "bert"]

pytestmark = pytest.mark.usefixtures("small_hypernets")


# ---- schedules and selection against a re-implementation ---------------------------------------


class Chain(nn.Module):
    """Nothing but small linear layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def fixed_schedule(extra, interval, per_interval, steps):
    """Step -> how many are pruned from then on; only steps that allocate."""
    counts, pruned = {}, 0
    for step in range(1, steps + 1):
        if step % interval == 0 and pruned < extra:
            pruned = min(extra, pruned + per_interval)
            counts[step] = pruned
    return counts


def cubic_schedule(extra, target, interval, tinit, tfinal, total):
    """AdaLoRA's b(t) in exact arithmetic. A set of counts: floats may round b(t) either way."""
    counts, end = {}, total - tfinal
    for step in range(tinit + 1, end + 1):
        if step % interval == 0 or step == end:
            left = 1 - Fraction(step - tinit, end - tinit)
            budget = target + extra * left**3
            rounded = {int(budget)}
            if budget.denominator == 1 and step != end:  # a whole number, perhaps rounded below
                rounded.add(int(budget) - 1)
            counts[step] = {extra + target - b for b in rounded}
    return counts


def smallest(scores, count):
    """Mask that prunes the `count` smallest, the lower index first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:count])
    return [int(i not in gone) for i in range(len(scores))]


def settings_of(draw):
    rank, layers = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return {
        "rank": rank,
        "init_rank": rank + draw(st.integers(0, 3)),
        "layers": layers,
        "interval": draw(st.integers(1, 6)),
        "method": draw(st.sampled_from(["sensitivity", "magnitude"])),
        "seed": draw(st.integers(0, 2**20)),
    }


def run(options, steps, **schedule):
    """Masks and scores of a run whose Λ and gradients are drawn anew at every step.

    They are small whole numbers, so that there are many ties, some of them at the border.
    """
    generator = torch.Generator().manual_seed(options["seed"])
    model = hal_kernels.patch_model(
        Chain(options["layers"]), options["rank"], init_rank=options["init_rank"],
        hypernet="direct", allocation=options["method"], interval=options["interval"], gamma=0.0,
        **schedule,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.hal.parameters(), lr=0.0)
    lam = model.hal.lam
    for step in range(1, steps + 1):
        model(torch.zeros(1, 6))
        with torch.no_grad():
            lam.copy_(torch.randint(-3, 4, lam.shape, generator=generator))
            lam.grad = torch.randint(-2, 3, lam.shape, generator=generator).float()
        scores = lam.abs() if options["method"] == "magnitude" else (lam * lam.grad).abs()
        before, free = kept(model), lam.detach().clone()
        optimizer.step()
        yield step, model, scores.tolist(), before, free


@settings(max_examples=25)
@given(st.data())
def test_fixed_schedule(data):
    options = settings_of(data.draw)
    per_interval = data.draw(st.none() | st.integers(1, 9))
    extra = (options["init_rank"] - options["rank"]) * options["layers"]
    each = per_interval or -(-extra // 10)
    steps = options["interval"] * (-(-extra // each) if extra else 1) + options["interval"]
    expected = fixed_schedule(extra, options["interval"], each, steps)
    for step, model, scores, before, free in run(options, steps, prune_per_interval=per_interval):
        if step in expected:  # what is pruned stays pruned
            alive = [s if k else -1 for s, k in zip(scores, before, strict=True)]
            assert kept(model) == smallest(alive, expected[step])
        else:
            assert kept(model) == before
        assert torch.equal(model.hal.lam, free * model.hal.mask)
    assert budget_used(model) == options["rank"] * options["layers"]


@settings(max_examples=25)
@given(st.data())
def test_cubic_schedule(data):
    options = settings_of(data.draw)
    total = data.draw(st.integers(2, 30))
    tfinal = data.draw(st.integers(0, total - 1))
    tinit = data.draw(st.integers(0, total - tfinal - 1))
    schedule = {"schedule": "cubic", "tinit": tinit, "tfinal": tfinal, "total_step": total}
    extra = (options["init_rank"] - options["rank"]) * options["layers"]
    target, end = options["rank"] * options["layers"], total - tfinal
    expected = cubic_schedule(extra, target, options["interval"], tinit, tfinal, total)
    for step, model, scores, before, free in run(options, total + 3, **schedule):
        if extra and step in expected:  # anything may come back, until the last allocation
            count = len(scores) - budget_used(model)
            assert count in expected[step]
            assert kept(model) == smallest(scores, count)
            assert torch.equal(model.hal.lam, free * model.hal.mask)
        else:
            assert kept(model) == before
            held = model.hal.mask if step >= end else torch.ones_like(free)
            assert torch.equal(model.hal.lam, free * held)
    assert budget_used(model) == target


def test_cubic_is_pefts_schedule():
    """The same whole number at every step, floating-point rounding included."""
    adalora = pytest.importorskip("peft.tuners.adalora.layer")
    from types import SimpleNamespace

    for layers, rank, init_rank, interval, tinit, tfinal, total in [
        (72, 3, 5, 1, 50, 100, 500), (13, 2, 3, 7, 0, 0, 100), (48, 8, 12, 10, 200, 500, 2000),
        (3, 1, 6, 1, 3, 4, 40),
    ]:  # fmt: skip
        config = hal_kernels.HALConfig(
            rank=rank, init_rank=init_rank, schedule="cubic", interval=interval, tinit=tinit,
            tfinal=tfinal, total_step=total,
        )  # fmt: skip
        theirs = SimpleNamespace(
            tinit=tinit, tfinal=tfinal, total_step=total, deltaT=interval,
        )  # fmt: skip
        allocator = SimpleNamespace(
            peft_config=theirs, init_bgt=layers * init_rank, target_bgt=layers * rank
        )
        for step in range(1, total + 10):
            budget, masks = adalora.RankAllocator.budget_schedule(allocator, step)
            masks = (masks and step < total - tfinal) or step == total - tfinal
            expected = layers * init_rank - budget if masks else None
            numbers = layers * rank, layers * init_rank
            assert allocation.pruned_count(config, *numbers, step) == expected


@pytest.mark.parametrize(
    ("schedule", "hypernet"), [("fixed", None), ("cubic", "direct"), ("cubic", "bert")]
)
def test_comebacks_only_under_cubic(schedule, hypernet):
    """In real training, where scores move on their own."""
    options = {"schedule": "cubic", "total_step": 40, "tfinal": 5} if schedule == "cubic" else {
        "prune_per_interval": 1
    }  # fmt: skip
    model = hal_kernels.patch_model(
        models.net(), 2, init_rank=4, hypernet=hypernet, interval=1, seed=0, **options
    )
    optimizer = adam(model)
    comebacks, last = 0, kept(model)
    for inputs in batches(model, 36):
        train(model, optimizer, [inputs])
        now = kept(model)
        comebacks += sum(b > a for a, b in zip(last, now, strict=True))
        last = now
    assert budget_used(model) == 2 * 4
    assert comebacks == 0 if schedule == "fixed" else comebacks > 0


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_pruned_directions_are_out_of_the_function(hypernet):
    """What P and Q of a pruned direction are changes no logit."""
    model = hal_kernels.patch_model(
        models.net(), 2, init_rank=4, hypernet=hypernet, interval=1, prune_per_interval=8, seed=0
    )
    train(model, adam(model), batches(model, 3))
    for f in hal_kernels.factors(model).values():
        keep = f.mask > 0
        kept_only = (f.q[keep].t() * (f.scaling * f.lam[keep])) @ f.p[:, keep].t()
        torch.testing.assert_close(f.delta(), kept_only)
    inputs = models.batch(model)
    logits = models.logits_of(model(**inputs))
    x = inputs["x"]
    found = hal_kernels.factors(model)
    for index in range(2):
        h = torch.tanh(linear_by_hand(model, found, f"up.{index}", x))
        x = x + linear_by_hand(model, found, f"down.{index}", h)
    torch.testing.assert_close(model.classifier(x), logits, rtol=1e-4, atol=1e-5)  # float32 sums


def linear_by_hand(model, found, name, x):
    layer, f = model.get_submodule(name), found[name]
    return nn.functional.linear(x, layer.weight + f.delta(), layer.bias)


# ---- scores ------------------------------------------------------------------------------------

GAMMA, BETA1, BETA2 = 0.3, 0.7, 0.9


def gradients_by_hand(model, micro_batches):
    """dP, dΛ_eff (unmasked) and dQ of a step for every layer, by autograd on the formula."""
    leaves = {
        name: tuple(
            t.detach().clone().requires_grad_() for t in (f.p.t(), f.lam * f.mask, f.q)
        )
        for name, f in hal_kernels.factors(model).items()
    }  # fmt: skip
    scaling = model.hal.config.scaling

    def linear(name, x):
        layer, (p, lam, q) = model.get_submodule(name), leaves[name]
        return x @ layer.weight.t() + layer.bias + scaling * ((x @ p.t()) * lam) @ q

    loss = torch.zeros((), dtype=torch.float64)
    for inputs in micro_batches:
        x = inputs["x"]
        for index in range(2):
            x = x + linear(f"down.{index}", torch.tanh(linear(f"up.{index}", x)))
        logits = x @ model.classifier.weight.t() + model.classifier.bias
        loss = loss + nn.functional.cross_entropy(logits, inputs["labels"]) / len(micro_batches)
    for p, _, q in leaves.values():
        for rows in (p, q):
            residual = rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)
            loss = loss + GAMMA * residual.square().sum() / len(leaves)
    flat = torch.autograd.grad(loss, [t for triple in leaves.values() for t in triple])
    return {name: flat[3 * i : 3 * i + 3] for i, name in enumerate(leaves)}


# Every pair of two settings.
SETTINGS = [
    ("direct", "sensitivity", "fixed"), ("direct", "ema", "cubic"),
    ("direct", "magnitude", "fixed"), ("bert", "sensitivity", "cubic"), ("bert", "ema", "fixed"),
    ("bert", "magnitude", "cubic"),
]  # fmt: skip


@pytest.mark.parametrize(("hypernet", "method", "schedule"), SETTINGS)
def test_scores_by_hand(hypernet, method, schedule, monkeypatch):
    """Of kept and pruned directions, over two micro-batches a step, at every allocation."""
    seen = {}
    scores_of = allocation._scores

    def capture(adapter):
        scores = scores_of(adapter)
        seen["scores"], seen["values"] = scores.clone(), by_layer(model, model.hal.packed())
        seen["mask"] = model.hal.mask.clone()
        return scores

    monkeypatch.setattr(allocation, "_scores", capture)
    options = {"prune_per_interval": 1} if schedule == "fixed" else {
        "schedule": "cubic", "total_step": 8, "tfinal": 1
    }  # fmt: skip
    model = hal_kernels.patch_model(
        models.net(dtype=torch.float64), 2, init_rank=4, hypernet=hypernet, interval=1,
        allocation=method, dtype=torch.float64, gamma=GAMMA, beta1=BETA1, beta2=BETA2, seed=0,
        **options,
    )  # fmt: skip
    assert [spec.name for spec in model.hal.layout.layers] == ["up.0", "up.1", "down.0", "down.1"]
    optimizer = adam(model, 1e-2 if hypernet == "direct" else 1e-3)
    averages = {}
    last = 8 if schedule == "fixed" else 7
    for step in range(1, last + 1):
        micro = [models.batch(model, 3, seed=2 * step), models.batch(model, 3, seed=2 * step + 1)]
        by_hand = gradients_by_hand(model, micro)
        for inputs in micro:
            (models.loss_of(model(**inputs)) / 2).backward()
        seen.clear()
        optimizer.step()
        optimizer.zero_grad()
        expected = []
        for name, gradient in by_hand.items():
            # "direct": what the optimizer made of them (as PEFT); else what this step computed with
            value = seen["values"][name]
            if method == "magnitude":
                expected.append(value[1].abs())
                continue
            sensitivity = [(v * g).abs() for v, g in zip(value, gradient, strict=True)]
            if method == "sensitivity":
                expected.append(sensitivity[1])
                continue
            old = averages.get(name, [(torch.zeros_like(v),) * 2 for v in value])
            if step < last or schedule == "fixed":  # PEFT's last allocation looks at no new step
                new = []
                for now, (smooth, uncertain) in zip(sensitivity, old, strict=True):
                    smooth = BETA1 * smooth + (1 - BETA1) * now
                    new.append((smooth, BETA2 * uncertain + (1 - BETA2) * (now - smooth).abs()))
                averages[name] = old = new
            p, lam, q = (smooth * uncertain for smooth, uncertain in old)
            expected.append(lam + p.mean(1) + q.mean(1))
        # float64: sums in another order
        expected = torch.cat(expected)
        if schedule == "fixed":  # what is pruned stays pruned
            expected = torch.where(seen["mask"] > 0, expected, -torch.inf)
        torch.testing.assert_close(seen["scores"], expected, rtol=1e-8, atol=1e-16)
    assert budget_used(model) == 2 * 4
    if hypernet == "bert" and schedule == "cubic":
        pruned = seen["scores"][model.hal.mask == 0]
        assert pruned.any(), "a pruned direction's score is that of its unmasked gradient"


# ---- no waiting for the device -----------------------------------------------------------------

WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
METHODS = ["item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"]


class NoWaiting(TorchDispatchMode):
    """Counts calls that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in WAITING or (func._opname == "index" and args[1] and any(
            t is not None and t.dtype == torch.bool for t in args[1])):  # fmt: skip
            self.waits.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Runs a function and returns what in it waits for the device."""

    def measure(function):
        with NoWaiting() as mode, monkeypatch.context() as patch:
            for name in METHODS:
                original = getattr(torch.Tensor, name)

                def noted(self, *args, _name=name, _original=original):
                    mode.waits.append(_name)
                    return _original(self, *args)

                patch.setattr(torch.Tensor, name, noted)
            function()
        return mode.waits

    return measure


def test_the_instrument_sees_waiting(waits):
    t = torch.ones(3)
    for function in (
        lambda: t.tolist(), lambda: t.sum().item(), lambda: bool(t.any()), lambda: t[t > 0],
        lambda: t.cpu(), lambda: torch.equal(t, t), lambda: t.nonzero(),
    ):  # fmt: skip
        assert waits(function)
    assert not waits(lambda: torch.where(t > 0, t, 0.0))


@pytest.mark.parametrize(
    ("hypernet", "method", "schedule"),
    [*SETTINGS, (None, "sensitivity", "fixed"), (None, "magnitude", "cubic")],
)
def test_allocation_does_not_wait(hypernet, method, schedule, waits, monkeypatch):
    """Forward, backward and what follows an optimizer step, masks and all."""
    # Its form for the CPU looks at what it has computed; there is another one for GPUs.
    monkeypatch.setattr(spectral, "spectral_step_", lambda *args, **options: None)
    options = {"schedule": "cubic", "total_step": 6} if schedule == "cubic" else {}
    model = hal_kernels.patch_model(
        models.net(), 2, init_rank=4, hypernet=hypernet, interval=1, allocation=method, seed=0,
        skip_nonfinite=False, **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    masks = set()
    for inputs in batches(model, 7):
        assert not waits(lambda inputs=inputs: models.loss_of(model(**inputs)).backward())
        assert not waits(optimizer.step)
        optimizer.zero_grad()
        masks.add(str(kept(model)))
    assert model.hal.steps == 7
    assert len(masks) > 3


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_check_for_nan_waits_once(hypernet, waits, monkeypatch):
    monkeypatch.setattr(spectral, "spectral_step_", lambda *args, **options: None)
    model = hal_kernels.patch_model(
        models.net(), 2, init_rank=4, hypernet=hypernet, interval=1, seed=0
    )
    models.loss_of(model(**models.batch(model))).backward()
    found = waits(torch.optim.SGD(trainable(model), lr=1e-3).step)
    assert found.count("__bool__") == 1
    assert set(found) <= {"__bool__", "is_nonzero", "item", "_local_scalar_dense"}


# ---- when the budget is met ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "options"),
    [(12, {}), (30, {"prune_per_interval": 3}), (3, {"hypernet": "bert"}), (24, {"interval": 5})],
)
def test_total_step_lets_a_short_run_meet_the_budget(total, options):
    model = hal_kernels.patch_model(
        models.net(), 2, init_rank=4, seed=0, total_step=total, **options
    )
    assert 0 < model.hal.last_allocation <= 2 * total // 3
    train(model, adam(model), batches(model, model.hal.last_allocation))
    assert budget_used(model) == 2 * 4


def test_a_long_run_allocates_every_hundred_steps():
    config = hal_kernels.HALConfig(rank=2, init_rank=4, total_step=10_000)
    assert allocation.last_allocation(config, 8, 16) == 800
    assert allocation.last_allocation(hal_kernels.HALConfig(rank=2, init_rank=4), 8, 16) == 800


def test_the_first_step_says_when_the_budget_will_be_met(caplog):
    model = hal_kernels.patch_model(models.net(), 2, init_rank=3, hypernet="direct")
    train(model, adam(model), batches(model, 2))
    assert [record.message for record in caplog.records] == [
        "hal_kernels: the layers start with 12 directions and will keep 8 (rank=2) from optimizer "
        "step 400 on; for a shorter run, give its length (option total_step)"
    ]
    caplog.clear()
    for options in ({"init_rank": 2}, {"total_step": 50}, {"interval": 7}):
        quiet = hal_kernels.patch_model(models.net(), 2, hypernet="direct", **options)
        train(quiet, adam(quiet), batches(quiet, 1))
    assert not caplog.records
    short = hal_kernels.patch_model(models.net(), 2, hypernet="direct", total_step=50, interval=60)
    train(short, adam(short), batches(short, 1))
    assert [record.args[-1] for record in caplog.records] == [60]
