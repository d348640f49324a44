"""merge, unmerge and disabled: into plain layers, back again, and around the adapter."""

import copy

import models
import pytest
import torch
from lifecycle import HYPERNETS, foreign_net, patched, pickled, predict, prune, stir, unchanged
from torch import nn
from training import adam, assert_equal, batches, state, train

import hal_kernels
from hal_kernels import HALLinear, disabled, merge, unmerge

pytestmark = pytest.mark.usefixtures("small_hypernets")

MAKERS = {"net": models.net, "bert": models.bert, "llama": models.llama, "gpt2": models.gpt2}


def weights(model):
    """Copies of everything but the adapter."""
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("hal.")}


# -- merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "hypernet", "keep_base"),
    [
        *((make, "direct", keep) for make in MAKERS.values() for keep in (True, False)),
        *((models.net, hypernet, True) for hypernet in HYPERNETS[1:]),
    ],
)
def test_merged_model_computes_the_same(make, hypernet, keep_base):
    """Each weight has its ΔW added, of the directions kept, and stays the same parameter."""
    model = patched(make(dtype=torch.float64), hypernet=hypernet, dtype=torch.float64)
    prune(model, 0, 5)
    adapted, deltas = predict(model), {n: f.delta() for n, f in hal_kernels.factors(model).items()}
    base, parameters = weights(model), dict(model.named_parameters())
    merge(model, keep_base=keep_base)
    assert all(parameters[n] is p for n, p in model.named_parameters())
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        delta = delta.t() if make is models.gpt2 else delta  # Conv1D's weight is [d_in, d_out]
        torch.testing.assert_close(layer.weight, base[f"{name}.weight"] + delta)
    assert (predict(model) - adapted).abs().max() < 1e-12 * adapted.abs().max()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(base):
    """ΔW is added in the factors' precision, not in that of the weight."""
    model = patched(models.net(dtype=base))
    found = hal_kernels.factors(model).items()
    exact = {n: model.get_submodule(n).weight.double() + f.delta().double() for n, f in found}
    merge(model)
    half = torch.finfo(base).eps / 2
    for name, total in exact.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == base
        error = (weight.double() - total).abs()
        # Half a unit in the last place, of float16's subnormals too; 2⁻²⁰: of a float32 sum first.
        bound = total.abs() * (half + 2**-20) + torch.finfo(base).smallest_normal * half
        assert (error <= bound).all()


def test_nothing_of_the_adapter_is_left():
    for make, kind in ((models.net, nn.Linear), (models.gpt2, None)):
        plain, model = make(), make()
        seen = []
        model.register_forward_hook(lambda *arguments, seen=seen: seen.append(1))
        patched(model)
        assert merge(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert kind is None or type(model.up[0]) is kind
        assert list(model.state_dict()) == list(plain.state_dict())
        assert not hasattr(model, "hal")
        for module in model.modules():
            assert not module._forward_pre_hooks and len(module._forward_hooks) == (module is model)
            assert not module._load_state_dict_post_hooks
            assert not {"_hal", "_hal_hooks"} & vars(module).keys()
        predict(model)
        assert seen == [1]


def test_merged_model_adds_no_penalty_and_reaches_through_wrappers():
    model = patched(gamma=1.0)
    wrapper = nn.ModuleDict({"inner": model})
    expected = model.eval()(**models.batch(model))["loss"]
    assert merge(wrapper) is model
    torch.testing.assert_close(model.train()(**models.batch(model))["loss"], expected)
    unmerge(wrapper)
    assert hasattr(model, "hal")


# -- unmerge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(maker, base):
    model = patched(MAKERS[maker](dtype=base))
    adapted, before = predict(model), weights(model)
    for _ in range(3):
        merge(model)
        assert any(not torch.equal(v, before[k]) for k, v in weights(model).items())
        assert unmerge(model) is model
    assert_equal(weights(model), before)
    assert torch.equal(predict(model), adapted)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_unmerge_restores_the_whole_model(hypernet):
    model = patched(hypernet=hypernet, init_rank=3, interval=2)
    train(model, adam(model, 1e-3), batches(model, 3))
    with unchanged(model):
        unmerge(merge(model))


def test_training_goes_on_after_unmerge():
    for hypernet in ("direct", "bert"):
        model = patched(hypernet=hypernet, init_rank=3, interval=3)
        optimizer = adam(model, 1e-3)
        train(model, optimizer, batches(model, 2))
        twin = copy.deepcopy(model)
        other = adam(twin, 1e-3)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        unmerge(merge(model))
        data = batches(model, 4)
        assert train(model, optimizer, data) == train(twin, other, data)
        assert model.hal.steps == 6 and not model.hal.mask.all()
        assert_equal(state(model), state(twin))


def test_steps_of_an_optimizer_while_merged_leave_the_adapter_alone():
    model = patched()
    optimizer = adam(model)
    train(model, optimizer, batches(model, 2))
    factors = [t.clone() for t in model.hal.packed().tensors()]
    adapter = model.hal
    merge(model)
    model(**models.batch(model))["loss"].backward()
    optimizer.step()
    unmerge(model)
    assert model.hal is adapter and adapter.steps == 2
    assert all(map(torch.equal, factors, adapter.packed().tensors()))


def test_flags_of_the_user_survive():
    model = patched()
    model.up[0].bias.requires_grad_(True)
    model.classifier.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    unmerge(merge(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_of_a_merged_model_unmerges(way):
    model = patched()
    adapted, before = predict(model), weights(model)
    merge(model)
    twin = way(model)
    assert torch.equal(predict(twin), predict(model))
    unmerge(twin)
    assert_equal(weights(twin), before)
    assert torch.equal(predict(twin), adapted)
    assert not hasattr(model, "hal")


def test_a_merged_model_moved_to_another_dtype_unmerges():
    model = patched()
    before = weights(model)
    merge(model)
    unmerge(model.double())
    for key, value in weights(model).items():
        assert value.dtype == torch.float64 and torch.equal(value, before[key].double())
    assert predict(model).dtype == torch.float64
    train(model, adam(model), batches(model, 2))


# -- refusals --------------------------------------------------------------------------------------


def test_unmerge_without_the_base_weights():
    model = merge(patched(), keep_base=False)
    with unchanged(model), pytest.raises(ValueError, match=r"keep_base=False"):
        unmerge(model)
    with pytest.raises(ValueError, match=r"model is not patched"):
        merge(model)


def test_unmerge_of_what_is_not_merged():
    for model in (models.net(), patched()):
        with unchanged(model), pytest.raises(ValueError, match=r"holds no merged adapter"):
            unmerge(model)


def test_unmerge_when_the_place_is_taken():
    model = merge(patched())
    model.hal = "mine"
    with unchanged(model), pytest.raises(ValueError, match=r"attribute 'hal'"):
        unmerge(model)
    del model.hal
    unmerge(model)


def test_unmerge_when_a_layer_is_missing():
    model = patched()
    before = weights(model)
    up = merge(model).up
    del model.up
    with unchanged(model), pytest.raises(ValueError, match=r"up\.0"):
        unmerge(model)
    model.up = up
    unmerge(model)
    assert weights(model).keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


def test_patching_a_merged_model():
    model = merge(patched())
    with unchanged(model), pytest.raises(ValueError, match=r"merged adapter; unmerge it instead"):
        hal_kernels.patch_model(model)


def shared_parameter():
    model = models.net()
    model.up[1].weight = model.up[0].weight
    return patched(model)


def shared_memory():
    model = models.net()
    model.up[1].weight = nn.Parameter(model.up[0].weight.data)  # two parameters, one storage
    return patched(model)


def shared_with_an_embedding():
    return patched(models.llama(tie_word_embeddings=True), targets=["lm_head", "q_proj"])


def computed_by_a_hook():
    """Old-style weight_norm: what merge writes would be lost in the next forward."""
    model = models.net()
    nn.utils.weight_norm(model.up[0])
    return patched(model)


def too_large(value, dtype=torch.float32):
    def make():
        model = patched(models.net(dtype=dtype))
        hal_kernels.factors(model)["down.1"].lam.fill_(value)
        return model

    return make


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (shared_parameter, r"weight of 'up\.0' is shared with \['up\.1'\]"),
        (shared_memory, r"weight of 'up\.0' is shared with"),
        (shared_with_an_embedding, r"'lm_head' is shared with \['model"),
        (computed_by_a_hook, r"merge: .*'up\.0'"),
        (too_large(torch.nan), r"weight of 'down\.1' holds NaN or Inf"),
        (too_large(torch.inf), r"weight of 'down\.1' holds NaN or Inf"),
        (too_large(1e6, torch.float16), r"weight of 'down\.1' holds NaN or Inf"),
        (lambda: patched(foreign_net()), r"'up\.0' is a Scaled, whose weight"),
    ],
)
def test_weights_that_cannot_take_delta(make, message):
    model = make()
    with unchanged(model), pytest.raises(ValueError, match=message):
        merge(model)


# -- disabled --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypernet", "make"),
    [*((h, make) for h in ("direct", "bert") for make in MAKERS.values()), ("direct", foreign_net)],
)
def test_disabled_gives_the_base_model(make, hypernet):
    base = make()
    model = patched(copy.deepcopy(base), hypernet=hypernet, gamma=1.0)
    train(model, adam(model), batches(model, 3))
    inputs = models.batch(model)
    adapted = predict(model)
    assert not torch.equal(adapted, predict(base))
    with disabled(model) as same:
        assert same is model
        assert torch.equal(predict(model), predict(base))
        assert torch.equal(models.loss_of(model(**inputs)), models.loss_of(base(**inputs)))
    assert torch.equal(predict(model), adapted)


def test_a_trained_head_tied_to_the_embedding():
    """Both move in training, so both are the original ones in the block."""
    base = models.llama(tie_word_embeddings=True)
    model = patched(models.llama(tie_word_embeddings=True), modules_to_save=["lm_head"])
    train(model, adam(model), batches(model, 2))
    trained = predict(model)
    with disabled(model):
        assert torch.equal(predict(model), predict(base))
    assert torch.equal(predict(model), trained)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nested_blocks():
    model = patched()
    train(model, adam(model), batches(model, 2))
    adapted = predict(model)
    with unchanged(model), disabled(model):
        base = predict(model)
        with disabled(model):
            assert torch.equal(predict(model), base)
        assert torch.equal(predict(model), base)
    assert torch.equal(predict(model), adapted)


def test_the_adapter_is_back_after_an_exception():
    model = patched()
    train(model, adam(model), batches(model, 2))
    with unchanged(model), pytest.raises(KeyError, match="mine"), disabled(model):
        predict(model)
        raise KeyError("mine")


def test_everything_else_is_untouched():
    model = patched(hypernet="bert", allocation="ema")
    optimizer = adam(model)
    train(model, optimizer, batches(model, 2))
    models.loss_of(model(**models.batch(model))).backward()
    moments = copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()
    with unchanged(model), disabled(model):
        predict(model)
    assert torch.equal(generator, torch.get_rng_state())
    for index, values in moments["state"].items():
        assert_equal(optimizer.state_dict()["state"][index], values)


@pytest.mark.parametrize(
    "write", [hal_kernels.save_adapter, hal_kernels.export_lora, lambda model, path: merge(model)]
)
def test_the_trained_head_is_not_lost_within_a_block(write, tmp_path):
    """There the original one is in its place."""
    model = patched()
    train(model, adam(model), batches(model, 2))
    with unchanged(model), disabled(model), pytest.raises(ValueError, match="is disabled here"):
        write(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_disabled_after_unmerge_and_load(tmp_path):
    base = models.net()
    model = patched()
    train(model, adam(model), batches(model, 2))
    hal_kernels.save_adapter(model, tmp_path)
    unmerge(merge(model))
    loaded = hal_kernels.load_adapter(models.net(), tmp_path)
    for each in (model, loaded):
        with disabled(each):
            assert torch.equal(predict(each), predict(base))


def test_stirring_matters():
    """The helper that all these tests lean on: the adapter has an effect, layer by layer."""
    model = hal_kernels.patch_model(models.net(), 2, hypernet="direct", seed=0)
    base = predict(model)
    assert torch.equal(predict(models.net()), base)
    stir(model)
    assert isinstance(model.up[0], HALLinear)
    assert (predict(model) - base).abs().max() > 0.05
    assert all(f.delta().abs().max() > 0.05 for f in hal_kernels.factors(model).values())
