"""Activation checkpointing gives the gradients that no checkpointing gives.

The reentrant kind, which would not, is refused.
"""

import models
import pytest
import torch
from pruning import cross_entropy
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from training import adam, assert_close, batches, gradients, kept, state, train, trainable

import hal_kernels

pytestmark = [
    pytest.mark.usefixtures("small_hypernets"),
    # transformers is about to rename its switch; torch warns of evaluation under no_grad.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

EACH = pytest.mark.parametrize("hypernet", ["direct", "bert"])
DOUBLE = 1e-10  # float64 sums in another order
EMA = {"allocation": "ema", "dropout": 0.3}


def patched(model, hypernet, **options):
    """Patched, and two steps from the start, so that Λ isn't zero any more."""
    defaults = {"init_rank": 3, "dtype": torch.float64, "gamma": 1.0, "interval": 1, "seed": 0}
    hal_kernels.patch_model(model, 2, hypernet=hypernet, **(defaults | options))
    optimizer = adam(model)
    for inputs in batches(model, 2):
        torch.manual_seed(0)
        train(model, optimizer, [inputs])
    return model


def assert_alike(run):
    """`run(checkpoints)` makes a model and its gradients: the same ones either way.

    So is the state after an SGD step: averages and masks depend on dΛ_eff.
    """
    found = []
    for checkpoints in (False, True):
        model = run(checkpoints)
        own = gradients(model)
        torch.optim.SGD(trainable(model), lr=1e-5).step()
        found.append((own, state(model), kept(model)))
    (expected, expected_state, expected_mask), (own, after, mask) = found
    assert_close(own, expected, DOUBLE)
    assert_close(after, expected_state, DOUBLE)
    assert mask == expected_mask


# ---- Hugging Face's switch, with no extra call -------------------------------------------------


def inside(model, inputs):
    return models.loss_of(model(**inputs))


def outside(model, inputs):
    """The loss computed from logits, as trl, custom training loops and label smoothing do."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return cross_entropy(model(**inputs), labels)


def outside_with_penalty(model, inputs):
    return outside(model, inputs) + hal_kernels.penalty(model)


NONE = {"gamma": 0.0}  # without a penalty nothing but recomputed layers uses the factors


@pytest.mark.filterwarnings("ignore:hal_kernels. this step's loss had no orthogonality penalty")
@pytest.mark.parametrize(
    ("hypernet", "make", "loss", "options"),
    [
        (None, models.bert, inside, {}), (None, models.gpt2, inside, {"dropout": 0.3}),
        ("direct", models.llama, inside, EMA), ("bert", models.bert, inside, EMA),
        ("bert", models.llama, inside, {}), ("bert", models.gpt2, inside, {}),
        ("direct", models.bert, outside, {}), ("direct", models.bert, outside_with_penalty, {}),
        ("bert", models.bert, outside, {}), ("bert", models.bert, outside_with_penalty, {}),
        (None, models.bert, outside, NONE), ("direct", models.bert, inside, NONE | EMA),
        ("bert", models.bert, inside, NONE), ("bert", models.bert, outside, NONE | EMA),
    ],
)  # fmt: skip
def test_hugging_face(hypernet, make, loss, options):
    def run(checkpoints):
        model = patched(make(dtype=torch.float64), hypernet, **options)
        if checkpoints:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)  # of the adapter's dropout
        loss(model, models.batch(model, seed=5)).backward()
        return model

    assert_alike(run)


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
    torch.manual_seed(3)  # of dropout
    return model


def backward(model, seed=5):
    inside(model, models.batch(model, seed=seed)).backward()
    return model


@pytest.mark.parametrize(("hypernet", "options"), [(None, {"dropout": 0.3}), ("bert", EMA)])
@pytest.mark.parametrize("form", ["blocks", "plain", "whole", "twice", "shared"])
def test_own_blocks(hypernet, form, options):
    assert_alike(lambda checkpoints: backward(checkpointed(hypernet, checkpoints, form, **options)))


@pytest.mark.parametrize("together", [True, False])
@EACH
def test_two_forwards_before_two_backwards(hypernet, together):
    """As contrastive and preference losses do."""

    def run(checkpoints):
        model = checkpointed(hypernet, checkpoints, **EMA)
        losses = [inside(model, models.batch(model, seed=seed)) for seed in (5, 6)]
        for loss in [sum(losses)] if together else losses:
            loss.backward()
        return model

    assert_alike(run)


@EACH
def test_several_steps_with_pruning_and_accumulation(hypernet):
    """Micro-batches, evaluation in between, masks that change: the same run to the end."""
    runs = []
    for checkpoints in (False, True):
        model = checkpointed(hypernet, checkpoints)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
        losses = []
        for index, inputs in enumerate(batches(model, 10)):
            loss = inside(model, inputs)
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


@EACH
def test_compacted(hypernet):
    """Layers of unequal ranks, one of them empty."""

    def run(checkpoints):
        model = checkpointed(hypernet, checkpoints, dropout=0.3, interval=100)
        with torch.no_grad():
            model.hal.mask[[0, 1, 2, 3, 7]] = 0
        return backward(hal_kernels.compact(model))

    assert_alike(run)


@EACH
def test_failed_backward(hypernet):
    """A backward pass that breaks off half-way leaves nothing for the next one to collect."""

    def fail(gradient):
        raise RuntimeError("out of memory")

    def run(checkpoints):
        model = checkpointed(hypernet, checkpoints)
        first = model.block  # fails in the backward pass of the first block, the last to run

        def block(index, x):
            y = first(index, x)
            if index == 0 and y.requires_grad:
                y.register_hook(fail)
            return y

        model.block = block
        with pytest.raises(RuntimeError, match="out of memory"):
            backward(model, seed=9)
        model.block = first
        model.zero_grad()
        return backward(model)

    assert_alike(run)


@pytest.mark.parametrize("earlier_forward", [False, True])
@EACH
def test_submodule_outside_the_models_forward(hypernet, earlier_forward):
    """A checkpointed part of the model called by itself, also after the whole was called."""

    def run(checkpoints):
        model = checkpointed(hypernet, checkpoints, gamma=0.0)
        if earlier_forward:
            backward(model, seed=8)
        model.features(models.batch(model, seed=5)["x"]).square().mean().backward()
        return model

    assert_alike(run)


class Chain(nn.Sequential):
    """A model that is nothing but a Sequential."""

    checkpoints = False

    def forward(self, x, labels):
        if self.checkpoints:
            y = checkpoint_sequential(self, 2, x, use_reentrant=False)
        else:
            y = super().forward(x)
        return {"loss": y.square().mean()}


@EACH
def test_sequential(hypernet):
    def run(checkpoints):
        torch.manual_seed(0)
        model = Chain(*(nn.Linear(models.WIDTH, models.WIDTH) for _ in range(4))).double()
        patched(model, hypernet, modules_to_save=())
        model.checkpoints = checkpoints
        return backward(model)

    assert_alike(run)


# ---- the reentrant kind ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [models.bert, models.gpt2, Checkpointed])
@EACH
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
@EACH
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
@EACH
def test_checkpoint_of_the_whole_model(hypernet, reentrant):
    """It generates the factors anew, too, so either kind will do."""

    def loss(model, x, labels):  # the reentrant kind wants tensors, no dict
        return models.loss_of(model(x, labels))

    def run(checkpoints):
        model = patched(models.net(dtype=torch.float64), hypernet)
        x, labels = models.batch(model, seed=5).values()
        x.requires_grad_()
        if checkpoints:
            checkpoint(loss, model, x, labels, use_reentrant=reentrant).backward()
        else:
            loss(model, x, labels).backward()
        return model

    assert_alike(run)


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
