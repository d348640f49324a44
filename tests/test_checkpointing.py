"""Activation checkpointing, reentrant and not, gives the gradients that no checkpointing gives."""

import lifecycle
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
    trainable,
)

import hal_kernels

pytestmark = [
    # transformers is about to rename its switch; torch warns of evaluation under no_grad.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

HYPERNETS = ["direct", "bert"]
KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
DOUBLE = 1e-10  # float64 sums in another order


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    lifecycle.small_hypernets(monkeypatch)


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


def hugging_face(make, hypernet, reentrant, loss, **options):
    model = patched(make(dtype=torch.float64), hypernet, **options)
    if reentrant is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    inputs = models.batch(model, seed=5)
    torch.manual_seed(3)  # of the adapter's dropout
    LOSSES[loss](model, inputs).backward()
    return after_a_step(model)


@KINDS
@pytest.mark.parametrize("options", [{}, {"allocation": "ema", "dropout": 0.3}], ids=["", "ema"])
@pytest.mark.parametrize("make", [models.bert, models.llama, models.gpt2])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_hugging_face(hypernet, make, options, reentrant):
    expected = hugging_face(make, hypernet, None, "inside", **options)
    assert_same_step(hugging_face(make, hypernet, reentrant, "inside", **options), expected)


@KINDS
@pytest.mark.parametrize("loss", ["outside", "outside and penalty"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_loss_outside_the_model(hypernet, loss, reentrant):
    expected = hugging_face(models.bert, hypernet, None, loss)
    assert_same_step(hugging_face(models.bert, hypernet, reentrant, loss), expected)


@KINDS
@pytest.mark.parametrize("loss", ["inside", "outside"])
@pytest.mark.parametrize("allocation", ["sensitivity", "ema"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_without_penalty(hypernet, allocation, loss, reentrant):
    """Without a penalty nothing but recomputed layers uses the factors."""
    options = {"gamma": 0.0, "allocation": allocation}
    expected = hugging_face(models.bert, hypernet, None, loss, **options)
    assert_same_step(hugging_face(models.bert, hypernet, reentrant, loss, **options), expected)


# ---- torch.utils.checkpoint in a model of one's own --------------------------------------------


class Checkpointed(models.Net):
    """Every block of the MLP checkpointed; `plain` leaves the first one out, `whole` makes one of
    all blocks, `twice` runs each block's layers a second time inside the same checkpoint.
    """

    reentrant: bool | None = None
    form = "blocks"

    def run(self, function, *args):
        if self.reentrant is None:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def features(self, x):
        x = x.clone().requires_grad_()  # reentrant checkpointing wants an input with a gradient
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


def checkpointed(hypernet, reentrant, form="blocks", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Checkpointed(depth=3).double()
    model.form = form
    patched(model, hypernet, **options)
    model.reentrant = reentrant
    return model


@KINDS
@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"allocation": "ema", "dropout": 0.3}])
@pytest.mark.parametrize("form", ["blocks", "plain", "whole", "twice", "shared"])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_own_blocks(hypernet, form, options, reentrant):
    results = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind, form, **options)
        torch.manual_seed(3)
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@KINDS
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_two_forwards_before_two_backwards(hypernet, together, reentrant):
    """As contrastive and preference losses do."""
    results = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind, allocation="ema", dropout=0.3)
        torch.manual_seed(3)
        losses = [models.loss_of(model(**models.batch(model, seed=s))) for s in (5, 6)]
        if together:
            sum(losses).backward()
        else:
            losses[0].backward()
            losses[1].backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@KINDS
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_several_steps_with_pruning_and_accumulation(hypernet, reentrant):
    """Micro-batches, evaluation in between, masks that change: the same run to the end."""
    runs = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind)
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


@KINDS
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_compacted(hypernet, reentrant):
    """Layers of unequal ranks, one of them empty."""
    results = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind, dropout=0.3, interval=100)
        with torch.no_grad():
            model.hal.mask[:4] = 0
            model.hal.mask[7] = 0
        hal_kernels.compact(model)
        torch.manual_seed(3)
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@KINDS
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_failed_backward(hypernet, reentrant):
    """A backward pass that breaks off half-way leaves nothing for the next one to collect."""

    def fail(gradient):
        raise RuntimeError("out of memory")

    results = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind)
        first = model.block  # fails in the backward pass of the first block, the last to run

        def block(index, x, first=first):
            if index == 0 and x.requires_grad:
                x.register_hook(fail)
            return first(index, x)

        model.block = block
        with pytest.raises(RuntimeError, match="out of memory"):
            models.loss_of(model(**models.batch(model, seed=9))).backward()
        model.block = first
        model.zero_grad()
        models.loss_of(model(**models.batch(model, seed=5))).backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@KINDS
@pytest.mark.parametrize("earlier_forward", [False, True])
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_submodule_outside_the_models_forward(hypernet, earlier_forward, reentrant):
    """A checkpointed part of the model called by itself, also after the whole was called."""
    results = []
    for kind in (None, reentrant):
        model = checkpointed(hypernet, kind, gamma=0.0)
        if earlier_forward:
            models.loss_of(model(**models.batch(model, seed=8))).backward()
        x = models.batch(model, seed=5)["x"]
        model.features(x).square().mean().backward()
        results.append(after_a_step(model))
    assert_same_step(results[1], results[0])


@KINDS
@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_sequential(hypernet, reentrant):
    """checkpoint_sequential over a model that is nothing but a Sequential."""

    class Chain(nn.Module):
        kind = None

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x, labels):
            x = x.clone().requires_grad_()
            if self.kind is None:
                y = self.layers(x)
            else:
                y = checkpoint_sequential(self.layers, 2, x, use_reentrant=self.kind)
            return {"loss": y.square().mean()}

    results = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = Chain().double()
        hal_kernels.patch_model(model, 2, hypernet=hypernet, dtype=torch.float64, seed=0)
        optimizer = adam(model)
        x = torch.randn(5, 8, dtype=torch.float64)
        for _ in range(2):
            model.kind = kind
            models.loss_of(model(x, None)).backward()
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        results.append(found)
    assert_close(results[1], results[0], 1e-8)  # after an Adam step, which divides by small numbers
