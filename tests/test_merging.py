"""merge, unmerge and disabled: into plain layers, back again, and around the adapter."""

import copy

import models
import pytest
import torch
from lifecycle import HYPERNETS, patched, predict, prune, small_hypernets, stir, unchanged
from safetensors.torch import load_file
from test_patched_forward import foreign_net, pickled
from torch import nn
from training import adam, assert_equal, batches, state, train

import hal_kernels
from hal_kernels import HALLinear, disabled, merge, unmerge

MAKERS = {"net": models.net, "bert": models.bert, "llama": models.llama, "gpt2": models.gpt2}


def weights(model):
    """Copies of everything but the adapter."""
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("hal.")}


# -- merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_model_computes_the_same(maker, keep_base):
    model = patched(MAKERS[maker](dtype=torch.float64), dtype=torch.float64)
    adapted = predict(model)
    merge(model, keep_base=keep_base)
    assert (predict(model) - adapted).abs().max() < 1e-12 * adapted.abs().max()


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_merging_generated_factors(hypernet, monkeypatch):
    small_hypernets(monkeypatch)
    model = patched(models.net(dtype=torch.float64), hypernet=hypernet, dtype=torch.float64)
    prune(model, 0, 5)
    adapted, deltas = predict(model), {n: f.delta() for n, f in hal_kernels.factors(model).items()}
    base = weights(model)
    merge(model)
    for name, delta in deltas.items():
        torch.testing.assert_close(model.get_submodule(name).weight, base[f"{name}.weight"] + delta)
    assert (predict(model) - adapted).abs().max() < 1e-12 * adapted.abs().max()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(base):
    """ΔW is added in the factors' precision, not in that of the weight."""
    model = patched(models.net(dtype=base))
    found = hal_kernels.factors(model).items()
    exact = {n: model.get_submodule(n).weight.double() + f.delta().double() for n, f in found}
    merge(model)
    half = torch.finfo(base).eps / 2
    for name, total in exact.items():
        error = (model.get_submodule(name).weight.double() - total).abs()
        # Half a unit in the last place, of float16's subnormals too; 2⁻²⁰: of a float32 sum first.
        bound = total.abs() * (half + 2**-20) + torch.finfo(base).smallest_normal * half
        assert (error <= bound).all()


@pytest.mark.parametrize(
    ("base", "tolerance"),
    [
        (torch.float32, 2e-6),  # a few roundings of sums over 16 to 24 terms, 2⁻²⁴ each
        (torch.bfloat16, 2e-2),  # each merged weight is rounded to 8 bits: 2⁻⁹ of it, four layers
        (torch.float16, 3e-3),  # the same with 11 bits: 2⁻¹²
    ],
)
def test_merged_model_in_storage_precision(base, tolerance):
    model = patched(models.net(dtype=base))
    adapted = predict(model)
    merge(model)
    error = (predict(model) - adapted).double().norm() / adapted.double().norm()
    assert error < tolerance
    assert model.up[0].weight.dtype == base


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


def test_weights_stay_the_same_parameters():
    model = patched()
    before = {n: p for n, p in model.named_parameters() if not n.startswith("hal.")}
    merge(model)
    assert all(before[n] is p for n, p in model.named_parameters())
    unmerge(model)
    assert all(model.get_parameter(n) is p for n, p in before.items())


def test_a_merged_model_can_be_saved_and_loaded_as_a_plain_one():
    model, plain = patched(), models.net(seed=5)
    merge(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(predict(plain), predict(model))


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
def test_unmerge_restores_the_whole_model(hypernet, monkeypatch):
    small_hypernets(monkeypatch)
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


def test_shared_weights():
    model = models.net()
    model.up[1].weight = model.up[0].weight
    patched(model)
    message = r"weight of 'up\.0' is shared with \['up\.1'\]"
    with unchanged(model), pytest.raises(ValueError, match=message):
        merge(model)


def test_weight_shared_with_an_embedding():
    model = patched(models.llama(tie_word_embeddings=True), targets=["lm_head", "q_proj"])
    with unchanged(model), pytest.raises(ValueError, match=r"'lm_head' is shared with \['model"):
        merge(model)


def test_weights_that_share_memory():
    model = models.net()
    model.up[1].weight = nn.Parameter(model.up[0].weight.data)  # two parameters, one storage
    patched(model)
    with unchanged(model), pytest.raises(ValueError, match=r"weight of 'up\.0' is shared with"):
        merge(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_that_a_hook_computes_anew():
    """Old-style weight_norm: what merge writes would be lost in the next forward."""
    model = models.net()
    nn.utils.weight_norm(model.up[0])
    patched(model)
    with unchanged(model), pytest.raises(ValueError, match=r"merge: .*'up\.0'"):
        merge(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite(value):
    model = patched()
    hal_kernels.factors(model)["down.1"].lam[0] = value
    with unchanged(model), pytest.raises(ValueError, match=r"weight of 'down\.1' holds NaN or Inf"):
        merge(model)


def test_merged_weight_beyond_the_range_of_float16():
    model = patched(models.net(dtype=torch.float16))
    hal_kernels.factors(model)["up.1"].lam.fill_(1e6)
    with unchanged(model), pytest.raises(ValueError, match=r"weight of 'up\.1' holds NaN or Inf"):
        merge(model)


def test_layers_whose_weight_is_not_theirs_to_change():
    model = patched(foreign_net())
    with unchanged(model), pytest.raises(ValueError, match=r"'up\.0' is a Scaled, whose weight"):
        merge(model)


# -- disabled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_disabled_gives_the_base_model(maker, hypernet, monkeypatch):
    small_hypernets(monkeypatch)
    base = MAKERS[maker]()
    model = patched(MAKERS[maker](), hypernet=hypernet, gamma=1.0)
    train(model, adam(model), batches(model, 3))
    inputs = models.batch(model)
    adapted = predict(model)
    assert not torch.equal(adapted, predict(base))
    with disabled(model) as same:
        assert same is model
        assert torch.equal(predict(model), predict(base))
        assert torch.equal(models.loss_of(model(**inputs)), models.loss_of(base(**inputs)))
    assert torch.equal(predict(model), adapted)


def test_disabled_foreign_layers():
    base, model = foreign_net(), foreign_net()
    base.load_state_dict(model.state_dict())
    patched(model)
    with disabled(model):
        assert torch.equal(predict(model), predict(base))


def test_the_trained_head_is_swapped_for_the_original():
    model = patched()
    original = weights(model)
    train(model, adam(model), batches(model, 2))
    trained = weights(model)
    assert not torch.equal(trained["classifier.weight"], original["classifier.weight"])
    with disabled(model):
        assert_equal(weights(model), original)
    assert_equal(weights(model), trained)


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


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_a_block_between_forward_and_backward(hypernet, monkeypatch):
    """A reference model's output is wanted just there (KL terms, DPO)."""
    small_hypernets(monkeypatch)
    model, twin = patched(hypernet=hypernet), patched(hypernet=hypernet)
    data = batches(model, 3)
    for each in (model, twin):
        train(each, adam(each), data[:2])
    loss, expected = (models.loss_of(each(**data[2])) for each in (model, twin))
    with disabled(model):
        predict(model, **data[2])
    loss.backward()
    expected.backward()
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        assert left.grad is None or torch.equal(left.grad, right.grad), name


def test_accumulation_goes_on_around_a_block():
    model, twin = patched(hypernet="bert", interval=1), patched(hypernet="bert", interval=1)
    data = batches(model, 2)
    for each in (model, twin):
        optimizer = adam(each)
        for inputs in data:
            models.loss_of(each(**inputs)).backward()
            if each is model:
                with disabled(each):
                    predict(each)
        optimizer.step()
    assert_equal(state(model), state(twin))


@pytest.mark.parametrize(
    "write",
    [
        lambda model, path: hal_kernels.save_adapter(model, path),
        lambda model, path: hal_kernels.export_lora(model, path),
        lambda model, path: merge(model),
    ],
    ids=["save_adapter", "export_lora", "merge"],
)
def test_the_trained_head_is_not_lost_within_a_block(write, tmp_path):
    """Either the trained head is what is written, or the call is refused."""
    model = patched()
    train(model, adam(model), batches(model, 2))
    trained = model.classifier.weight.detach().clone()
    try:
        with disabled(model):
            write(model, tmp_path)
    except ValueError as error:
        assert "disabled" in str(error)
    assert torch.equal(model.classifier.weight, trained)
    for file in tmp_path.glob("*.safetensors"):
        written = [v for k, v in load_file(file).items() if k.endswith("classifier.weight")]
        assert len(written) == 1 and torch.equal(written[0], trained)


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
