"""`offsets`: which factors have trainable offsets of their own, which live as factors do."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict, small_hypernets
from training import adam, assert_equal, batches, kept, state, train

import hal_kernels

# Names of a Net's packed factors: two layers 16 -> 24 and two 24 -> 16.
P, Q = ("p_16", "p_24"), ("q_16", "q_24")
NAMES = {"none": set(), "lam": {"lam"}, "all": {*P, "lam", *Q}}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_hypernets(monkeypatch)


def offsets(model):
    named = model.hal.named_parameters()
    return {n.removeprefix("offset_"): p for n, p in named if n.startswith("offset_")}


@pytest.mark.parametrize("which", NAMES)
def test_which_factors_have_some(which):
    model = patched(hypernet="bert", offsets=which)
    assert offsets(model).keys() == NAMES[which]
    held = dict(model.hal.named_buffers())
    assert all(p.shape == held[name].shape for name, p in offsets(model).items())


@pytest.mark.parametrize(
    "options",
    [
        {"hypernet": "direct", "init": "random"},
        {"hypernet": "bert", "update": "replace"},
        {"hypernet": "bert", "update": "residual"},
    ],
)
def test_only_beside_an_anchor(options):
    assert not offsets(patched(offsets="all", **options))


def test_another_value():
    message = r"offsets is True, expected one of \('none', 'lam', 'all'\)"
    with pytest.raises(ValueError, match=message):
        patched(hypernet="bert", offsets=True)


@pytest.mark.parametrize("which, scale", [("lam", 100.0), ("all", 30.0)])
def test_they_get_the_gradients_of_their_factors_and_move_them_further(which, scale):
    model = patched(
        models.net(dtype=torch.float64), hypernet="bert", offsets=which, allocation="ema",
        init="random", dtype=torch.float64,
    )  # fmt: skip
    (inputs,) = batches(model, 1)
    models.loss_of(model(**inputs)).backward()
    own = offsets(model)
    gradients = dict(zip(model.hal._names, model.hal.watched().tensors(), strict=True))
    for name, parameter in own.items():
        assert parameter.grad.any()
        # the probe of Λ stands behind the mask, of which every element is one
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-12, atol=0)
    before = model.hal.current().factors
    with torch.no_grad():
        for parameter in own.values():
            parameter += 1e-3
    model.hal.forget()
    after = model.hal.current().factors
    for name, old, new in zip(model.hal._names, before.tensors(), after.tensors(), strict=True):
        moved = torch.full_like(old, 1e-3 * scale if name in own else 0.0)
        torch.testing.assert_close(new - old, moved, rtol=1e-9, atol=0)


@pytest.mark.parametrize("init", ["random", "gradient"])
def test_resumed_bit_for_bit(init, tmp_path):
    """In the middle of allocations, compacted, from files."""
    data = batches(models.net(), 9)
    options = {"interval": 2, "prune_per_interval": 2, "init_rank": 3, "init": init}
    model = patched(hypernet="bert", offsets="all", **options)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, data[:5])
    hal_kernels.compact(model)
    hal_kernels.save_adapter(model, tmp_path)
    fresh = hal_kernels.load_adapter(models.net(), tmp_path)
    again = adam(fresh, 1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(fresh, again, data[5:]) == train(model, optimizer, data[5:])
    assert_equal(state(fresh), state(model))
    assert all(parameter.any() for parameter in offsets(model).values())


def test_compacted():
    """The same function; offsets and their optimizer's state are cut as factors are."""
    model = patched(
        models.net(dtype=torch.float64), hypernet="bert", offsets="all", dtype=torch.float64,
        interval=2, prune_per_interval=2, init_rank=3, init="random",
    )  # fmt: skip
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, 4))
    x = torch.randn(5, 16, dtype=torch.float64)
    expected, left = predict(model, x=x), sum(kept(model))
    assert left < 12
    hal_kernels.compact(model)
    # float64, sums over fewer keys
    torch.testing.assert_close(predict(model, x=x), expected, rtol=1e-9, atol=1e-12)
    for sides in (P, Q):
        assert sum(len(offsets(model)[name]) for name in sides) == left
    for parameter in offsets(model).values():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    train(model, optimizer, batches(model, 2))


def test_under_peft(tmp_path):
    import peft
    from peft_method.zoo import BY_NAME, logits, train
    from safetensors.torch import load_file

    case = BY_NAME["mlp"]
    model = case.adapted(hypernet="bert", offsets="all", init="random")
    batch = case.batch(model)
    train(model, batch, steps=3, lr=1e-3)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {n.rsplit(".hal_", 1)[1] for n in names if ".hal_offset_" in n} == {
        "offset_p", "offset_lam", "offset_q"
    }  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
