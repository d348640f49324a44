"""What every adapter under PEFT does, for every architecture (after PEFT's PeftCommonTester)."""

import copy
import json
import warnings

import peft
import pytest
import torch

import hal_peft
from hal_peft.layer import HyperAdaLoraLinear

from . import zoo

# float32: two matrix products more or less, of 16 to 64 terms, in at most a dozen layers.
CLOSE = 2e-5
# Models whose layers are called as another one's are left to the nightly run.
ALIKE = {"roberta": "bert", "qwen2": "llama", "mistral": "llama"}


def on(name, *others):
    marks = pytest.mark.slow if name in ALIKE else ()
    return pytest.param(
        zoo.BY_NAME[name], *others, marks=marks, id="-".join([name, *map(str, others)])
    )


EACH = pytest.mark.parametrize("case", [on(name) for name in zoo.BY_NAME])
# Hypernetworks know no model, only layers: linear, Conv1D, shared by name, called twice.
KINDS = pytest.mark.parametrize(
    ("case", "hypernet"),
    [on(name, None) for name in zoo.BY_NAME]
    + [on(name, "direct") for name in ("bert", "gpt2", "shared")]
    + [on(name, "bert") for name in ("llama", "gpt2", "twice")],
)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names_of_trained(model):
    """What is to be trained: the adapter's own, and copies in modules_to_save."""
    return {
        name
        for name, _ in model.named_parameters()
        if ".hal_adapters.default." in name or ".modules_to_save.default." in name
    }


@KINDS
def test_identity_at_start(case, hypernet):
    base = case.base()
    batch = case.batch(base)
    before = zoo.logits(base, batch)
    model = peft.get_peft_model(base, case.config(hypernet=hypernet))
    assert any(isinstance(m, HyperAdaLoraLinear) for m in model.modules())
    assert torch.equal(zoo.logits(model, batch), before)


@KINDS
def test_gradients(case, hypernet):
    """The adapter and modules_to_save get gradients, all of them, and nothing else does."""
    model = case.adapted(hypernet=hypernet).train()
    zoo.perturb(model)
    expected = names_of_trained(model)
    assert trainable(model) == expected and expected
    model(**case.batch(model))["loss"].backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == expected
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@KINDS
def test_training_changes_the_output_alone(case, hypernet):
    model = case.adapted(hypernet=hypernet)
    batch = case.batch(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = zoo.logits(model, batch)
    zoo.train(model, batch, steps=2)
    assert not torch.equal(zoo.logits(model, batch), before)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@KINDS
def test_save_and_load(case, hypernet, tmp_path):
    model = case.adapted(hypernet=hypernet)
    batch = case.batch(model)
    zoo.train(model, batch, steps=2)
    expected = zoo.logits(model, batch)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(zoo.logits(loaded, batch), expected)
    assert not trainable(loaded)
    assert zoo.adapter_of(loaded).steps == 2
    for key, value in zoo.adapter_of(model).state_dict().items():
        assert torch.equal(zoo.adapter_of(loaded).state_dict()[key], value), key


@KINDS
def test_merge(case, hypernet):
    """Merged is unmerged; twice is once; back is exactly back."""
    model = case.adapted(hypernet=hypernet)
    zoo.perturb(model)
    batch = case.batch(model)
    plain = {n: p.clone() for n, p in model.named_parameters()}
    expected = zoo.logits(model, batch)
    model.merge_adapter()
    merged = {n: p.clone() for n, p in model.named_parameters()}
    assert any(not torch.equal(merged[n], plain[n]) for n in plain)
    assert zoo.relative_error(zoo.logits(model, batch), expected) < CLOSE
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert all(torch.equal(p, merged[n]) for n, p in model.named_parameters())
    model.unmerge_adapter()
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters())
    assert torch.equal(zoo.logits(model, batch), expected)


@KINDS
def test_merge_and_unload(case, hypernet):
    model = case.adapted(hypernet=hypernet)
    zoo.perturb(model)
    batch = case.batch(model)
    expected = zoo.logits(model, batch)
    merged = model.merge_and_unload(safe_merge=True)
    base = case.base()
    assert type(merged) is type(base) and str(merged) == str(base)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not merged._forward_hooks and not merged._forward_pre_hooks
    assert zoo.relative_error(zoo.logits(merged, batch), expected) < CLOSE


@EACH
def test_unload(case):
    """The base model, bit for bit, and no trace of the adapter; also after a merge."""
    base = case.base()
    batch = case.batch(base)
    expected = zoo.logits(base, batch)
    text, state = str(base), copy.deepcopy(base.state_dict())
    for merge in (False, True):
        model = peft.get_peft_model(base, case.config(modules_to_save=None, task_type=None))
        zoo.perturb(model)
        assert not torch.equal(zoo.logits(model, batch), expected)
        if merge:
            model.merge_adapter()
        unloaded = model.unload()
        assert unloaded is base and str(base) == text
        assert not base._forward_hooks and not base._forward_pre_hooks
        assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
        assert torch.equal(zoo.logits(base, batch), expected)


@EACH
def test_safe_merge_rejects_nan(case):
    """In whichever layer it is, and before anything changes."""
    model = case.adapted()
    zoo.perturb(model)
    with torch.no_grad():
        zoo.adapter_of(model).lam[-1] = torch.nan
    before = {n: p.clone() for n, p in model.named_parameters() if "hal_adapters" not in n}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        after = dict(model.named_parameters())
        assert all(torch.equal(after[n], value) for n, value in before.items())
    assert model.get_model_status().merged_adapters == []


@EACH
def test_disable_adapter(case):
    """The base model's output: while merged too, and the adapter is back after an exception."""
    base = case.base()
    batch = case.batch(base)
    before = zoo.logits(base, batch)
    model = peft.get_peft_model(base, case.config())
    zoo.perturb(model)
    adapted = zoo.logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, batch), before)
        with model.disable_adapter():
            assert torch.equal(zoo.logits(model, batch), before)
        assert torch.equal(zoo.logits(model, batch), before)
    assert torch.equal(zoo.logits(model, batch), adapted)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(zoo.logits(model, batch), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, batch), before)
    assert torch.equal(zoo.logits(model, batch), adapted)
    assert trainable(model) == names_of_trained(model)


@EACH
def test_several_adapters(case):
    base = case.base()
    batch = case.batch(base)
    before = zoo.logits(base, batch)
    alone = {"task_type": None, "modules_to_save": []}  # of which one can be active at a time
    model = peft.get_peft_model(base, case.config(**alone))
    zoo.perturb(model)
    first = zoo.logits(model, batch)
    model.add_adapter("other", case.config(r=3, target_modules=[case.some_target], **alone))
    assert torch.equal(zoo.logits(model, batch), first)
    assert trainable(model) == names_of_trained(model)
    model.set_adapter("other")
    assert torch.equal(zoo.logits(model, batch), before)
    assert all(".other." in name for name in trainable(model))
    zoo.perturb(model, "other")
    second = zoo.logits(model, batch)
    assert not torch.equal(second, first) and not torch.equal(second, before)
    model.base_model.set_adapter(["default", "other"])
    both = zoo.logits(model, batch)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    for name in ("default", "other"):  # the way back leads to before the first
        model.merge_adapter([name])
    assert zoo.relative_error(zoo.logits(model, batch), both) < CLOSE
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(zoo.logits(model, batch), first)
    model.delete_adapter("other")
    assert torch.equal(zoo.logits(model, batch), first)
    assert list(model.peft_config) == list(model.base_model.hal_adapters) == ["default"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [on(name, torch.bfloat16) for name in zoo.BY_NAME]
    + [on(name, torch.float16) for name in ("bert", "gpt2", "mlp")],
)
def test_half_precision_base(case, dtype):
    """Factors stay float32, outputs have the base's dtype, and training and merging work."""
    base = case.base(dtype=dtype)
    batch = case.batch(base)
    before = zoo.logits(base, batch)
    model = peft.get_peft_model(base, case.config())
    assert {p.dtype for p in zoo.adapter_of(model).parameters()} == {torch.float32}
    found = zoo.logits(model, batch)
    assert found.dtype == before.dtype == dtype and torch.equal(found, before)
    zoo.train(model, batch, steps=1, optimizer=torch.optim.SGD)  # AdamW's ε is zero in float16
    zoo.perturb(model, size=0.1)
    expected = zoo.logits(copy.deepcopy(model).float(), case.batch(case.base()))
    # twice what the base model's own rounding costs here, at least ten roundings of its outputs
    own = zoo.relative_error(before, zoo.logits(case.base(), case.batch(case.base())))
    bound = 2 * max(own, 10 * torch.finfo(dtype).eps)
    assert zoo.relative_error(zoo.logits(model, batch), expected) < bound
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert zoo.relative_error(zoo.logits(merged, batch), expected) < bound


@EACH
def test_autocast(case):
    """Under autocast the output is autocast's; without it a float32 model's stays float32."""
    base = case.base()
    batch = case.batch(base)
    with torch.autocast("cpu", torch.bfloat16):
        before = zoo.logits(base, batch)
    model = peft.get_peft_model(base, case.config()).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)["loss"].backward()
        found = zoo.logits(model.eval(), batch)
    assert found.dtype == before.dtype
    assert zoo.relative_error(found, before) < 10 * torch.finfo(torch.bfloat16).eps
    gradients = [p.grad for p in zoo.adapter_of(model).parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert zoo.logits(model, batch).dtype == torch.float32


@EACH
def test_target_modules(case):
    """A list, a regular expression, and a mistake."""
    listed = case.adapted(target_modules=[case.some_target], task_type=None)
    names = listed.base_model.targeted_module_names
    assert names and all(("." + name).endswith("." + case.some_target) for name in names)
    by_regex = case.adapted(target_modules="|".join(n.replace(".", r"\.") for n in names))
    assert by_regex.base_model.targeted_module_names == names
    for wrong in (["nowhere"], "nowhere", []):
        message = r"not found in the base model|No `target_modules`|No modules were targeted"
        with pytest.raises(ValueError, match=message):
            case.adapted(target_modules=wrong)
    if names != [case.some_target] or case.targets == "all-linear":
        with pytest.warns(UserWarning, match=r"hal_peft: target_modules \['nowhere'\] match no"):
            case.adapted(target_modules=[case.some_target, "nowhere"])


@EACH
def test_exclude_modules(case):
    everything = case.adapted(task_type=None).base_model.targeted_module_names
    if len(everything) == 1:
        with pytest.raises(ValueError, match="excluded"):
            case.adapted(task_type=None, exclude_modules=everything)
        return
    some = case.adapted(task_type=None, exclude_modules=[case.some_target])
    left = some.base_model.targeted_module_names
    assert set(left) == {
        name for name in everything if not ("." + name).endswith("." + case.some_target)
    }


@EACH
def test_requires_grad_rules(case):
    """Frozen on request, and as PEFT has it when adapters change."""
    model = case.adapted(task_type=None)
    expected = names_of_trained(model)
    assert model.get_model_status().requires_grad == {"default": True}
    model.set_requires_grad("default", False)
    assert trainable(model) == set()
    assert model.get_model_status().requires_grad == {"default": False}
    model.set_requires_grad("default")
    assert trainable(model) == expected
    frozen = case.adapted(task_type=None, inference_mode=True)
    assert not any(p.requires_grad for p in zoo.adapter_of(frozen).parameters())
    frozen.set_adapter("default")
    assert all(p.requires_grad for p in zoo.adapter_of(frozen).parameters())


@EACH
def test_deep_copy_and_repr(case):
    model = case.adapted()
    zoo.perturb(model)
    batch = case.batch(model)
    expected = zoo.logits(model, batch)
    copied = copy.deepcopy(model)
    zoo.perturb(model)
    assert torch.equal(zoo.logits(copied, batch), expected)
    assert not torch.equal(zoo.logits(model, batch), expected)
    text = repr(model)
    assert "HyperAdaLoraLinear" in text and "default: rank=3" in text and "HyperAdapter(" in text


@EACH
def test_export_lora(case, tmp_path):
    """Another program reads the adapter without this library."""
    model = case.adapted()
    zoo.perturb(model)
    batch = case.batch(model)
    expected = zoo.logits(model, batch)
    model.export_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert type(lora.base_model) is peft.LoraModel
    if case.name != "shared":  # PEFT's LoRA leaves the second name of a shared layer alone
        assert zoo.relative_error(zoo.logits(lora, batch), expected) < CLOSE


@EACH
def test_config_round_trip(case, tmp_path):
    config = case.config(r=3, init_r=4, rank_pattern={case.some_target: 5}, interval=7)
    model = peft.get_peft_model(case.base(), config)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, hal_peft.HyperAdaLoraConfig) and loaded.inference_mode
    loaded.inference_mode, loaded.auto_mapping = False, None
    assert loaded == model.peft_config["default"]
    names = model.base_model.targeted_module_names
    ranks = model.rank_pattern()
    assert set(ranks.values()) <= {4, 5} and list(ranks) == names
