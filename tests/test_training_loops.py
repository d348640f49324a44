"""Odd loops: when the state advances, what is thrown away, layers called by themselves, threads."""

import threading

import models
import pytest
import torch
from lifecycle import predict, unchanged
from pruning import BUDGET, HYPERNETS, LAST_ALLOCATION, cross_entropy, patched_net
from torch import nn
from training import (
    adam,
    assert_close,
    assert_equal,
    batches,
    budget_used,
    gradients,
    state,
    train,
    trainable,
)

import hal_kernels

pytestmark = pytest.mark.usefixtures("small_hypernets")


# ---- odd loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypernet", "allocation", "gamma"),
    [
        (None, "sensitivity", 0.1), (None, "magnitude", 0.0), ("direct", "ema", 0.1),
        ("direct", "magnitude", 0.0), ("bert", "ema", 0.0), ("bert", "sensitivity", 0.1),
        ("bert", "magnitude", 0.0),
    ],
)  # fmt: skip
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


# ---- what leaves no trace ----------------------------------------------------------------------


def thrown_away(model):
    """A backward pass whose gradients are dropped."""
    models.loss_of(model(**models.batch(model, seed=99))).backward()
    model.zero_grad()


def evaluated(model):
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            model.eval()(**models.batch(model, seed=99))
    model.train()


def failed(model):
    """An out-of-memory error or a keyboard interrupt in the model."""
    with pytest.raises(ValueError, match="x has shape"):
        model(x=torch.zeros(2, 3))


def failed_before_the_pass(model):
    """A hook that runs before the adapter's and raises: the adapter's own never opened a pass."""

    def fail(module, args):
        raise RuntimeError("not now")

    hook = model.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="not now"):
        model(**models.batch(model))
    hook.remove()


def looked_at(model):
    with unchanged(model):
        hal_kernels.factors(model), hal_kernels.rank_pattern(model), hal_kernels.penalty(model)


def disabled(model):
    """A reference model's output is wanted between forward and backward (KL terms, DPO)."""
    with hal_kernels.disabled(model):
        predict(model)


TRACELESS = [
    *(("zero_grad", what) for what in (thrown_away, evaluated, failed, failed_before_the_pass)),
    ("forward", disabled), ("backward", disabled), ("backward", looked_at),
]  # fmt: skip


@pytest.mark.parametrize(
    ("hypernet", "after", "what"),
    [
        *((hypernet, *how) for hypernet in (None, "direct", "bert") for how in TRACELESS),
        # A step that was noticed before it was told of counts once.
        *((hypernet, "step", hal_kernels.step) for hypernet in ("direct", "bert")),
    ],
)
def test_what_leaves_no_trace(hypernet, after, what):
    """Losses, factors, scores and masks are those of a run that it did not happen in."""
    options = {"allocation": "ema"} if hypernet else {}
    model, clean = (patched_net(hypernet, **options) for _ in range(2))
    optimizers = adam(model), adam(clean)

    def done(moment, each):
        if each is model and moment == after:
            what(model)

    for inputs in batches(model, 4):
        losses = []
        for each, optimizer in zip((model, clean), optimizers, strict=True):
            losses.append(models.loss_of(each(**inputs)))
            done("forward", each)
            losses[-1].backward()
            done("backward", each)
            optimizer.step()
            done("step", each)
            optimizer.zero_grad()
            done("zero_grad", each)
        assert torch.equal(*losses)
    assert_equal(state(model), state(clean))
    with torch.no_grad():  # no layer computes with the factors of a pass that is over
        for parameter in model.hal.parameters():
            parameter.mul_(1.1)
        x = models.batch(model)["x"]
        assert torch.equal(model.classifier(model.features(x)), models.logits_of(model(x)))


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
@pytest.mark.parametrize("hypernet", [None, "direct", "bert"])
def test_one_advance_with_several_optimizers(hypernet, order):
    """P, Λ and the head in optimizers of their own, stepped in either order."""
    model, whole = patched_net(hypernet), patched_net(hypernet)
    adapter = list(model.hal.parameters())
    groups = [adapter[:2], adapter[2:], list(model.classifier.parameters())]
    make = torch.optim.AdamW if hypernet == "direct" else torch.optim.SGD
    optimizers = [make(group, lr=1e-3) for group in groups]
    data = batches(model, LAST_ALLOCATION + 1)
    for index, inputs in enumerate(data):
        models.loss_of(model(**inputs)).backward()
        for which in order:
            optimizers[which].step()
        model.zero_grad()
        assert model.hal.steps == index + 1
    assert budget_used(model) == BUDGET
    if hypernet == "direct":  # whose moments would move what is pruned
        assert not model.hal.lam[model.hal.mask == 0].any()
    if hypernet == "bert":
        train(whole, torch.optim.SGD(trainable(whole), lr=1e-3), data)
        assert_equal(state(model), state(whole))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_optimizer_without_the_adapter(hypernet):
    """Its step isn't a step of the adapter, which is warned of, once."""
    net = models.net()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    model = hal_kernels.patch_model(net, 2, hypernet=hypernet, seed=0)
    with pytest.warns(UserWarning, match="make the optimizer after the adapter") as caught:
        train(model, early, batches(model, 3))
    assert len(caught) == 1 and caught[0].filename == train.__code__.co_filename
    assert model.hal.steps == 0


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_optimizers_without_the_adapter_that_are_fine(hypernet):
    """Of another model (a GAN's), beside the adapter's own, of the head while that is frozen."""
    model, other = patched_net(hypernet), models.net()
    critic = torch.optim.SGD(other.parameters(), lr=0.1)
    head = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    models.loss_of(model(**models.batch(model))).backward()
    models.loss_of(other(**models.batch(other))).backward()
    critic.step()
    optimizer = torch.optim.SGD(model.hal.parameters(), lr=0.1)
    head.step()
    optimizer.step()
    frozen = patched_net(hypernet)
    frozen.hal.requires_grad_(False)
    train(frozen, torch.optim.SGD(trainable(frozen), lr=0.1), batches(frozen, 2))


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
    model = patched_net(hypernet, gamma=0.0)
    losses = [outside(model, inputs) for inputs in batches(model, 2)]
    for loss in losses:
        loss.backward()
    adam(model).step()
    assert model.hal.steps == 1


@pytest.mark.parametrize(
    ("hypernet", "penalty", "gamma"),
    [("direct", "squared", 3.0), ("direct", "frobenius", 0.0), ("bert", "frobenius", 3.0),
     ("bert", "squared", 0.0)],
)  # fmt: skip
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


# ---- passes in several threads -----------------------------------------------------------------


# With gradients, torch refuses "direct" factors that another thread's step has changed.
@pytest.mark.parametrize(
    ("hypernet", "gradients_there"), [("direct", False), ("bert", False), ("bert", True)]
)
def test_a_pass_in_another_thread(hypernet, gradients_there):
    """While one thread is inside the model's forward, training goes on in another as if alone."""
    model, clean = patched_net(hypernet), patched_net(hypernet)
    optimizer, clean_optimizer = adam(model), adam(clean)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(module, args, output):
        if threading.current_thread() is other:
            inside.set()
            assert go_on.wait(60)

    def evaluate():
        with torch.set_grad_enabled(gradients_there):
            found.append(models.logits_of(model(**models.batch(model, seed=9))))

    model.up[0].register_forward_hook(wait)
    other = threading.Thread(target=evaluate)
    other.start()
    try:
        assert inside.wait(60)
        for inputs in batches(model, 3):
            assert train(model, optimizer, [inputs]) == train(clean, clean_optimizer, [inputs])
    finally:
        go_on.set()
        other.join()
    assert_equal(state(model), state(clean))
    assert found[0].requires_grad == gradients_there
