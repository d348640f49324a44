"""Several adapters on one model, their names, their files, and what is refused."""

import copy
import re

import peft
import pytest
import torch
from peft import functional
from safetensors.torch import load_file, save_file
from training import trainable

import hal_kernels
from hal_peft.layer import HyperAdaLoraLinear

from . import zoo

BERT, MLP, LLAMA = (zoo.BY_NAME[name] for name in ("bert", "mlp", "llama"))
WEIGHTS = "adapter_model.safetensors"


ALONE = {"modules_to_save": None, "exclude_modules": ["classifier"]}


def mlp(**options):
    return MLP.adapted(**ALONE | options)


def plain(**options):
    return MLP.config(**ALONE | options)


# PEFT warns of names that are part of a method's prefix, here "hal_"; they work.
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize(
    ("name", "hypernet"),
    [("other", None), ("hal", None), ("a", "bert"), ("adapter", "direct"), ("up", None),
     ("model", "bert")],
)  # fmt: skip
def test_names(name, hypernet, tmp_path):
    """Saved under one name and loaded under another, whatever the names are part of."""
    base = MLP.base()
    model = peft.get_peft_model(base, MLP.config(hypernet=hypernet), name)
    zoo.train(model, MLP.batch(model))
    expected = zoo.logits(model, MLP.batch(model))
    model.save_pretrained(tmp_path)
    assert not any(
        f".{name}." in k and name == "other" for k in load_file(tmp_path / name / WEIGHTS)
    )
    for new in ("default", "again", name):
        loaded = peft.PeftModel.from_pretrained(MLP.base(), tmp_path / name, new)
        assert torch.equal(zoo.logits(loaded, MLP.batch(loaded)), expected)


@pytest.mark.parametrize("names", [("adapter", "adapter_2"), ("default", "default_1"), ("b", "bb")])
def test_names_within_names(names, tmp_path):
    """Each adapter is saved with its own tensors."""
    model = peft.get_peft_model(MLP.base(), plain(), names[0])
    model.add_adapter(names[1], plain(r=3))
    expected = {}
    for name in names:
        zoo.perturb(model, name)
        model.set_adapter(name)
        expected[name] = zoo.logits(model, MLP.batch(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MLP.base(), _folder(tmp_path, names[0]), "x")
    loaded.load_adapter(_folder(tmp_path, names[1]), "y")
    for name, new in zip(names, "xy", strict=True):
        loaded.set_adapter(new)
        assert torch.equal(zoo.logits(loaded, MLP.batch(model)), expected[name])


def _folder(path, name):
    return path if name == "default" else path / name


@pytest.mark.parametrize("name", ["hypernet", "body", "lam", "mask", "classifier", "weight"])
def test_names_of_the_adapters_own(name):
    """They would be taken for a part of another adapter's tensors' names."""
    base = MLP.base()
    text = str(base)
    with pytest.raises(ValueError, match=rf"adapter_name is '{name}', expected none of"):
        peft.get_peft_model(base, MLP.config(hypernet="bert"), name)
    assert str(base) == text


@pytest.mark.parametrize(
    ("first", "second"), [("model", "x"), ("x", "model"), ("x", "hal_adapters"), ("q_16", "x")]
)
def test_names_that_can_not_stand_beside_another(first, second):
    """PEFT would leave the other's tensors out of its file, as the named adapter's."""
    some = {"target_modules": ["classifier"], "exclude_modules": None} if first == "q_16" else {}
    model = peft.get_peft_model(MLP.base(), plain(**some), first)
    text = str(model)
    with pytest.raises(ValueError, match=f"adapter_name is '{second}': an adapter called"):
        model.add_adapter(second, MLP.config())
    assert str(model) == text and list(model.peft_config) == [first]


def test_selected_adapters(tmp_path):
    model = mlp()
    model.add_adapter("other", plain())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["other"]
    assert not (tmp_path / WEIGHTS).exists()


def test_delete_adapter():
    """Inactive, active, merged, unknown, the last one."""
    model = mlp()
    base = zoo.logits(MLP.base(), MLP.batch(model))
    zoo.perturb(model)
    first = zoo.logits(model, MLP.batch(model))
    model.add_adapter("inactive", plain(hypernet="bert"))
    model.add_adapter("active", plain())
    zoo.perturb(model, "active")
    hooks = len(model.get_base_model()._forward_hooks)
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("inactive")
    assert torch.equal(zoo.logits(model, MLP.batch(model)), first)
    assert len(model.get_base_model()._forward_hooks) == hooks - 1
    model.set_adapter("active")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("active")
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="active was active which is now deleted"):
        model.delete_adapter("active")
    assert model.active_adapters == ["default"]
    assert torch.equal(zoo.logits(model, MLP.batch(model)), first)
    model.delete_adapter("default")
    assert torch.equal(zoo.logits(model.base_model.model, MLP.batch(model)), base)
    assert not any("hal_" in name for name, _ in model.named_parameters())


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, HyperAdaLoraLinear)]


def test_adapters_set_on_the_layers():
    """By `peft.functional` or one by one, past the tuner: outputs are as by the tuner's methods."""
    model = mlp()
    model.add_adapter("other", plain(r=3))
    batch, expected = MLP.batch(model), {}
    base = zoo.logits(MLP.base(), batch)
    for name in ("default", "other"):
        zoo.perturb(model, name)
        model.set_adapter(name)
        expected[name] = zoo.logits(model, batch)
    model.base_model.set_adapter(["default", "other"])
    both = zoo.logits(model, batch)

    functional.set_adapter(model, "default")
    assert torch.equal(zoo.logits(model, batch), expected["default"])
    assert model.active_adapters == ["default"]
    assert hal_kernels.rank_pattern(model) == model.rank_pattern() == model.rank_pattern("default")
    functional.set_adapter(model, ["default", "other"])
    assert torch.equal(zoo.logits(model, batch), both)
    model.set_adapter("default")
    for layer in layers_of(model):
        layer.set_adapter(["other"])
    assert torch.equal(zoo.logits(model, batch), expected["other"])
    for layer in layers_of(model):
        layer.enable_adapters(False)
    assert torch.equal(zoo.logits(model, batch), base)
    assert zoo.adapter_of(model).disabled and zoo.adapter_of(model, "other").disabled
    for layer in layers_of(model):
        layer.enable_adapters(True)
        layer.merge()
    assert zoo.relative_error(zoo.logits(model, batch), expected["other"]) < 1e-6
    for layer in layers_of(model):
        layer.unmerge()
    copied = copy.deepcopy(model)
    functional.set_adapter(model, "default")
    assert torch.equal(zoo.logits(copied, batch), expected["other"])

    for each, gone, left in ((model, "other", "default"), (copied, "default", "other")):
        hooks = len(each.get_base_model()._forward_hooks)
        functional.delete_adapter(each, gone, prefix="hal_")
        assert torch.equal(zoo.logits(each, batch), expected[left])
        assert list(each.base_model.hal_adapters) == [left]
        assert len(each.get_base_model()._forward_hooks) == hooks - 1


def test_loading_beside_one_that_trains(tmp_path):
    """A further adapter for inference leaves the first one's training as it was."""
    model = mlp(hypernet="bert")
    zoo.perturb(model)
    model.save_pretrained(tmp_path)
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.load_adapter(tmp_path, "other")
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(after[name] == flag for name, flag in flags.items())
    assert not any(flag for name, flag in after.items() if ".other." in name)
    model.load_adapter(tmp_path, "third", is_trainable=True)
    assert all(p.requires_grad for p in zoo.adapter_of(model, "third").parameters())


def test_only_the_active_adapter_advances():
    """Its penalty alone is in the loss, its steps are counted, its ranks are allocated."""
    options = {"interval": 1, "prune_per_interval": 2, "gamma": 1.0}
    model = mlp(**options)
    model.add_adapter("other", plain(r=1, init_r=4, **options))
    batch = MLP.batch(model)
    task = model.eval()(**batch)["loss"]
    loss = model.train()(**batch)["loss"]
    penalty = hal_kernels.penalty(model)
    assert penalty > 0.01
    torch.testing.assert_close(loss, task + penalty)
    zoo.train(model, batch, steps=2)
    assert (zoo.adapter_of(model).steps, zoo.adapter_of(model, "other").steps) == (2, 0)
    assert sum(model.rank_pattern().values()) == 4 * 3 - 4
    assert set(model.rank_pattern("other").values()) == {4}
    model.set_adapter("other")
    zoo.train(model, batch, steps=1)
    assert (zoo.adapter_of(model).steps, zoo.adapter_of(model, "other").steps) == (2, 1)
    with pytest.raises(ValueError, match="adapter_name is 'x', expected one of"):
        model.rank_pattern("x")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter_name is None, expected one of"):
        model.rank_pattern()
    with pytest.raises(ValueError, match="holds 2 adapters of which 2 are enabled"):
        hal_kernels.penalty(model)
    zoo.train(model, batch, steps=1)
    assert (zoo.adapter_of(model).steps, zoo.adapter_of(model, "other").steps) == (3, 2)


def test_hal_kernels_sees_the_active_adapter():
    model = mlp()
    model.add_adapter("other", plain(r=1))
    for name in ("default", "other"):
        model.set_adapter(name)
        assert hal_kernels.rank_pattern(model) == model.rank_pattern(name)
        assert torch.equal(hal_kernels.penalty(model), model.base_model.penalty(name))
        assert hal_kernels.factors(model).keys() == model.factors().keys()


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_training_goes_on_after_loading(hypernet, tmp_path):
    """Bit for bit the run that was not interrupted: counter, masks and scores are saved."""
    options = {
        "hypernet": hypernet, "interval": 5, "prune_per_interval": 3, "allocation": "ema",
    }  # fmt: skip
    sgd = torch.optim.SGD  # which has no state of its own to carry over
    model = MLP.adapted(**options)
    batch = MLP.batch(model)
    zoo.train(model, batch, steps=3, optimizer=sgd, lr=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MLP.base(), tmp_path, is_trainable=True)
    for each in (model, loaded):
        zoo.train(each, batch, steps=3, optimizer=sgd, lr=1e-3)
    assert model.rank_pattern() == loaded.rank_pattern()
    assert sum(model.rank_pattern().values()) == 4 * 3 - 3
    assert torch.equal(zoo.logits(loaded, batch), zoo.logits(model, batch))


@pytest.mark.parametrize("hypernet", [None, "bert"])
def test_compact(hypernet, tmp_path):
    """Smaller files, which load into an adapter that starts with its full ranks."""
    model = MLP.adapted(hypernet=hypernet, interval=1, prune_per_interval=4)
    batch = MLP.batch(model)
    zoo.train(model, batch, steps=1)
    expected, ranks = zoo.logits(model, batch), model.rank_pattern()
    model.save_pretrained(tmp_path / "full")
    model.compact()
    assert zoo.relative_error(zoo.logits(model, batch), expected) < 1e-6
    assert zoo.adapter_of(model).layout.ranks == list(ranks.values())
    model.save_pretrained(tmp_path / "compact")
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            MLP.base(), tmp_path / "compact", low_cpu_mem_usage=low, is_trainable=True
        )
        assert zoo.adapter_of(loaded).layout.ranks == list(ranks.values())
        assert zoo.relative_error(zoo.logits(loaded, batch), expected) < 1e-6
        zoo.train(loaded, batch, steps=1)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("compact", "full")]
    assert sizes[0] < sizes[1]


def test_files_say_what_they_are(tmp_path):
    """One tensor per layer and factor, under PEFT's prefix."""
    BERT.adapted(target_modules=["query"], modules_to_save=None).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / WEIGHTS))
    layer = "base_model.model.bert.encoder.layer.1.attention.self.query"
    assert {f"{layer}.hal_{part}" for part in ("p", "lam", "q", "mask")} <= names
    assert "base_model.hal_adapter.progress" in names
    assert "base_model.model.classifier.weight" in names


UP, HEAD = "base_model.model.up.0.hal_", "base_model.model.classifier."
STEPS = "base_model.hal_adapter.progress"
LAYER = r"base_model\.model\..*\.hal_"


def put(name, change):
    """A function that sets a tensor to what `change` makes of it."""
    return lambda tensors: tensors.update({name: change(tensors.get(name, torch.ones(3)))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}q"), r"it lacks \['base_model\.model\.up\.0\.hal_q'\]"),
        (put(f"{UP}z", torch.clone), r"also has \['.*hal_z'\]"),
        (put(f"{UP}p", lambda t: t[:2]), r"hal_p' .* has shape \(2, 16\), expected"),
        (put(f"{UP}p", lambda t: t[:, :3]), r"shape \(3, 3\), expected \(3, 16\)"),
        (put(f"{UP}mask", lambda t: t[:, None]), r"shape \(3, 1\), expected \(3,\)"),
        (put(f"{UP}mask", lambda t: t / 2), r"hal_mask' .* other values than"),
        (put(f"{UP}lam", torch.max), r"hal_lam has shape \(\), expected at most 16 numbers"),
        (put(f"{UP}lam", lambda t: t.repeat(6)), r"hal_lam has shape \(18,\), expected at most 16"),
        (
            lambda t: t.update({k: v[:0] for k, v in t.items() if re.match(LAYER, k)}),
            r"no direction in any layer",
        ),
        (put(f"{UP}lam", torch.Tensor.int), r"hal_lam' .* has dtype torch\.int32"),
        (put(f"{UP}q", lambda t: t * torch.nan), r"hal_q' .* holds NaN or Inf"),
        (
            put(STEPS, lambda t: t.repeat(2)),
            r"progress' for the adapter has shape \(2,\), expected \(1,\)",
        ),
        (put(STEPS, lambda t: t - 5), r"progress does not fit: _extra_state begins with -5\.0"),
        (put(STEPS, lambda t: t * torch.nan), r"progress' for the adapter has dtype"),
        (lambda t: t.pop(STEPS), r"it lacks \['.*adapter\.progress"),
        (put("base_model.model.x", torch.clone), r"unexpected \['.*model\.x'\]"),
        (put(f"{HEAD}bias", lambda t: t[:2]), r"bias' .* has shape \(2,\)"),
        (put(f"{HEAD}bias", lambda t: t * torch.nan), r"bias' .* holds NaN or Inf"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    model = mlp()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / WEIGHTS)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_auto_model(tmp_path):
    """The base model is found by the name in the adapter's config."""
    LLAMA.base().save_pretrained(tmp_path / "base")
    base = type(LLAMA.base()).from_pretrained(tmp_path / "base")
    for task, kind in (
        ("CAUSAL_LM", peft.AutoPeftModelForCausalLM),
        (None, peft.AutoPeftModel),  # by the base model's class, which PEFT notes
    ):
        model = peft.get_peft_model(copy.deepcopy(base), LLAMA.config(task_type=task)).eval()
        zoo.perturb(model)
        model.save_pretrained(tmp_path / f"{task}")
        loaded = kind.from_pretrained(tmp_path / f"{task}")
        batch = LLAMA.batch(base)
        assert torch.equal(zoo.logits(loaded, batch), zoo.logits(model, batch))


def test_what_is_refused(tmp_path):
    model = mlp()
    zoo.perturb(model)
    with pytest.raises(TypeError, match="does not support add_weighted_adapter; export_lora"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="adapter_names: HyperAdaLoRA does not support a batch"):
        model(**MLP.batch(model), adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="uses shared state"):
        peft.inject_adapter_in_model(plain(), MLP.base())
    with pytest.raises(ValueError, match="uses shared state"):
        BERT.base().add_adapter(BERT.config())
    with pytest.raises(ValueError, match=r"(?i)not (supported|compatible)|Only .* tuner"):
        peft.get_peft_model(MLP.base(), plain(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", peft.LoraConfig(target_modules=["up.0"]))
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", plain())
    with pytest.raises(ValueError, match="Adapter other not found"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="model is not patched"):
        hal_kernels.merge(model)


def test_beside_patch_model():
    """One of the two: an adapter's own linear layers are no targets, nor are adapted layers."""
    model = mlp(hypernet="bert")
    text = str(model)
    with pytest.raises(ValueError, match=r"holds an adapter already, 'base_model\.hal_adapters\.d"):
        hal_kernels.patch_model(model, 2)
    assert str(model) == text
    patched = hal_kernels.patch_model(MLP.base(), 2, hypernet="direct")
    with pytest.raises(TypeError, match="is a HALLinear, expected a linear layer"):
        peft.get_peft_model(patched, plain(target_modules=["up.0"]))


@pytest.mark.parametrize("case", [BERT, MLP, zoo.BY_NAME["gpt2"]], ids=lambda case: case.name)
def test_convert_to_lora(case):
    """PEFT's own conversion, by the singular values of each ΔW."""
    model = case.adapted(modules_to_save=None)
    zoo.perturb(model)
    batch = case.batch(model.get_base_model())
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=3)
    lora = peft.get_peft_model(case.base(), config)
    peft.set_peft_model_state_dict(lora, state)
    assert zoo.relative_error(zoo.logits(lora, batch), zoo.logits(model, batch)) < 2e-5


def test_tied_weights_are_not_merged(tmp_path):
    """The embedding would change with the head. Training, saving and exporting work."""
    tied = zoo.BY_NAME["tied"]
    model = tied.adapted(target_modules=["lin", "head"])
    batch = tied.batch(model)
    zoo.train(model, batch)
    expected = zoo.logits(model, batch)
    state = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weight of 'head' is shared with \['embed'\]"):
            merge()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tied.base(), tmp_path)
    assert torch.equal(zoo.logits(loaded, batch), expected)
    base = model.get_base_model()
    assert base.head.weight is base.embed.weight
    assert base.head.base_layer.weight is base.embed.weight


def test_a_shared_layer_is_adapted_under_both_names():
    shared = zoo.BY_NAME["shared"]
    model = shared.adapted()
    base = model.get_base_model()
    assert base.first is base.second
    unloaded = model.unload()
    assert unloaded.first is unloaded.second and type(unloaded.first) is torch.nn.Linear


def test_trainable_is_what_an_optimizer_takes():
    model = BERT.adapted()
    count, total = model.get_nb_trainable_parameters()
    assert count == sum(p.numel() for p in trainable(model)) < total
