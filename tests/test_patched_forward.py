"""A patched model in use: what its forward returns, dtypes, copies, wrappers, its state_dict."""

import collections
import copy
import dataclasses
import subprocess
import sys
from typing import Any

import models
import pytest
import torch
from lifecycle import HYPERNETS, foreign_net, patched, pickled, predict, unchanged
from torch import nn
from torch.nn import functional as F
from training import adam, assert_close, assert_equal, batches, gradients, train

import hal_kernels

pytestmark = pytest.mark.usefixtures("small_hypernets")

# -- the loss a forward returns --------------------------------------------------------------------


class Plain(dict):
    """A mapping that is not transformers' ModelOutput."""


@dataclasses.dataclass
class Record:
    logits: Any
    loss: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    logits: Any
    loss: Any = None


Pair = collections.namedtuple("Pair", "loss logits")


def model_output(loss, logits):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(loss=loss, logits=logits)


RETURNS = {
    "ModelOutput": (model_output, lambda out: (out.loss, out.logits)),
    "dict": (lambda a, b: {"loss": a, "logits": b}, lambda out: (out["loss"], out["logits"])),
    "mapping": (lambda a, b: Plain(loss=a, logits=b), lambda out: (out["loss"], out["logits"])),
    "tuple": (lambda a, b: (a, b), lambda out: out),
    "list": (lambda a, b: [a, b], lambda out: out),
    "named tuple": (Pair, lambda out: (out.loss, out.logits)),
    "scalar": (lambda a, b: a, lambda out: (out, None)),
    "dataclass": (lambda a, b: Record(b, a), lambda out: (out.loss, out.logits)),
    "frozen dataclass": (lambda a, b: FrozenRecord(b, a), lambda out: (out.loss, out.logits)),
}


class Returning(models.Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x, labels=None):
        logits = self.classifier(self.features(x))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.wrap(loss, logits)


@pytest.mark.parametrize(
    ("kind", "hypernet"), [*((kind, "direct") for kind in RETURNS), ("ModelOutput", "bert")]
)
def test_penalty_is_added_in_training_and_nowhere_else(kind, hypernet):
    wrap, parts = RETURNS[kind]
    model = patched(Returning(wrap), hypernet=hypernet, gamma=0.5)
    inputs = models.batch(models.net())
    plain, term = model.eval()(**inputs), hal_kernels.penalty(model)
    assert term > 0.01
    expected, logits = parts(plain)
    with torch.no_grad():
        assert torch.equal(parts(model(**inputs))[0], expected)
        assert torch.equal(parts(model.train()(**inputs))[0], expected)
    out = model(**inputs)
    assert type(out) is type(plain)
    loss, same = parts(out)
    torch.testing.assert_close(loss, expected + term)
    assert logits is None or torch.equal(same, logits)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    (parts(model.eval()(**inputs))[0] + hal_kernels.penalty(model)).backward()
    assert_close(found, gradients(model), 1e-5)  # float32 sums in another order


@pytest.mark.parametrize("wrap", [lambda a, b: b, lambda a, b: {"logits": b}, lambda a, b: (b, b)])
def test_output_without_a_loss_is_left_alone(wrap):
    model = patched(Returning(wrap), gamma=0.5)
    inputs = models.batch(models.net())

    def flat(out):
        out = out.values() if isinstance(out, dict) else out
        return [out] if torch.is_tensor(out) else list(out)

    expected = flat(model.eval()(**inputs))
    for found, value in zip(flat(model.train()(**inputs)), expected, strict=True):
        assert torch.equal(found, value)


def test_no_loss_and_a_loss_without_gradient_are_left_alone():
    for wrap in (lambda a, b: {"loss": None}, lambda a, b: {"loss": b.mean().detach()}):
        model = patched(Returning(wrap), gamma=0.5)
        x = models.batch(models.net())["x"]
        expected, found = model.eval()(x)["loss"], model.train()(x)["loss"]
        assert (found is None) if expected is None else torch.equal(found, expected)


def test_gamma_zero_adds_nothing():
    model = patched(gamma=0.0)
    inputs = models.batch(model)
    assert torch.equal(model.train()(**inputs)["loss"], model.eval()(**inputs)["loss"])
    assert hal_kernels.penalty(model) == 0


# -- dtypes and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_base_and_factors_of_any_dtype(base, factors):
    model = models.net(dtype=base)
    plain = predict(model)
    hal_kernels.patch_model(model, 2, hypernet="direct", dtype=factors)
    assert torch.equal(predict(model), plain)
    floats = [*model.hal.parameters(), model.hal.mask]
    assert {t.dtype for t in floats} == {factors}
    assert {p.dtype for n, p in model.named_parameters() if "hal." not in n} == {base}
    losses = train(model, adam(model, 3e-2), [models.batch(model)] * 6)
    assert losses[-1] < losses[0] and predict(model).dtype == base


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_bf16_adapter_of_every_kind_trains(hypernet):
    model = patched(models.net(dtype=torch.bfloat16), hypernet=hypernet, dtype=torch.bfloat16)
    train(model, adam(model, 1e-3), batches(model, 3))
    assert model.hal.steps == 3
    assert all(torch.isfinite(v).all() for v in model.hal.state_dict().values())


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(hypernet, dtype):
    model = patched(hypernet=hypernet)
    expected = predict(model)
    assert model.to(dtype) is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float64 else 0.05  # roundings of 2⁻²⁴, of 2⁻⁹
    assert (predict(model).float() - expected).norm() < tolerance * expected.norm()
    train(model, adam(model, 1e-3), batches(model, 2))
    assert model.hal.steps == 2


def test_to_the_device_it_is_on_changes_nothing():
    model = patched(hypernet="bert")
    expected = predict(model)
    assert torch.equal(predict(model.to("cpu")), expected)


def test_train_and_eval_reach_the_adapter_and_its_dropout():
    model = patched(dropout=0.5)
    assert model.training and model.hal.training
    x = models.batch(model)["x"]
    assert not torch.equal(model(x)["logits"], model(x)["logits"])
    model.eval()
    assert not model.hal.training
    assert torch.equal(model(x)["logits"], model(x)["logits"])
    assert not patched(models.net().eval()).hal.training


def test_inference_mode_and_training_mix():
    model = patched(hypernet="bert")
    with torch.inference_mode():
        first = model(**models.batch(model))["logits"].clone()
    model(**models.batch(model))["loss"].backward()
    with torch.inference_mode():
        assert torch.equal(model(**models.batch(model))["logits"], first)


# -- copies ----------------------------------------------------------------------------------------


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}
MODELS = {"linear": models.net, "conv1d": models.gpt2, "foreign": foreign_net}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    ("kind", "hypernet"),
    [
        *((kind, "direct") for kind in MODELS),
        ("linear", "bert"),
        ("linear", "mlp"),
        ("linear", "cnn"),
    ],
)
def test_a_copy_is_a_model_of_its_own(way, kind, hypernet):
    options = {"init_rank": 3, "interval": 2, "hypernet": hypernet, "allocation": "ema"}
    model = patched(MODELS[kind](), **options)
    optimizer = adam(model)
    train(model, optimizer, batches(model, 2))
    twin = COPIES[way](model)
    assert twin.hal is not model.hal
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert_equal(twin.state_dict(), model.state_dict())
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    fresh, data = adam(twin), batches(model, 4, size=5)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = train(twin, fresh, data)
    assert twin.hal.steps == 6
    assert_equal(dict(model.state_dict()), frozen)
    assert train(model, optimizer, data) == losses
    assert_equal(twin.state_dict(), model.state_dict())


def test_a_copy_can_be_merged_without_the_original():
    model = patched()
    twin = copy.deepcopy(model)
    adapted = predict(model)
    hal_kernels.merge(twin)
    assert not twin._forward_hooks and not twin._forward_pre_hooks
    torch.testing.assert_close(predict(twin), adapted)
    assert torch.equal(predict(model), adapted)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


# -- wrappers --------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_functions_reach_through_wrappers(tmp_path):
    model = patched(gamma=0.5)
    wrapper = Wrapper(Wrapper(model))
    inputs = models.batch(model)
    expected = model(**inputs)["loss"]
    assert torch.equal(wrapper(**inputs)["loss"], expected)
    assert hal_kernels.rank_pattern(wrapper) == hal_kernels.rank_pattern(model)
    assert hal_kernels.factors(wrapper).keys() == hal_kernels.factors(model).keys()
    assert torch.equal(hal_kernels.penalty(wrapper), hal_kernels.penalty(model))
    with hal_kernels.disabled(wrapper):
        assert model.hal.disabled
    hal_kernels.save_adapter(wrapper, tmp_path / "a")
    hal_kernels.export_lora(wrapper, tmp_path / "b")
    hal_kernels.load_adapter(wrapper, tmp_path / "a")
    hal_kernels.compact(wrapper)
    hal_kernels.merge(wrapper)
    hal_kernels.unmerge(wrapper)
    assert torch.equal(wrapper(**inputs)["loss"], expected)


def test_a_patched_model_inside_sequential():
    body = patched(Returning(lambda loss, logits: logits))
    outer = nn.Sequential(body, nn.Softmax(-1))
    x = torch.randn(3, 16)
    assert torch.equal(outer(x), body(x).softmax(-1))
    outer(x).square().sum().backward()
    assert body.hal.lam.grad.any()


def test_a_model_that_is_data_parallel_already_is_refused(tmp_path):
    """Its gradient buckets were made before: the adapter would not be synchronised."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(models.net())
        with unchanged(parallel), pytest.raises(ValueError, match="DistributedDataParallel"):
            hal_kernels.patch_model(parallel)
    finally:
        torch.distributed.destroy_process_group()


# -- state_dict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypernet", "allocation"),
    [(None, "sensitivity"), ("direct", "ema"), ("bert", "ema"), ("mlp", "sensitivity")],
)
def test_state_dict_carries_the_training_state(hypernet, allocation):
    options = {"hypernet": hypernet, "allocation": allocation, "init_rank": 3, "interval": 2}
    model = patched(**options)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, batches(model, 5))
    assert not model.hal.mask.all()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    data = batches(model, 4, size=3)
    losses = train(model, optimizer, data)

    resumed = models.net(seed=9)
    hal_kernels.patch_model(resumed, 2, **options, seed=77)
    again = adam(resumed, 1e-3)
    assert not resumed.load_state_dict(saved[0]).missing_keys
    again.load_state_dict(saved[1])
    assert resumed.hal.steps == 5
    assert train(resumed, again, data) == losses
    assert_equal(resumed.state_dict(), model.state_dict())


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for hal\.p_16"):
        patched(init_rank=2).load_state_dict(patched(init_rank=3).state_dict())


def test_base_weights_load_with_strict_off():
    model = patched()
    other = models.net(seed=4)
    found = model.load_state_dict(other.state_dict(), strict=False)
    assert all(key.startswith("hal.") for key in found.missing_keys) and not found.unexpected_keys
    assert torch.equal(model.up[0].weight, other.up[0].weight)


def test_the_library_never_imports_its_users():
    code = (
        "import sys, hal_kernels;"
        "sys.exit(str({'transformers', 'peft', 'accelerate'} & set(sys.modules) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "0"
