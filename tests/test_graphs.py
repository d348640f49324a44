"""Forward and backward under CUDA graphs: the same losses, and refused where a graph goes stale.

Without a GPU a capture is faked: a replay computes on the buffers of the capture, and leaves no
trace on the host.
"""

import pytest
import torch
from models import net

import hal_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fake_make_graphed_callables(step, sample, allow_unused_input):
    """As torch's: gradients of all replays are in the same buffers, hooks are called once."""
    inputs, parameters = [t.clone() for t in sample], tuple(step.parameters())
    trained = [p for p in parameters if p.requires_grad]
    forward, adapter = step.forward, step.model.hal
    forward(*inputs)
    buffers = [torch.full_like(p, float("nan")) for p in trained]
    output = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for held, new in zip(inputs, tensors, strict=False):
                held.copy_(new)
            host = dict(adapter.__dict__)
            with torch.enable_grad():
                output[:] = [forward(*inputs)]
            adapter.__dict__.update(host)
            return output[0].detach()

        @staticmethod
        def backward(ctx, upstream):
            found = torch.autograd.grad(output[0], trained, upstream, allow_unused=True)
            for buffer, gradient in zip(buffers, found, strict=True):
                buffer.copy_(gradient)
            of = dict(zip(map(id, trained), buffers, strict=True))
            own = [of[id(p)].detach() if id(p) in of else None for p in parameters]
            return *[None] * len(inputs), *own

    return lambda *tensors: Replay.apply(*tensors, *parameters)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fake_make_graphed_callables)
        monkeypatch.setattr(hal_kernels.graphs, "DEVICE", DEVICE)


def made(**options):
    model = net().to(DEVICE)
    hal_kernels.patch_model(
        model, 2, init_rank=4, seed=0, modules_to_save=("classifier",), **options
    )
    return model.train()


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(8, 16, generator=generator)
        yield {"x": x.to(DEVICE), "labels": (x[:, 0] > 0).long().to(DEVICE)}


def losses(model, step, count, window=1, set_to_none=True):
    found = []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for i, batch in enumerate(batches(count)):
        loss = step(**batch)
        loss.backward()
        found.append(loss.detach().clone())
        if i % window == window - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return torch.stack(found), model.hal.mask.clone(), model.hal.steps


OPTIONS = {
    "default": {"interval": 10},
    "direct": {"hypernet": "direct", "update": None, "gamma": 0.1, "interval": 10},
}


@pytest.mark.parametrize(
    "passes, window, set_to_none", [(200, 1, True), (60, 1, False), (60, 4, True)]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_without_graphs(options, passes, window, set_to_none):
    """Ranks are pruned meanwhile: losses, masks and step counts are those of eager."""
    eager, captured = made(**options), made(**options)
    first = next(batches(1))
    step = hal_kernels.graphed(captured, first)
    expected = losses(eager, lambda **b: eager(**b)["loss"], passes, window, set_to_none)
    found = losses(captured, step, passes, window, set_to_none)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], expected[1]) and found[2] == expected[2] == passes // window
    assert (found[1] == 0).any() or window > 1


def changes():
    yield "evaluation", lambda model: model.eval()
    yield "moved", lambda model: model.to(torch.float64)
    yield "merged", hal_kernels.merge
    yield "frozen", lambda model: model.classifier.requires_grad_(False)
    yield "replaced", lambda model: setattr(model, "classifier", torch.nn.Linear(16, 3))
    yield "loaded", lambda model: model.load_state_dict(model.state_dict(), assign=True)


@pytest.mark.parametrize("name, change", list(changes()), ids=[name for name, _ in changes()])
def test_a_model_that_has_changed_is_refused(name, change):
    model, (batch,) = made(), batches(1)
    step = hal_kernels.graphed(model, batch)
    step(**batch)
    change(model)
    if name == "loaded":  # the same tensors
        step(**batch)
        return
    with pytest.raises(RuntimeError, match="changed since it was captured"):
        step(**batch)


def test_disabled_and_compacted_models_are_refused():
    model, (batch,) = made(), batches(1)
    step = hal_kernels.graphed(model, batch)
    with hal_kernels.disabled(model), pytest.raises(RuntimeError, match="changed since"):
        step(**batch)
    step(**batch)
    with torch.no_grad():
        model.hal.mask[0] = 0
    hal_kernels.compact(model)
    with pytest.raises(RuntimeError, match="changed since"):
        step(**batch)
    step = hal_kernels.graphed(model, batch)
    expected = model(**batch)["loss"]
    torch.testing.assert_close(step(**batch), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_captured_is_refused():
    (batch,) = batches(1)
    with pytest.raises(ValueError, match="not patched"):
        hal_kernels.graphed(net(), batch)
    with pytest.raises(ValueError, match="evaluation mode"):
        hal_kernels.graphed(made().eval(), batch)
    with pytest.raises(ValueError, match=r"hypernet='bert', .*expected .* without one"):
        hal_kernels.graphed(made(hypernet="bert"), batch)
    with pytest.raises(ValueError, match=f"x is on int, expected a tensor on {DEVICE}"):
        hal_kernels.graphed(made(), batch | {"x": 3})


def test_only_a_gpu_has_graphs(monkeypatch):
    monkeypatch.setattr(hal_kernels.graphs, "DEVICE", "elsewhere")
    with pytest.raises(ValueError, match=f"the adapter is on {DEVICE}.*on elsewhere"):
        hal_kernels.graphed(made(), next(batches(1)))


def test_other_batches_are_refused():
    model, (batch,) = made(), batches(1)
    step = hal_kernels.graphed(model, batch)
    with pytest.raises(TypeError, match=r"batch has \['x'\], expected \['x', 'labels'\]"):
        step(x=batch["x"])
    with pytest.raises(ValueError, match=r"x is torch.float32 \(4, 16\) on"):
        step(x=batch["x"][:4], labels=batch["labels"])
