"""A run that is interrupted, or copied, goes on bit for bit."""

import copy

import models
import pytest
from lifecycle import pickled
from pruning import BUDGET, CUBIC, HYPERNETS, patched_net
from training import adam, assert_equal, batches, budget_used, state, train

import hal_kernels

pytestmark = pytest.mark.usefixtures("small_hypernets")


# ---- resume ------------------------------------------------------------------------------------


def resumed(model, optimizer, folder, *, into):
    """A fresh process's model and optimizer, from files alone."""
    hal_kernels.save_adapter(model, folder)
    fresh = models.net()
    if into == "patched":
        same = ("hypernet", "update", "allocation")
        options = {name: getattr(model.hal.config, name) for name in same} | {"seed": 9}
        hal_kernels.patch_model(fresh, 2, init_rank=4, **options)
    hal_kernels.load_adapter(fresh, folder)
    again = adam(fresh)
    again.load_state_dict(pickled(optimizer.state_dict()))
    return fresh, again


@pytest.mark.parametrize(
    ("hypernet", "at", "compacted", "into"),
    [  # before, during and after allocation; every pair of two settings but for "direct"
        (None, 1, False, "plain"), (None, 5, True, "patched"), (None, 10, True, "plain"),
        (None, 10, False, "patched"), ("bert", 1, True, "patched"), ("bert", 5, False, "patched"),
        ("bert", 5, True, "plain"), ("bert", 10, False, "plain"), ("direct", 5, True, "plain"),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize(
    ("hypernet", "at"), [("direct", 1), ("bert", 6), ("direct", 6), ("bert", 10)]
)
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


# ---- copies ------------------------------------------------------------------------------------


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
