"""HyperAdaLoRA under PEFT with what else is done to models: checkpointing, generation, compiling,
loading without memory, devices, hooks."""

import copy
import warnings

import accelerate
import peft
import pytest
import torch
import training
import transformers
from safetensors.torch import load_file

import hal_peft
from hal_kernels.nn import shared_input

from . import zoo

BERT, LLAMA, GPT2, T5, MLP = (zoo.BY_NAME[n] for n in ("bert", "llama", "gpt2", "t5", "mlp"))
KINDS = pytest.mark.parametrize("hypernet", [None, "bert"])


def gradients(model, batch):
    model.zero_grad()
    model.train()(**batch)["loss"].backward()
    return training.gradients(model)


@pytest.mark.parametrize(
    ("case", "hypernet"), [(BERT, "bert"), (GPT2, None), (LLAMA, "direct"), (T5, None)], ids=str
)
def test_gradient_checkpointing(case, hypernet):
    """Turned on before or after the adapter is made: the gradients without it."""
    model = case.adapted(hypernet=hypernet)
    zoo.perturb(model)
    batch = case.batch(model.get_base_model())
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert zoo.relative_error(gradient, expected[name]) < 1e-4, name
    base = case.base()
    base.gradient_checkpointing_enable()
    early = peft.get_peft_model(base, case.config(hypernet=hypernet))
    assert gradients(early, batch).keys() >= expected.keys() - {
        name for name in expected if ".modules_to_save." in name
    }  # fmt: skip


@pytest.mark.parametrize(
    ("checkpointed", "hypernet"), [(False, "bert"), (True, "bert"), (True, None)]
)
def test_reference_pass_between_forward_and_backward(checkpointed, hypernet):
    """As DPO has it: the base model's output is needed before the adapter's backward pass."""
    model = LLAMA.adapted(hypernet=hypernet)
    zoo.perturb(model)
    batch = LLAMA.batch(model.get_base_model())
    expected = gradients(model, batch)
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model.train()(**batch)["loss"]
    with model.disable_adapter():
        reference = zoo.logits(model, batch)
    assert torch.equal(reference, zoo.logits(LLAMA.base(), batch))
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert zoo.relative_error(parameter.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize(
    ("case", "cache"),
    [(LLAMA, "dynamic"), (LLAMA, "static"), (LLAMA, None), (GPT2, "dynamic"), (T5, "static")],
    ids=str,
)
def test_generate(case, cache):
    """Greedy tokens are those of the merged model, and not those of the base model."""
    model = case.adapted(hypernet="bert")
    zoo.perturb(model, size=4.0)
    ids = case.batch(model.get_base_model())["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache is not None}
    if cache is not None:
        options["cache_implementation"] = cache
    if cache == "static":
        options["disable_compile"] = True
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert not torch.equal(found, base)
    merged = model.merge_and_unload()
    expected = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("case", "hypernet"), [(BERT, None), (MLP, "bert")], ids=str)
def test_low_cpu_mem_usage(case, hypernet, tmp_path):
    """Parameters wait on the meta device for the file's; the loaded model is the same."""
    model = case.adapted(hypernet=hypernet)
    batch = case.batch(model)
    zoo.train(model, batch)
    expected = zoo.logits(model, batch)
    model.save_pretrained(tmp_path)
    empty = peft.get_peft_model(case.base(), case.config(hypernet=hypernet), low_cpu_mem_usage=True)
    assert {p.device.type for p in zoo.adapter_of(empty).parameters()} == {"meta"}
    empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    loaded = peft.PeftModel.from_pretrained(
        case.base(), tmp_path, low_cpu_mem_usage=True, is_trainable=True
    )
    second = case.adapted(hypernet=hypernet)
    second.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    second.set_adapter("other")
    for each in (empty, loaded, second):
        assert {t.device.type for t in each.state_dict().values()} == {"cpu"}
        # Tensors taken from the file lie at other addresses: sums of another order.
        assert zoo.relative_error(zoo.logits(each.eval(), batch), expected) < 1e-6
    zoo.train(loaded, batch, steps=1)
    assert zoo.adapter_of(loaded).steps == 3


@pytest.mark.parametrize(
    ("name", "hypernet"),
    [  # generated factors in a graph: tests/test_compile.py
        ("mlp", None),
        pytest.param("mlp", "bert", marks=pytest.mark.slow),
        pytest.param("gpt2", "direct", marks=pytest.mark.slow),
    ],
)
def test_compile(name, hypernet, tmp_path):
    """The compiled model computes and trains as the eager one, and is saved after it."""
    case = zoo.BY_NAME[name]
    eager = case.adapted(hypernet=hypernet)
    zoo.perturb(eager)
    batch = case.batch(eager.get_base_model())
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager")
    assert zoo.relative_error(zoo.logits(compiled, batch), zoo.logits(eager, batch)) < 2e-5
    for model in (eager, compiled):
        zoo.train(model, batch, steps=2, optimizer=torch.optim.SGD, lr=1e-3)
    expected = zoo.logits(eager, batch)
    assert zoo.relative_error(zoo.logits(compiled, batch), expected) < 1e-4
    assert zoo.adapter_of(compiled).steps == zoo.adapter_of(eager).steps == 2
    compiled.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert zoo.relative_error(zoo.logits(loaded, batch), expected) < 1e-4


def test_device_map(tmp_path):
    """A base that transformers placed; the adapter goes where its layers are."""
    LLAMA.base().save_pretrained(tmp_path / "base")
    base = type(LLAMA.base()).from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    model = peft.get_peft_model(base, LLAMA.config())
    zoo.perturb(model)
    batch = LLAMA.batch(base)
    model.save_pretrained(tmp_path / "adapter")
    expected = zoo.logits(model, batch)
    again = type(LLAMA.base()).from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(zoo.logits(loaded, batch), expected)


@KINDS
def test_offloaded_layers(hypernet, tmp_path):
    """Weights that accelerate brings in for each call only: the layer's own forward is run."""
    base = LLAMA.base()
    batch = LLAMA.batch(base)
    model = LLAMA.adapted(hypernet=hypernet)
    zoo.perturb(model)
    expected = zoo.logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    place = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    base = accelerate.dispatch_model(
        base, place, main_device="cpu", offload_dir=tmp_path / "off", force_hooks=True
    )
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    model = peft.get_peft_model(base, LLAMA.config(hypernet=hypernet))
    assert not any(t.is_meta for t in zoo.adapter_of(model).state_dict().values())
    # PEFT's load_adapter would dispatch the model anew, which needs a GPU beside the disk.
    peft.set_peft_model_state_dict(
        model, load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    assert zoo.relative_error(zoo.logits(model, batch), expected) < 2e-5
    model.train()(**batch)["loss"].backward()
    assert all(p.grad is not None for p in zoo.adapter_of(model).parameters())


def test_hooks_of_the_base_layer_are_run():
    """Hooks put on a layer before it was adapted see its input and its own output."""
    base = MLP.base()
    seen = []
    base.up[0].register_forward_hook(lambda m, args, output: seen.append(output))
    batch = MLP.batch(base)
    zoo.logits(base, batch)
    model = peft.get_peft_model(base, MLP.config())
    zoo.perturb(model)
    with_hook = zoo.logits(model, batch)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert zoo.relative_error(with_hook, zoo.logits(model.merge_and_unload(), batch)) < 2e-5


def test_siblings_compute_as_one(monkeypatch):
    """q, k and v, gate and up: one call each, of the one active adapter, and not while merged."""
    calls = []
    original = shared_input.group_outputs
    monkeypatch.setattr(
        shared_input, "group_outputs", lambda *args: calls.append(len(args[1])) or original(*args)
    )
    model = LLAMA.adapted()
    zoo.perturb(model)
    batch = LLAMA.batch(model.get_base_model())
    together = zoo.logits(model, batch)
    assert sorted(calls) == [2, 2, 3, 3]
    model.add_adapter("other", LLAMA.config())
    model.base_model.set_adapter(["default", "other"])
    calls.clear()
    assert zoo.relative_error(zoo.logits(model, batch), together) < 2e-5
    model.set_adapter("default")
    model.merge_adapter()
    zoo.logits(model, batch)
    assert calls == []


def test_dropout():
    """In training alone, on the adapter's path alone."""
    model = MLP.adapted(lora_dropout=0.5, exclude_modules=["classifier"], modules_to_save=None)
    zoo.perturb(model)
    batch = MLP.batch(model)
    assert torch.equal(zoo.logits(model, batch), zoo.logits(model, batch))
    model.train()
    assert not torch.equal(zoo.logits(model, batch), zoo.logits(model, batch))
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, batch), zoo.logits(MLP.base(), batch))


def test_moving_the_model():
    """to() and half() take the adapter along; it goes on working."""
    model = MLP.adapted(hypernet="bert")
    zoo.perturb(model)
    batch = MLP.batch(model)
    expected = zoo.logits(model, batch)
    double = copy.deepcopy(model).double()
    found = zoo.logits(double, MLP.batch(double))
    assert found.dtype == torch.float64 and zoo.relative_error(expected, found) < 2e-5
    zoo.train(double, MLP.batch(double), steps=1)
    assert zoo.adapter_of(double).steps == 1


def test_no_warnings_of_ours(tmp_path):
    """The ordinary life of an adapter warns of nothing (PEFT and transformers may)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        model = BERT.adapted(hypernet="bert")
        zoo.train(model, BERT.batch(model))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(BERT.base(), tmp_path)
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        loaded.merge_and_unload()
    assert isinstance(model.peft_config["default"], hal_peft.HyperAdaLoraConfig)


def test_a_short_run_of_trainer_meets_its_rank_budget(tmp_path):
    """The adapter asks its Trainer how many steps there are."""
    model = BERT.adapted(init_r=4)
    batch = BERT.batch(model.get_base_model())
    rows = [{name: values[0] for name, values in batch.items()}] * 6
    options = {"max_steps": 6, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    transformers.Trainer(
        model, transformers.TrainingArguments(tmp_path, **options), train_dataset=rows
    ).train()
    assert zoo.adapter_of(model).config.total_step == 6
    assert zoo.adapter_of(model).mask.sum() == 2 * len(zoo.adapter_of(model).layout.layers)
