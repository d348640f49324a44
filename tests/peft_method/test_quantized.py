"""Base models that bitsandbytes and torchao hold quantized, on a GPU where there is one."""

import copy
import functools

import models
import peft
import pytest
import torch
import transformers as hf
from torch import nn
from training import train, trainable

import hal_kernels
from hal_peft.layer import HyperAdaLoraLinear
from hal_peft.quantized import dequantize

from . import zoo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = zoo.BY_NAME["llama"]
# Merged beside unmerged output of a layer 64 -> 128: the rounding error of its weight, about
# a step / √12, a step being 1/127 (int8) or 1/7.5 (int4) of the largest in a group, itself 2.5
# times their RMS: 0.006 and 0.1. Steps of nf4 and fp4 are as large in the mean. bitsandbytes' int8
# rounds what the layer reads too, merged or not.
ERRORS = {
    "bnb-int8": 0.02, "bnb-nf4": 0.12, "bnb-fp4": 0.15,
    "ao-int8": 0.01, "ao-int4": 0.12, "ao-int4-asymmetric": 0.12,
}  # fmt: skip
FEW = pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4", "ao-int8", "ao-int4"])
EACH = pytest.mark.parametrize("kind", ERRORS)


def config(kind):
    """What `from_pretrained` is told; skips where a library is missing."""
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        if kind == "bnb-int8":
            return hf.BitsAndBytesConfig(load_in_8bit=True)
        return hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[-3:],
            bnb_4bit_use_double_quant=kind == "bnb-nf4",
        )
    ao = pytest.importorskip("torchao.quantization")
    if kind == "ao-int8":
        return hf.TorchAoConfig(ao.Int8WeightOnlyConfig())
    if kind in ERRORS:
        kinds = ao.MappingType
        mapping = kinds.ASYMMETRIC if kind.endswith("asymmetric") else kinds.SYMMETRIC
        return hf.TorchAoConfig(ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), mapping))
    packing = {"int4_packing_format": "tile_packed_to_4d"}  # what needs no further package
    return hf.TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=32, **packing))


@pytest.fixture
def base(tmp_path):
    """A function that loads a tiny Llama quantized, the same at each call."""
    path = tmp_path / "base"

    def load(kind, **options):
        settings = config(kind)
        if not path.exists():
            models.llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
        return hf.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=settings, device_map=DEVICE, **options
        ).eval()

    return load


def batch(model):
    return {name: value.to(DEVICE) for name, value in models.batch(model).items()}


def adapted(model, **options):
    return peft.get_peft_model(model, LLAMA.config(**options))


def adapted_layers(model):
    return [m for m in model.modules() if isinstance(m, HyperAdaLoraLinear)]


def frozen(model):
    """Copies of what is not the adapter's, quantized weights as they are held."""
    state = {k: v for k, v in model.state_dict().items() if "hal" not in k}
    return copy.deepcopy(state)


def equal(a, b):
    names = getattr(a, "tensor_data_names", ())  # torchao's have no equal of their own
    return all(equal(getattr(a, n), getattr(b, n)) for n in names) if names else torch.equal(a, b)


def check_training(model, inputs):
    """The loss falls, gradients reach the adapter alone, and nothing else changes."""
    before = frozen(model)
    model.train()
    model(**inputs)["loss"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all("hal" in name for name in reached)
    model.zero_grad()
    losses = train(model, torch.optim.AdamW(trainable(model), lr=3e-2), [inputs] * 6)
    assert losses[-1] < losses[0]
    model.eval()
    after = frozen(model)
    assert all(equal(after[name], value) for name, value in before.items())


@EACH
def test_under_peft(kind, base, tmp_path):
    """Trained, disabled, saved, and loaded onto a freshly quantized base."""
    plain = base(kind)
    inputs = batch(plain)
    model = adapted(base(kind))
    check_training(model, inputs)
    expected = zoo.logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, inputs), zoo.logits(plain, inputs))
    assert not torch.equal(expected, zoo.logits(plain, inputs))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path / "adapter")
    assert torch.equal(zoo.logits(loaded, inputs), expected)


@FEW
def test_under_patch_model(kind, base, tmp_path):
    plain, model = base(kind), base(kind)
    inputs = batch(plain)
    hal_kernels.patch_model(model, 2, hypernet="direct", seed=0)
    check_training(model, inputs)
    expected = zoo.logits(model, inputs)
    with hal_kernels.disabled(model):
        assert torch.equal(zoo.logits(model, inputs), zoo.logits(plain, inputs))
    with pytest.raises(ValueError, match=r"q_proj' is a Linear.*, whose weight .* use export_lora"):
        hal_kernels.merge(model)
    hal_kernels.save_adapter(model, tmp_path / "adapter")
    loaded = base(kind)
    hal_kernels.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(zoo.logits(loaded, inputs), expected)
    hal_kernels.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(base(kind), tmp_path / "lora")
    # Layer by layer: LLM.int8 rounds a layer's input, so that sums of another order in the layer
    # before can move it by a step.
    for name in hal_kernels.factors(model):
        layer = model.get_submodule(name)
        x = torch.randn(5, layer.in_features, device=DEVICE)
        with torch.no_grad():
            exported = lora.base_model.model.get_submodule(name)
            found = exported(x)
            assert zoo.relative_error(found, layer(x)) < 1e-5  # float32 sums of 64 to 96 terms
            with lora.disable_adapter():
                assert zoo.relative_error(exported(x), found) > 1e-3


@FEW
def test_after_prepare_model_for_kbit_training(kind, base):
    """PEFT's own preparation: checkpointing, norms in float32, embeddings' outputs with grad."""
    model = adapted(peft.prepare_model_for_kbit_training(base(kind, dtype=torch.bfloat16)))
    check_training(model, batch(model))


def quantized(kind, weight):
    """A weight after a round trip through the library's own functions."""
    if kind.startswith("ao"):
        ao = pytest.importorskip("torchao.quantization")
        layer = nn.Linear(*weight.t().shape, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        ao.quantize_(layer, config(kind).quant_type)
        return layer.weight.dequantize()
    functional = pytest.importorskip("bitsandbytes").functional
    if kind == "bnb-int8":
        values, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(values, scale)
    packed = functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind[-3:], compress_statistics=kind == "bnb-nf4"
    )
    return functional.dequantize_4bit(*packed)


@EACH
def test_dequantize(kind, base):
    """What the library gives for the weight before it was quantized."""
    weight = models.llama(hidden_size=64, intermediate_size=128).model.layers[0].mlp.up_proj.weight
    layer = base(kind).model.layers[0].mlp.up_proj
    assert torch.equal(dequantize(layer), quantized(kind, weight.detach().to(DEVICE)))


@EACH
@pytest.mark.parametrize("used", [False, True])
def test_merge(kind, used, base):
    """W + ΔW quantized as W was, also after a forward, which changes bitsandbytes' layout."""
    model = adapted(base(kind))
    zoo.perturb(model)
    inputs = batch(model)
    if used:
        zoo.logits(model, inputs)
    layers = adapted_layers(model)
    expected = [dequantize(m.base_layer) + m.get_delta_weight("default") for m in layers]
    types = [type(m.base_layer.weight) for m in layers]
    with pytest.warns(UserWarning, match="^hal_peft: merging into a quantized weight") as caught:
        model.merge_adapter()
    assert [warning.filename for warning in caught] == [__file__]
    for m, weight, old in zip(layers, expected, types, strict=True):
        assert type(m.base_layer.weight) is old and not m.base_layer.weight.requires_grad
        assert torch.equal(dequantize(m.base_layer), quantized(kind, weight))
        layer = m.base_layer  # which bitsandbytes falls back on
        assert getattr(layer, "quant_state", None) is getattr(layer.weight, "quant_state", None)


@EACH
def test_error_of_a_merge_and_the_way_back(kind, base):
    plain, model = base(kind), adapted(base(kind))
    inputs = batch(plain)
    zoo.perturb(model)
    expected = zoo.logits(model, inputs)
    before = [copy.deepcopy(m.base_layer.weight) for m in adapted_layers(model)]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(256, 64, device=DEVICE)
    with torch.no_grad():
        unmerged = layer(x)
        with pytest.warns(UserWarning, match="rounding errors"):
            model.merge_adapter()
        error = zoo.relative_error(layer(x), unmerged)
    assert 0 < error < ERRORS[kind]
    assert not torch.equal(zoo.logits(model, inputs), expected)
    model.unmerge_adapter()
    assert torch.equal(zoo.logits(model, inputs), expected)
    after = [m.base_layer.weight for m in adapted_layers(model)]
    assert all(map(equal, after, before))
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()
    assert torch.equal(zoo.logits(model.unload(), inputs), zoo.logits(plain, inputs))


@FEW
def test_merge_and_unload(kind, base):
    model = adapted(base(kind))
    zoo.perturb(model)
    inputs = batch(model)
    merged = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="rounding errors"):
        merged.merge_adapter()
    with pytest.warns(UserWarning, match="rounding errors") as caught:
        unloaded = model.merge_and_unload(safe_merge=True)
    assert [warning.filename for warning in caught] == [__file__]
    assert not adapted_layers(unloaded)
    assert torch.equal(zoo.logits(unloaded, inputs), zoo.logits(merged, inputs))


@FEW
def test_two_merges_and_one_way_back(kind, base):
    model = adapted(base(kind))
    model.add_adapter("other", LLAMA.config())
    zoo.perturb(model)
    zoo.perturb(model, "other")
    inputs = batch(model)
    expected = zoo.logits(model, inputs)
    for name in ("default", "other"):
        with pytest.warns(UserWarning, match="rounding errors"):
            model.merge_adapter([name])
    model.unmerge_adapter()
    assert torch.equal(zoo.logits(model, inputs), expected)


@FEW
def test_safe_merge_rejects_nan(kind, base):
    model = adapted(base(kind))
    zoo.perturb(model)
    inputs = batch(model)
    with torch.no_grad():
        zoo.adapter_of(model).lam[-1] = torch.nan
    with model.disable_adapter():
        expected = zoo.logits(model, inputs)
    weights = [id(m.base_layer.weight) for m in adapted_layers(model)]
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert [id(m.base_layer.weight) for m in adapted_layers(model)] == weights
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, inputs), expected)


class Doubled(torch.Tensor):
    """A weight that only its own F.linear reads rightly, as torchao's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        x, weight, *bias = args
        return 2 * func(x, weight.as_subclass(torch.Tensor), *bias)


def test_any_tensor_subclass_keeps_its_own_forward():
    """q, k and v too, which would compute as one."""
    base = LLAMA.base()
    for name, layer in base.named_modules():
        if name.endswith("_proj"):
            weight = layer.weight.detach().as_subclass(Doubled)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    inputs = models.batch(base)
    expected = zoo.logits(base, inputs)
    assert zoo.relative_error(expected, zoo.logits(LLAMA.base(), inputs)) > 0.01
    model = adapted(base)
    assert torch.equal(zoo.logits(model, inputs), expected)
    with pytest.raises(ValueError, match="weight of a Linear can't take ΔW; export_lora"):
        model.merge_adapter()


def test_merge_of_plain_layers_beside_quantized_ones():
    ao = pytest.importorskip("torchao.quantization")
    model = models.net()
    ao.quantize_(model.up, ao.Int8WeightOnlyConfig())
    hal_kernels.patch_model(model, 2, hypernet="direct", targets=["down.0", "down.1"])
    model.hal.lam.data.normal_()
    model.hal.forget()
    inputs = models.batch(model)
    expected = zoo.logits(model, inputs)
    merged = zoo.logits(hal_kernels.merge(model), inputs)
    assert zoo.relative_error(merged, expected) < 2e-5  # as of all merges in float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao packs int4 on a GPU only")
def test_int4_of_torchao_on_a_gpu(base, tmp_path):
    """It trains, is saved and loaded; torchao can't dequantize it, so merging is refused."""
    load = functools.partial(base, "ao-int4-tiles", dtype=torch.bfloat16)
    model = adapted(load())
    inputs = batch(model)
    check_training(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(zoo.logits(loaded, inputs), zoo.logits(model, inputs))
    with pytest.raises(ValueError, match="can't take ΔW; export_lora"):
        model.merge_adapter()
