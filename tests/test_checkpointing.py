"""Activation checkpointing gives the gradients that no checkpointing gives.

The reentrant kind, which would not, is refused.
"""

import models
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from training import (
    adam,
    assert_close,
    batches,
    gradients,
    kept,
    state,
    train,
    trainable,
)

import hal_kernels

pytestmark = [
    pytest.mark.usefixtures("small_hypernets"),
    # transformers is about to rename its switch; torch warns of evaluation under no_grad.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

HYPERNETS = ["direct", "bert"]
DOUBLE = 1e-10  # float64 sums in another order


def patched(model, hypernet, **options):
    """Patched, and two steps from the start, so that Λ isn't zero any more."""
    defaults = {"init_rank": 3, "dtype": torch.float64, "gamma": 1.0, "interval": 1, "seed": 0}
    hal_kernels.patch_model(model, 2, hypernet=hypernet, **(defaults | options))
    optimizer = adam(model)
    for inputs in batches(model, 2):
        torch.manual_seed(0)
        models.loss_of(model(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def after_a_step(model):
    """Gradients, and the state after an SGD step: averages and masks depend on dΛ_eff."""
    found = gradients(model)
    torch.optim.SGD(trainable(model), lr=1e-5).step()
    return found, state(model), kept(model)


def assert_same_step(found, expected):
    assert_close(found[0], expected[0], DOUBLE)
    assert_close(found[1], expected[1], DOUBLE)
    assert found[2] == expected[2]


# ---- Hugging Face's switch, with no extra call -------------------------------------------------


def outside_loss(model, inputs):
    """The loss computed from logits, as trl, custom training loops and label smoothing do."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = models.logits_of(model(**inputs))
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels)


LOSSES = {
    "inside": lambda model, inputs: models.loss_of(model(**inputs)),
    "outside": outside_loss,
    "outside and penalty": lambda model, inputs: (
        outside_loss(model, inputs) + hal_kernels.penalty(model)
    ),
}


def hugging_face(make, hypernet, checkpointed, loss, **options):
    model = patched(make(dtype=torch.float64), hypernet, **options)
    if checkpointed:
        model.gradient_checkpointing_enable()
    inputs = models.batch(model, seed=5)
    torch.manual_seed(3)  # of the adapter's dropout
    LOSSES[loss](model, inputs).backward()
    return after_a_step(model)


EMA = {"allocation": "ema", "dropout": 0.3}


@pytest.mark.parametrize(
    ("hypernet", "make", "options"),
    [
        (None, models.bert, {}), (None, models.gpt2, {"dropout": 0.3}),
        ("direct", models.llama, EMA), ("bert", models.bert, EMA), ("bert", models.llama, {}),
        ("bert", models.gpt2, {}),
    ],
)  # fmt: skip
def test_hugging_face(hypernet, make, options):
    expected = hugging_face(make, hypernet, False, "inside", **options)
    assert_same_step(hugging_face(make, hypernet, True, "inside", **options), expected)


@pytest.mark.filterwarnings("ignore:hal_kernels. this step's loss had no orthogonality penalty")
@pytest.mark.parametrize("loss", ["outside", "outside and penalty"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_loss_outside_the_model(hypernet, loss):
    expected = hugging_face(models.bert, hypernet, False, loss)
    assert_same_step(hugging_face(models.bert, hypernet, True, loss), expected)


@pytest.mark.parametrize(
    ("hypernet", "allocation", "loss"),
    [
        (None, "sensitivity", "outside"), ("direct", "ema", "inside"),
        ("bert", "sensitivity", "inside"), ("bert", "ema", "outside"),
    ],
)  # fmt: skip
def test_without_penalty(hypernet, allocation, loss):
    """Without a penalty nothing but recomputed layers uses the factors."""
    options = {"gamma": 0.0, "allocation": allocation}
    expected = hugging_face(models.bert, hypernet, False, loss, **options)
    assert_same_step(hugging_face(models.bert, hypernet, True, loss, **options), expected)


# ---- torch.utils.checkpoint in a model of one's own --------------------------------------------


class Checkpointed(models.Net):
    """Every block of the MLP checkpointed; `plain` leaves the first one out, `whole` makes one of
    all blocks, `twice` runs each block's layers a second time inside the same checkpoint.
    """

    checkpoints, reentrant = False, False
    form = "blocks"

    def run(self, function, *args):
        if not self.checkpoints:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def features(self, x):
        if self.form == "whole":
            return self.run(super().features, x)
        for index in range(len(self.up)):
            if self.form == "twice":
                x = self.run(lambda t, i=index: self.block(i, self.block(i, t)), x)
            elif self.form == "plain" and index == 0:
                x = self.block(index, x)
            elif self.form == "shared":
                x = self.run(lambda t: self.block(0, t), x)
            else:
                x = self.run(self.block, index, x)
        return x


def checkpointed(hypernet, checkpoints, form="blocks", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Checkpointed(depth=3).double()
    model.form = form
    patched(model, hypernet, **options)
    model.checkpoints = checkpoints
    return model


@pytest.mark.parametrize(("hypernet", "options"), [(None, {"dropout": 0.3}), ("bert", EMA)])
@pytest.mark.parametrize("form", ["blocks", "plain", "whole", "twice", "shared"])
def test_own_blocks(hypernet, form, options):
    results = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints, form, **options)
        torch.manual_seed(3)
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_two_forwards_before_two_backwards(hypernet, together):
    """As contrastive and preference losses do."""
    results = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints, allocation="ema", dropout=0.3)
        torch.manual_seed(3)
        losses = [models.loss_of(model(**models.batch(model, seed=s))) for s in (5, 6)]
        if together:
            sum(losses).backward()
        else:
            losses[0].backward()
            losses[1].backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_several_steps_with_pruning_and_accumulation(hypernet):
    """Micro-batches, evaluation in between, masks that change: the same run to the end."""
    runs = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
        losses = []
        for index, inputs in enumerate(batches(model, 10)):
            loss = models.loss_of(model(**inputs))
            (loss / 2).backward()
            with torch.no_grad():
                model(**inputs)
            losses.append(loss.item())
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert model.hal.steps == 2 + 5
        runs.append((losses, kept(model)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=DOUBLE)
    assert runs[1][1] == runs[0][1]


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_compacted(hypernet):
    """Layers of unequal ranks, one of them empty."""
    results = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints, dropout=0.3, interval=100)
        with torch.no_grad():
            model.hal.mask[:4] = 0
            model.hal.mask[7] = 0
        hal_kernels.compact(model)
        torch.manual_seed(3)
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_failed_backward(hypernet):
    """A backward pass that breaks off half-way leaves nothing for the next one to collect."""

    def fail(gradient):
        raise RuntimeError("out of memory")

    results = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints)
        first = model.block  # fails in the backward pass of the first block, the last to run

        def block(index, x, first=first):
            y = first(index, x)
            if index == 0 and y.requires_grad:
                y.register_hook(fail)
            return y

        model.block = block
        with pytest.raises(RuntimeError, match="out of memory"):
            models.loss_of(model(**models.batch(model, seed=9))).backward()
        model.block = first
        model.zero_grad()
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("earlier_forward", [False, True])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodule_outside_the_models_forward(hypernet, earlier_forward):
    """A checkpointed part of the model called by itself, also after the whole was called."""
    results = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints, gamma=0.0)
        if earlier_forward:
            models.loss_of(model(**models.batch(model, seed=8))).backward()
        x = models.batch(model, seed=5)["x"]
        model.features(x).square().mean().backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_sequential(hypernet):
    """checkpoint_sequential over a model that is nothing but a Sequential."""

    class Chain(nn.Module):
        checkpoints = False

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x, labels):
            if self.checkpoints:
                y = checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
            else:
                y = self.layers(x)
            return {"loss": y.square().mean()}

    results = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = Chain().double()
        hal_kernels.patch_model(model, 2, hypernet=hypernet, dtype=torch.float64, seed=0)
        optimizer = adam(model)
        x = torch.randn(5, 8, dtype=torch.float64)
        for _ in range(2):
            model.checkpoints = checkpoints
            models.loss_of(model(x, None)).backward()
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        results.append(found)
    assert_close(results[1], results[0], 1e-8)  # after an Adam step, which divides by small numbers


# ---- the reentrant kind ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [models.bert, models.gpt2, Checkpointed])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_reentrant_is_refused(hypernet, make):
    """In the forward pass, also if no input requires gradients; evaluation works."""
    model = hal_kernels.patch_model(make(), 2, hypernet=hypernet, seed=0)
    if make is Checkpointed:
        model.checkpoints = model.reentrant = True
    else:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = models.batch(model)
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("earlier_forward", [False, True])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_reentrant_is_refused_outside_the_models_forward(hypernet, earlier_forward):
    """There a forward pass without a graph may be an evaluation: its backward pass says."""
    model = checkpointed(hypernet, True)
    model.reentrant = True
    x = models.batch(model)["x"].requires_grad_()
    if earlier_forward:
        hal_kernels.penalty(model).backward()
    loss = model.features(x).mean()
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_checkpoint_of_the_whole_model(hypernet, reentrant):
    """It generates the factors anew, too, so either kind will do."""

    def loss(model, x, labels):  # the reentrant kind wants tensors, no dict
        return models.loss_of(model(x, labels))

    results = []
    for checkpoints in (False, True):
        model = patched(models.net(dtype=torch.float64), hypernet)
        x, labels = models.batch(model, seed=5).values()
        x.requires_grad_()
        if checkpoints:
            checkpoint(loss, model, x, labels, use_reentrant=reentrant).backward()
        else:
            loss(model, x, labels).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
def test_a_kind_that_nobody_chose():
    """peft.prepare_model_for_kbit_training leaves torch its own choice, the reentrant kind."""
    losses = []
    for checkpointed in (False, True):
        model = models.llama()
        if checkpointed:
            model.gradient_checkpointing_enable({})
        model = hal_kernels.patch_model(model, 2, hypernet="direct", seed=0)
        losses.append(train(model, adam(model), batches(model, 2)))
    assert losses[0] == losses[1]
