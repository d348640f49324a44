"""export_lora: the adapter in PEFT's format, loaded by PEFT, gives the same logits."""

import json
import os
import re
import warnings

import models
import pytest
import torch
from lifecycle import HYPERNETS, patched, predict, prune, prune_layer, unchanged
from safetensors.torch import load_file
from torch import nn
from training import adam, batches, train

import hal_kernels
from hal_kernels import export_lora

peft = pytest.importorskip("peft")
hf = pytest.importorskip("transformers")

from peft_method import zoo  # noqa: E402

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
MAKERS = {"bert": models.bert, "llama": models.llama, "gpt2": models.gpt2, "net": models.net}

pytestmark = pytest.mark.usefixtures("small_hypernets")


def header(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def in_peft(base, folder):
    """The exported adapter on a fresh base model, as PEFT loads it; every tensor must be used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder)
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    assert not missing, missing
    return model


def assert_same_logits(model, base, folder, dtype):
    expected = predict(model)
    found = in_peft(base.eval(), folder).eval()
    with torch.no_grad():
        logits = models.logits_of(found(**models.batch(base)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[dtype])
    return found


def trained(make, dtype=torch.float32, **options):
    model = patched(make(dtype=dtype), dtype=dtype, **options)
    train(model, adam(model, 3e-3), batches(model, 3))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("maker", MAKERS)
def test_peft_gives_the_same_logits(maker, dtype, tmp_path):
    make = MAKERS[maker]
    model = trained(make, dtype, init_rank=3)
    prune(model, 0, 4, 5)
    assert (predict(model) - predict(make(dtype=dtype))).abs().max() > 1e-2
    with unchanged(model):
        export_lora(model, tmp_path)
    found = assert_same_logits(model, make(dtype=dtype), tmp_path, dtype)
    head = found.base_model.model.get_submodule("classifier") if maker in ("bert", "net") else None
    assert head is None or torch.equal(
        head.modules_to_save["default"].weight, model.classifier.weight
    )


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_generated_factors(hypernet, tmp_path):
    model = trained(models.net, hypernet=hypernet, update="residual", init_rank=3)
    prune(model, 1, 2)
    export_lora(model, tmp_path)
    assert_same_logits(model, models.net(), tmp_path, torch.float32)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_layer_that_keeps_nothing_is_no_target(compacted, tmp_path):
    model = trained(models.bert, torch.float64)
    layer = "bert.encoder.layer.1.attention.self.value"
    prune_layer(model, layer)
    if compacted:
        hal_kernels.compact(model)
    export_lora(model, tmp_path)
    targets = header(tmp_path)["target_modules"]
    assert layer not in targets and len(targets) == 12
    assert_same_logits(model, models.bert(dtype=torch.float64), tmp_path, torch.float64)


class Branches(nn.Module):
    """Layers whose names end alike: q and attn.q, layers 1 and 11, out and a Tanh called out."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.attn = nn.ModuleDict({"q": nn.Linear(16, 16), "out": nn.Tanh()})
        self.layer = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))
        self.out = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        x = self.attn["out"](self.q(x) + self.attn["q"](x))
        for layer in self.layer:
            x = x + torch.tanh(layer(x))
        return {"logits": self.classifier(self.out(x))}


def branches():
    torch.manual_seed(0)
    return Branches().double()


@pytest.mark.parametrize(
    ("kept", "targets"),
    [
        ({"q": 3, "attn.q": 2, "layer.1": 1, "layer.11": 3}, ["q", "layer.1", "layer.11"]),
        ({"q": 1, "attn.q": 0, "layer.1": 0, "layer.11": 2}, ["q", "layer.1", "layer.11"]),
        ({"q": 2, "layer.1": 2}, r"q|layer\.1"),  # attn.q is not adapted at all
        ({"out": 2}, r"out"),  # attn.out is nothing that PEFT could adapt
    ],
)
def test_names_that_end_alike(kept, targets, tmp_path):
    model = patched(branches(), init_rank=3, dtype=torch.float64, targets=targets)
    layout = model.hal.layout
    assert [spec.name for spec in layout.layers] == list(kept)
    for spec, start in zip(layout.layers, layout.offsets, strict=False):
        prune(model, *range(start + kept[spec.name], start + 3))
    export_lora(model, tmp_path)
    base = branches()
    found = assert_same_logits(model, base, tmp_path, torch.float64)
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in found.named_modules()
        if hasattr(module, "lora_A") and module.r
    }
    largest = max(kept.values())
    assert ranks == {name: largest for name, rank in kept.items() if rank}


def test_after_compact(tmp_path):
    model = trained(models.bert, torch.float64, init_rank=3)
    prune(model, *range(0, 39, 4))
    export_lora(model, tmp_path / "before")
    hal_kernels.compact(model)
    export_lora(model, tmp_path / "after")
    for folder in ("before", "after"):
        base = models.bert(dtype=torch.float64)
        assert_same_logits(model, base, tmp_path / folder, torch.float64)


def test_foreign_layers_are_exported(tmp_path):
    from test_patching import quantized_net

    model = patched(quantized_net())
    inputs = models.batch(models.net())
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    f = hal_kernels.factors(model)["up.0"]
    a, b = (tensors[f"base_model.model.up.0.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, f.delta())
    assert torch.isfinite(predict(model, **inputs)).all()


def test_bf16_base(tmp_path):
    model = patched(models.net(dtype=torch.bfloat16))
    export_lora(model, tmp_path)
    expected, found = predict(model), in_peft(models.net(dtype=torch.bfloat16).eval(), tmp_path)
    with torch.no_grad():
        logits = found.eval()(**models.batch(model))["logits"]
    error = (logits.double() - expected.double()).norm() / expected.double().norm()
    assert error < 2e-2  # each of four layers rounds its output to 8 bits, 2⁻⁹ of it


# -- files -----------------------------------------------------------------------------------------


def test_config_and_tensors(tmp_path):
    model = patched(models.bert(), init_rank=3, dropout=0.25, alpha=5.0)
    prune(model, 0)
    model.name_or_path = "somebody/bert"
    export_lora(model, tmp_path, task_type="SEQ_CLS")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert config.task_type == "SEQ_CLS" and config.inference_mode
    assert config.base_model_name_or_path == "somebody/bert"
    assert config.lora_dropout == 0.25 and config.bias == "none" and not config.fan_in_fan_out
    assert header(tmp_path)["modules_to_save"] == ["classifier"]
    assert header(tmp_path)["target_modules"] == list(hal_kernels.rank_pattern(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.bert.encoder.layer.0.attention.self.query"
    a, b = (tensors[f"{first}.lora_{x}.weight"] for x in "AB")
    assert a.shape == (3, 32) and b.shape == (32, 3)  # the other layers' rank, with zeros
    assert not a[2].any() and not b[:, 2].any() and a[:2].all(dim=1).all() and b[:, :2].any()
    assert torch.equal(tensors["base_model.model.classifier.weight"], model.classifier.weight)


def test_base_model_name_can_be_given(tmp_path):
    model = patched()
    export_lora(model, tmp_path, base_model_name_or_path="me/mine")
    assert header(tmp_path)["base_model_name_or_path"] == "me/mine"
    export_lora(model, tmp_path)
    found = header(tmp_path)
    assert found["base_model_name_or_path"] is None and found["task_type"] is None


def test_conv1d_is_marked(tmp_path):
    export_lora(patched(models.gpt2()), tmp_path)
    assert header(tmp_path)["fan_in_fan_out"]


def test_nothing_to_save_in_full(tmp_path):
    model = patched(modules_to_save=())
    export_lora(model, tmp_path)
    assert header(tmp_path)["modules_to_save"] is None
    assert_same_logits(model, models.net(), tmp_path, torch.float32)


TIED = {
    "llama": (lambda: models.llama(tie_word_embeddings=True), ("embed_tokens",)),
    "both": (lambda: models.llama(tie_word_embeddings=True), ("lm_head", "embed_tokens")),
    "gpt2": (models.gpt2, ("wte",)),
    "t5": (zoo.BY_NAME["t5"].make, ("shared",)),
    "mlm": (zoo.made(hf.BertForMaskedLM, lambda: hf.BertConfig(**zoo.SMALL)), ("word_embeddings",)),
    "mlm head": (zoo.made(hf.BertForMaskedLM, lambda: hf.BertConfig(**zoo.SMALL)), ("decoder",)),
}


@pytest.mark.parametrize("case", TIED)
def test_trained_modules_that_share_a_parameter(case, tmp_path):
    make, modules_to_save = TIED[case]
    model = patched(make().train(), modules_to_save=modules_to_save)
    data = zoo.two_texts(model)
    train(model, adam(model, 0.1), [data] * 3)
    export_lora(model, tmp_path)
    found = in_peft(make(), tmp_path).eval()
    expected = predict(model, **data)
    with torch.no_grad():
        torch.testing.assert_close(found(**data).logits, expected, rtol=0, atol=1e-4)
        assert (make().eval()(**data).logits - expected).abs().max() > 0.1


def test_an_adapted_layer_tied_to_a_module_trained_in_full(tmp_path):
    model = patched(
        models.llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"],
        targets=["lm_head", "q_proj"],
    )  # fmt: skip
    with unchanged(model), pytest.raises(ValueError, match=r"'lm_head' shares a parameter with"):
        export_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Alike(nn.Module):
    """Names that PEFT takes for the head's, an inner layer among them; a layer of two names."""

    def __init__(self):
        super().__init__()
        self.pre_classifier = nn.Linear(16, 16)
        self.lin = nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.classifier = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.classifier(self.second(self.first(self.pre_classifier(self.lin(x)))))
        return {"logits": logits, "loss": logits.sum()}


def test_layers_that_peft_has_no_lora_for(tmp_path):
    """They are exported with ΔW in their weight, as DistilBERT's pre_classifier."""

    def make():
        torch.manual_seed(0)
        return Alike().double()

    model = patched(make(), dtype=torch.float64)
    export_lora(model, tmp_path)
    found = header(tmp_path)
    assert found["modules_to_save"] == ["classifier", "pre_classifier", "first", "second"]
    assert found["target_modules"] == ["lin"]
    assert_same_logits(model, make(), tmp_path, torch.float64)


def read(folder, formula):
    """Every layer's ΔW, as one of the readers of PEFT's format makes it."""
    tensors, deltas = load_file(folder / "adapter_model.safetensors"), {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            deltas[name] = formula(header(folder), name, len(a)) * (b @ a)
    return deltas


def by_patterns(config, name, rank):  # PEFT
    def own(field, default):
        pattern = config.get(field) or {}
        return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)

    assert own("rank_pattern", config["r"]) == rank
    return own("alpha_pattern", config["lora_alpha"]) / rank


def by_config(config, name, rank):  # vLLM: for all layers, whose ranks may be smaller
    assert rank <= config["r"]
    return config["lora_alpha"] / config["r"]


def by_tensor(config, name, rank):  # llama.cpp
    return config["lora_alpha"] / rank


@pytest.mark.parametrize("formula", [by_patterns, by_config, by_tensor])
def test_every_reader_gets_the_same(formula, tmp_path):
    options = {"init_rank": 3, "rank_pattern": {"up.0": 5}, "alpha_pattern": {"down.0": 3.0}}
    model = patched(dtype=torch.float64, **options)
    prune(model, 0, 6)
    export_lora(model, tmp_path)
    found = read(tmp_path, formula)
    for name, f in hal_kernels.factors(model).items():
        torch.testing.assert_close(found.pop(name), f.delta())
    assert not found


TASKS = [
    (models.bert, "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    (models.llama, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    (models.gpt2, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    (zoo.BY_NAME["t5"].make, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    (zoo.BY_NAME["vit"].make, None, "AutoPeftModel"),
    (zoo.BY_NAME["whisper"].make, None, "AutoPeftModel"),
    (zoo.made(hf.BertForTokenClassification, lambda: hf.BertConfig(**zoo.SMALL)),
     "TOKEN_CLS", "AutoPeftModelForTokenClassification"),
    (zoo.made(hf.BertForQuestionAnswering, lambda: hf.BertConfig(**zoo.SMALL)),
     "QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
    (zoo.made(hf.BertModel, lambda: hf.BertConfig(**zoo.SMALL)), None, "AutoPeftModel"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "task", "auto"), TASKS)
def test_task_type_is_the_models(make, task, auto, tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    export_lora(patched(base, targets=r".*\.(q|query|q_proj|c_attn)"), tmp_path / "lora")
    assert header(tmp_path / "lora")["task_type"] == task
    found = getattr(peft, auto).from_pretrained(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(found)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())


# The head is a LoRA layer then; or PEFT would miss its weights.
@pytest.mark.parametrize("options", [{}, {"exclude": ["classifier"]}])
def test_no_task_type_whose_head_is_not_in_the_export(options, tmp_path):
    model = patched(models.bert(), modules_to_save=(), **options)
    export_lora(model, tmp_path)
    assert header(tmp_path)["task_type"] is None
    assert_same_logits(model, models.bert(), tmp_path, torch.float32)


def test_merging_in_peft_equals_merging_here(tmp_path):
    model = trained(models.bert, torch.float64)
    export_lora(model, tmp_path)
    merged = in_peft(models.bert(dtype=torch.float64), tmp_path).merge_and_unload()
    hal_kernels.merge(model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=1e-12, atol=1e-12)


# -- refusals --------------------------------------------------------------------------------------


def test_leftovers_of_killed_exports_are_removed(tmp_path):
    """Also by an export that finds the files as they should be, and has nothing to write."""
    model, folder = patched(), tmp_path / "lora"
    export_lora(model, folder)
    left = tmp_path / ".lora.abcd1234"
    left.mkdir()
    (left / ".adapter_model.safetensors.efgh5678").write_bytes(b"half")
    (folder / ".adapter_config.json.efgh5678").write_bytes(b"half")
    mine = tmp_path / ".lora.notes123"
    mine.mkdir()
    (mine / "notes").touch()
    export_lora(model, folder)
    assert sorted(tmp_path.iterdir()) == sorted([mine, folder])
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_everything_pruned(tmp_path):
    model = patched()
    prune(model, *range(12))
    message = r"export_lora: every direction is pruned, there is nothing to export"
    with unchanged(model), pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
