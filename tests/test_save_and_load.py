"""save_adapter and load_adapter: what comes back, into which models, and what does not fit."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict, prune, unchanged
from torch import nn
from training import adam, assert_equal, batches, state, train, trainable

import hal_kernels
from hal_kernels import load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("small_hypernets")


# -- round trips -----------------------------------------------------------------------------------


SCORES = ("sensitivity", "ema", "magnitude")
KINDS = [("direct", "anchor", score) for score in SCORES]  # update has no meaning there
KINDS += [
    (None, "spectral", "sensitivity"), ("bert", "anchor", "ema"), ("bert", "replace", "magnitude"),
    ("mlp", "residual", "ema"), ("cnn", "anchor", "sensitivity"),
]  # fmt: skip


@pytest.mark.parametrize(("hypernet", "update", "allocation"), KINDS)
def test_everything_comes_back(hypernet, update, allocation, tmp_path):
    options = {"init_rank": 3, "interval": 2, "dropout": 0.1, "prune_per_interval": 2}
    options |= {"hypernet": hypernet, "update": update, "allocation": allocation}
    model = patched(**options)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, 3))
    save_adapter(model, tmp_path)
    trained_otherwise = patched(**options, seed=8)
    train(trained_otherwise, adam(trained_otherwise, 1e-2), batches(model, 5, size=3))
    for target in (models.net(), patched(**options, seed=7), trained_otherwise):
        loaded = load_adapter(target, tmp_path)
        assert loaded is target
        assert_equal(state(loaded), state(model))
        assert loaded.hal.config == model.hal.config and loaded.hal.steps == 3
        assert hal_kernels.rank_pattern(loaded) == hal_kernels.rank_pattern(model)
        assert torch.equal(predict(loaded), predict(model))
        assert not loaded.hal.mask.all()


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(models.bert, torch.bfloat16), (models.llama, torch.float32), (models.gpt2, torch.bfloat16)],
)
def test_models_and_dtypes(make, dtype, tmp_path):
    model = patched(make(dtype=dtype), dtype=dtype)
    train(model, adam(model), batches(model, 2))
    save_adapter(model, tmp_path)
    for target in (make(dtype=dtype), patched(make(dtype=dtype), dtype=dtype, seed=9)):
        loaded = load_adapter(target, tmp_path)
        assert_equal(state(loaded), state(model))
        assert torch.equal(predict(loaded), predict(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_moved_to_another_dtype(dtype, tmp_path):
    model = patched().to(dtype)
    train(model, adam(model), batches(model, 2))
    save_adapter(model, tmp_path)
    loaded = load_adapter(models.net(dtype=dtype), tmp_path)
    assert {n: t.dtype for n, t in state(loaded).items()} == {
        n: t.dtype for n, t in state(model).items()
    }
    assert_equal(state(loaded), state(model))


@pytest.mark.parametrize("options", [{}, {"init_rank": 3}, {"rank_pattern": {"wide": 4}}], ids=str)
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_layers_narrower_than_the_rank(hypernet, options, tmp_path):
    """A gate or a value head has a rank of its own."""

    def make():
        torch.manual_seed(0)
        thin = nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 16))
        return models.Holder(wide=nn.Linear(16, 16), thin=thin)

    model = patched(make(), rank=3, hypernet=hypernet, interval=1, **options)
    train(model, adam(model), batches(model, 3))
    save_adapter(model, tmp_path)
    for target in (make(), patched(make(), rank=3, hypernet=hypernet, interval=1, **options)):
        loaded = load_adapter(target, tmp_path)
        assert_equal(state(loaded), state(model))
        assert hal_kernels.rank_pattern(loaded) == hal_kernels.rank_pattern(model)
        assert loaded.hal.budget == model.hal.budget


def test_layers_that_are_one_layer_here(tmp_path):
    model = models.Holder(first=nn.Linear(16, 16), second=nn.Linear(16, 16))
    other = copy.deepcopy(model)
    save_adapter(patched(model), tmp_path)
    other.second = other.first
    message = r"adapts one layer under several names of \['first', 'second'\]"
    with unchanged(other), pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)


def test_a_modules_buffers_come_back(tmp_path):
    def make():
        torch.manual_seed(0)
        model = models.net()
        model.classifier = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
        return model

    model = patched(make())
    train(model, adam(model), batches(model, 3))
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert_equal(loaded.classifier.state_dict(), model.classifier.state_dict())
    assert loaded.classifier[0].num_batches_tracked == 3
    assert torch.equal(predict(loaded), predict(model))


def test_trained_modules_that_share_a_parameter(tmp_path):
    options = {"modules_to_save": ["lm_head", "embed_tokens"]}
    model = patched(models.llama(tie_word_embeddings=True), **options)
    train(model, adam(model), batches(model, 2))
    save_adapter(model, tmp_path)
    loaded = load_adapter(models.llama(tie_word_embeddings=True), tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(predict(loaded), predict(model))


def test_the_loaded_model_is_set_up_as_by_patching(saved):
    model, folder = saved
    loaded = load_adapter(models.net(), folder)
    for (name, found), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert found.requires_grad == expected.requires_grad, name
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    with hal_kernels.disabled(loaded):  # the head of before the load
        assert torch.equal(predict(loaded), predict(models.net()))
    with torch.no_grad(), pytest.raises(ValueError, match="patched already"):
        hal_kernels.patch_model(loaded)


def test_loading_keeps_the_parameters_an_optimizer_holds(saved):
    model, folder = saved
    target = patched(init_rank=3, interval=2, allocation="ema", seed=5)
    optimizer = adam(target)
    train(target, optimizer, batches(target, 1))
    before = trainable(target)
    load_adapter(target, folder)
    assert all(map(lambda a, b: a is b, before, trainable(target)))
    assert_equal(state(target), state(model))
    train(target, optimizer, batches(target, 1))
    assert not torch.equal(target.hal.p_16, model.hal.p_16) and target.hal.steps == 6


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_compacted_checkpoint_into_a_model_that_was_not(hypernet, tmp_path):
    options = {"hypernet": hypernet, "init_rank": 3, "allocation": "ema"}
    model = patched(**options)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, 2))
    prune(model, 0, 1, 2, 7)
    hal_kernels.compact(model)
    save_adapter(model, tmp_path)
    target = patched(**options, seed=4)
    again = adam(target, 1e-3)
    before = trainable(target)
    load_adapter(target, tmp_path)
    assert all(map(lambda a, b: a is b, before, trainable(target)))
    assert torch.equal(predict(target), predict(model))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    data = batches(model, 2)
    assert train(target, again, data) == train(model, optimizer, data)


def test_compacted_checkpoint_into_a_model_whose_optimizer_has_stepped(tmp_path):
    model = patched(init_rank=3)
    prune(model, 0, 1, 2, 7)
    hal_kernels.compact(model)
    save_adapter(model, tmp_path)
    target = patched(init_rank=3)
    optimizer = adam(target)
    train(target, optimizer, batches(target, 1))
    load_adapter(target, tmp_path)
    train(target, optimizer, batches(target, 2))  # old moments must not break it
    assert target.hal.lam.shape == (8,)


def test_pruned_checkpoint_into_a_compacted_model(tmp_path):
    model = patched(init_rank=3)
    prune(model, 0, 5)
    save_adapter(model, tmp_path)
    hal_kernels.compact(model)
    load_adapter(model, tmp_path)
    assert model.hal.lam.shape == (12,) and int(model.hal.mask.sum()) == 10
    train(model, adam(model), batches(model, 2))


# -- checkpoints that don't fit the model ----------------------------------------------------------


def misfit(target, folder, message, error=ValueError):
    with unchanged(target), pytest.raises(error, match=message):
        load_adapter(target, folder)


def test_other_layers(saved):
    folder = saved[1]
    other = r"layers are not the model's; differing: \['down\.0', 'down\.1'\]"
    options = {"init_rank": 3, "allocation": "ema"}
    misfit(patched(targets=["0", "1"], exclude=r"down.*", **options), folder, other)
    misfit(models.net(hidden=20), folder, r"'up\.0' as 16 -> 24, here it is 16 -> 20")
    misfit(models.net(depth=1), folder, r"'up\.1', which Net lacks")
    misfit(models.bert(), folder, r"'up\.0', which BertForSequenceClassification lacks")
    deeper = patched(models.net(depth=3), **options)
    misfit(deeper, folder, r"differing: \['down\.2', 'up\.2'\]")


def test_other_kinds_of_layers(saved):
    folder = saved[1]
    model = models.net()
    model.up[0] = nn.Conv1d(16, 24, 1)
    misfit(model, folder, r"'up\.0', which is a Conv1d here")
    model = models.net()
    model.up[0] = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 24)
    misfit(model, folder, r"'up\.0'")


def test_other_head(saved):
    model = models.net()
    model.classifier = nn.Linear(16, 5)
    misfit(model, saved[1], r"'weight' for 'classifier' has shape \(3, 16\), expected \(5, 16\)")
    del model.classifier
    misfit(model, saved[1], r"'classifier', which Net lacks")


@pytest.mark.parametrize(
    "options",
    [{"hypernet": "bert"}, {"hypernet": "mlp", "allocation": "ema"}, {"allocation": "sensitivity"}],
)
def test_other_kind_of_adapter(options, saved):
    message = (
        r"made with hypernet='direct', update='anchor', allocation='ema', norm_first=False, "
        r"hidden=None; "
    )
    misfit(patched(init_rank=3, **options), saved[1], message)


def test_other_dtypes_and_trained_modules(saved, tmp_path):
    options = {"init_rank": 3, "allocation": "ema"}
    double = r"the checkpoint's factors have dtype torch\.float32, the model's torch\.float64"
    misfit(patched(dtype=torch.float64, **options), saved[1], double)
    headless = patched(modules_to_save=(), exclude=["classifier"], **options)
    misfit(headless, saved[1], r"trained modules \['classifier'\], the model trains \[\]")


def test_norm_first(tmp_path):
    """Saved and loaded; the same tensors in the other order are another function."""
    model = patched(hypernet="bert", norm_first=True)
    save_adapter(model, tmp_path)
    for target in (models.net(), patched(hypernet="bert", norm_first=True, seed=7)):
        loaded = load_adapter(target, tmp_path)
        assert loaded.hal.config.norm_first and loaded.hal.hypernet.body.norm_first
        assert torch.equal(predict(loaded), predict(model))
    message = r"norm_first=True, hidden=None; the model was patched with .*, False, None"
    misfit(patched(hypernet="bert"), tmp_path, message)


def test_layers_that_cannot_be_adapted(saved):
    with torch.device("meta"):
        model = models.Net()
    misfit(model, saved[1], r"'up\.0' is on the meta device")
    model = models.net()
    layer = model.down[0]
    layer.forward = lambda x: layer.weight @ x
    misfit(model, saved[1], r"'down\.0' has a forward function of its own")


def test_models_in_the_wrong_state(saved):
    folder = saved[1]
    misfit(hal_kernels.merge(patched()), folder, r"merged adapter; unmerge it")
    model = models.net()
    model.hal = 1
    misfit(model, folder, r"attribute 'hal'")
