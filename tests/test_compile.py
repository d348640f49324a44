"""torch.compile(fullgraph=True) trains as eager does, and a changed mask compiles nothing anew.

torch.compile(model) runs a model's hooks outside of its forward's graph and compiles them each by
itself; a function that calls the model is one graph.
"""

import models
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training import adam, assert_close, batches, budget_used, gradients, kept, state

import hal_kernels

pytestmark = pytest.mark.usefixtures("small_hypernets")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def short_bert(**options):
    return models.bert(num_hidden_layers=1, **options)


def patched(make, hypernet, **options):
    defaults = {"init_rank": 3, "interval": 1, "prune_per_interval": 1, "seed": 0}
    return hal_kernels.patch_model(
        make(dtype=torch.float64), 2, hypernet=hypernet, dtype=torch.float64, **(defaults | options)
    )


def compiled(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("whole", [False, True], ids=["model", "function"])
def test_training(whole):
    """Loss, gradients, state and masks over steps that prune, from one compilation.

    Of a model and its hooks, with the default's factors; of a function that is one graph, with
    factors generated in it.
    """
    make, hypernet = (models.net, "bert") if whole else (short_bert, None)
    eager, model = patched(make, hypernet), patched(make, hypernet)
    run, counter = compiled((lambda **inputs: model(**inputs)) if whole else model)
    optimizers = [adam(eager), adam(model)]
    masks, frames = set(), 1 if whole else None
    for index, inputs in enumerate(batches(eager, 4)):
        expected = models.loss_of(eager(**inputs))
        loss = models.loss_of(run(**inputs))
        # aot_eager runs the same operators; sums of gradients may be in another order
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for term in (expected, loss):
            term.backward()
        assert_close(gradients(model), gradients(eager), 1e-7)
        for optimizer in optimizers:
            step(optimizer)
        assert kept(model) == kept(eager)
        assert_close(state(model), state(eager), 1e-7)
        masks.add(str(kept(model)))
        frames = frames or counter.frame_count
        assert model.hal.steps == index + 1
    assert len(masks) > 2
    assert counter.frame_count == frames, "compiled anew after the first step"
    assert budget_used(model) < 3 * len(model.hal.layout.layers)


@pytest.mark.parametrize(
    ("update", "count"), [("residual", 2), pytest.param("replace", 1, marks=pytest.mark.slow)]
)
def test_other_options(update, count):
    """Probes on all factors, state read by the generation itself, a penalty with a square root;
    `count` micro-batches a step, whose sum the allocator sees."""
    options = {"update": update, "allocation": "ema", "penalty": "frobenius"}
    eager, model = (patched(models.net, "bert", **options) for _ in range(2))
    run, _ = compiled(model)
    optimizers = [adam(eager), adam(model)]
    for index, inputs in enumerate(batches(eager, 3 * count)):
        for forward in (eager, run):
            (models.loss_of(forward(**inputs)) / count).backward()
        assert_close(gradients(model), gradients(eager), 1e-7)
        if index % count == count - 1:
            for optimizer in optimizers:
                step(optimizer)
    assert model.hal.steps == eager.hal.steps == 3
    assert_close(state(model), state(eager), 1e-7)


def test_dropout():
    """The graph draws its seeds from torch's generator: reproducible, and different every step."""
    model = patched(models.net, "direct", dropout=0.5)
    optimizer = adam(model)
    for inputs in batches(model, 2):
        models.loss_of(model(**inputs)).backward()
        step(optimizer)
    run, _ = compiled(model)
    inputs = models.batch(model)
    torch.manual_seed(0)
    first, second = (models.logits_of(run(**inputs)) for _ in range(2))
    torch.manual_seed(0)
    again = models.logits_of(run(**inputs))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("hypernet", [None, "bert"])
def test_evaluation(hypernet):
    """Under no_grad, before and after a step: the factors of the moment, not of the first call."""
    model = patched(models.net, hypernet)
    run, counter = compiled(model.eval())
    optimizer = adam(model)
    frames = None
    for inputs in batches(model, 3):
        with torch.no_grad():
            expected = models.logits_of(model(**inputs))
            torch.testing.assert_close(models.logits_of(run(**inputs)), expected, rtol=1e-9, atol=0)
        model.train()
        models.loss_of(model(**inputs)).backward()
        step(optimizer)
        model.eval()
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.filterwarnings("ignore:hal_kernels. an optimizer step is left out")
def test_compiled_and_eager_calls_mixed():
    """Compiled and eager training steps and evaluation of one model in turns, and a step whose loss
    is NaN, which is skipped like any other."""
    eager, model = patched(models.net, "bert"), patched(models.net, "bert")
    run, _ = compiled(model)
    optimizers = [adam(eager), adam(model)]
    for index, inputs in enumerate(batches(eager, 4)):
        if index == 2:
            before = state(model)
            (models.loss_of(run(**inputs)) * float("nan")).backward()
            step(optimizers[1])
            assert all(torch.equal(t, before[n]) for n, t in state(model).items())
            assert model.hal.steps == 2
        forwards = (eager, model if index % 2 else run)
        for forward, optimizer in zip(forwards, optimizers, strict=True):
            models.loss_of(forward(**inputs)).backward()
            step(optimizer)
        with torch.no_grad():
            torch.testing.assert_close(
                models.logits_of(model(**inputs)), models.logits_of(eager(**inputs)),
                rtol=1e-6, atol=1e-9,
            )  # fmt: skip
    assert_close(state(model), state(eager), 1e-7)
