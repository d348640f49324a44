"""PEFT's AdaLoRA checkpoints: into HyperAdaLoRA without hypernetworks, and back."""

import json
import math

import peft
import pytest
import torch
from lifecycle import unchanged
from safetensors.torch import load_file, save_file

import hal_peft

from . import zoo

# float32: another order of the same sums, and AdaLoRA's rank + 1e-5 rounded to float32.
CLOSE = 2e-5
STEPS = 6
CASES = [zoo.BY_NAME[n] for n in ("bert", "gpt2", "llama", "t5", "vit", "mlp", "containers")]


def linears(case):
    """Targets for PEFT's AdaLoRA, whose "all-linear" is the same but for the config's name."""
    return case.adapted().base_model.targeted_module_names


def adalora(case, **options):
    defaults = {
        "task_type": case.task, "init_r": 3, "target_r": 2, "total_step": STEPS, "deltaT": 1,
        "tfinal": 1, "lora_alpha": 7, "target_modules": linears(case),
        "modules_to_save": list(case.modules_to_save) or None,
        "fan_in_fan_out": case.name == "gpt2",
    }  # fmt: skip
    return peft.get_peft_model(case.base(), peft.AdaLoraConfig(**defaults | options))


def train_adalora(model, batch, steps):
    """PEFT's documented loop. Losses of some outputs are not attributes, so none is read."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model.train()(**batch)["loss"].backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_E" in name:  # a ΔW that shows; what is pruned stays pruned
            parameter.data.mul_(30)
    model.eval()


@pytest.mark.parametrize(
    ("case", "steps"), [*((case, STEPS) for case in CASES), (CASES[1], 0), (CASES[-1], 0)], ids=str
)
def test_there_and_back(case, steps, tmp_path):
    theirs = adalora(case)
    batch = case.batch(theirs)
    train_adalora(theirs, batch, steps)
    if steps == 0:  # before an allocation all directions count
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                parameter.data.normal_()
    expected = zoo.logits(theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = hal_peft.load_adalora(case.base(), tmp_path / "theirs")
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert zoo.relative_error(zoo.logits(ours, batch), expected) < CLOSE
    ranks = ours.rank_pattern()
    assert list(ranks) == linears(case)
    assert sum(ranks.values()) == (2 if steps else 3) * len(ranks)

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours")
    assert torch.equal(zoo.logits(again, batch), zoo.logits(ours, batch))

    hal_peft.export_adalora(ours, tmp_path / "back")
    # PEFT: with labels, an AdaLoRA model that is loaded for inference alone raises.
    back = peft.PeftModel.from_pretrained(case.base(), tmp_path / "back", is_trainable=True).eval()
    assert type(back.base_model) is peft.AdaLoraModel
    assert zoo.relative_error(zoo.logits(back, batch), expected) < CLOSE


@pytest.mark.parametrize(
    ("case", "targets"),
    [("vit", ["q_proj"]), ("vit", ["q_proj", "classifier"]), ("deberta", ["pooler.dense"])],
)
def test_heads_that_were_not_trained_in_full(case, targets, tmp_path):
    """AdaLoRA leaves heads that PEFT does not know alone, or adapts them: both are kept."""
    case = zoo.BY_NAME[case]
    theirs = adalora(case, target_modules=targets, modules_to_save=None)
    batch = case.batch(theirs)
    train_adalora(theirs, batch, STEPS)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hal_peft.load_adalora(case.base(), tmp_path / "theirs")
    expected = zoo.logits(theirs, batch)
    assert zoo.relative_error(zoo.logits(ours, batch), expected) < CLOSE
    hal_peft.export_adalora(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(case.base(), tmp_path / "back", is_trainable=True).eval()
    assert zoo.relative_error(zoo.logits(back, batch), expected) < CLOSE


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_export_of_any_adapter(hypernet, tmp_path):
    """Pruned to nothing in one layer, more than one scaling and rank: outputs stay equal."""
    case = zoo.BY_NAME["mlp"]
    model = case.adapted(hypernet=hypernet, rank_pattern={"up.1": 6}, alpha_pattern={"down.0": 3.0})
    zoo.perturb(model)
    adapter = zoo.adapter_of(model)
    adapter.mask[:3] = 0.0  # up.0
    if hypernet == "direct":
        adapter.lam.data.mul_(adapter.mask)
    adapter.mask[5] = 0.0
    adapter.lam.data[5] = 0.0
    batch = case.batch(model)
    hal_peft.export_adalora(model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {k: sum(v) for k, v in pattern.items()} == {
        "up.0.lora_E": 0, "up.1.lora_E": 5, "down.0.lora_E": 3, "down.1.lora_E": 3
    }  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert zoo.relative_error(zoo.logits(loaded, batch), zoo.logits(model, batch)) < CLOSE


def test_training_goes_on(tmp_path):
    """After its last allocation an AdaLoRA checkpoint trains on with the ranks it has."""
    case = zoo.BY_NAME["bert"]
    theirs = adalora(case)
    batch = case.batch(theirs)
    train_adalora(theirs, batch, STEPS)
    theirs.save_pretrained(tmp_path)
    ours = hal_peft.load_adalora(case.base(), tmp_path, is_trainable=True)
    ranks = ours.rank_pattern()
    before = zoo.logits(ours, batch)
    zoo.train(ours, batch, steps=3)
    assert ours.rank_pattern() == ranks
    assert not torch.equal(zoo.logits(ours, batch), before)
    scaling = ours.factors()[next(iter(ranks))].scaling
    assert math.isclose(scaling, 7 / (3 + 1e-5))


def test_refused(tmp_path):
    case = zoo.BY_NAME["mlp"]
    model = case.adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="path holds a HyperAdaLoraConfig, expected PEFT's AdaLora"
    ):
        hal_peft.load_adalora(case.base(), tmp_path)
    adalora(case).save_pretrained(tmp_path / "no", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        hal_peft.load_adalora(case.base(), tmp_path / "no")
    adalora(case).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapts '\w+\.0', which is no linear layer of the model"):
        hal_peft.load_adalora(zoo.BY_NAME["bert"].base(), tmp_path / "other")
    with pytest.raises(TypeError, match="model is a Net, expected a HyperAdaLoRA PeftModel"):
        hal_peft.export_adalora(case.base(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name is 'x', expected one of \['default'\]"):
        hal_peft.export_adalora(model, tmp_path, "x")


UP, HEAD = "base_model.model.up.0.lora_", "base_model.model.classifier."


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def unprefixed(tensors):
    return tensors.update({k.removeprefix("base_model.model."): tensors.pop(k) for k in [*tensors]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{UP}E"), r"'up\.0' don't fit; missing \['E'\]"),
        (put(f"{UP}X", torch.ones(1)), r"unexpected \['X'\]"),
        (put(f"{UP}E", torch.ones(10**6, 1)), r"'A' for 'up\.0' has shape \(3, 16\)"),
        (put(f"{UP}E", torch.ones(3)), r"'E' for 'up\.0' has shape \(3,\)"),
        (put(f"{UP}A", torch.ones(3, 16).int()), r"'A' for 'up\.0' has dtype"),
        (put(f"{UP}A", torch.ones(3, 16) / 0), r"'A' for 'up\.0' holds NaN or Inf"),
        (put("base_model.model.x", torch.ones(1)), r"unexpected \['.*model\.x'\]"),
        (drop(f"{HEAD}bias"), r"it lacks \['base_model\.model\.classifier\.bias'\]"),
        (
            drop(f"{HEAD}weight", f"{HEAD}bias"),
            r"it lacks .*classifier\.bias', .*weight'\], which AdaLoRA trained in full",
        ),
        (unprefixed, r"tensors called \['classifier\.bias', .*'up\.1\.lora_E'\], expected names"),
        (
            drop(*(f"{UP}{k}" for k in "ABE")),
            r"lacks the factors of \['up\.0'\], which its target_modules name",
        ),
        (put(f"{HEAD}bias", torch.ones(4)), r"bias' .* has shape \(4,\)"),
        (drop("base_model.model.down.1.lora_A"), r"'down\.1' don't fit; missing \['A'\]"),
        ({"target_modules": ["0"]}, r"of \['down\.1', 'up\.1'\], which its target_modules do not"),
        ("[" * 100_000, r"holds no checkpoint of PEFT's"),
        ("[]", r"holds no checkpoint of PEFT's"),
        (b"\xff" * 64, r"holds no checkpoint of PEFT's"),
    ],
)
def test_damaged_files(change, message, tmp_path):
    case = zoo.BY_NAME["mlp"]
    adalora(case).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if callable(change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    elif isinstance(change, str):
        (tmp_path / "adapter_config.json").write_text(change)
    elif isinstance(change, dict):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    else:
        file.write_bytes(change)
    model = case.base()
    with unchanged(model), pytest.raises(ValueError, match=message):
        hal_peft.load_adalora(model, tmp_path)
