"""Layers that a model does not call: told of, and left out of what is merged or exported."""

import json

import models
import peft
import pytest
import torch
from lifecycle import predict
from torch import nn
from torch.nn import functional as F
from training import adam, train

import hal_kernels
import hal_peft
from hal_kernels.nn.calls import PATIENCE

DEAD = ["first.k", "second.k"]
KINDS = [
    {"hypernet": "direct"}, {"update": "spectral"},
    {"hypernet": "bert"}, {"hypernet": "bert", "update": "replace"},
]  # fmt: skip


class Reading(nn.Module):
    """Calls q, and reads the weight of k, as WavLM's attention does of its projections."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(models.WIDTH, 24), nn.Linear(models.WIDTH, 24)

    def forward(self, x):
        return torch.tanh(self.q(x) * F.linear(x, self.k.weight, self.k.bias)) @ self.k.weight


def model():
    torch.manual_seed(0)
    return models.Holder(first=Reading(), second=Reading()).train()


pytestmark = pytest.mark.usefixtures("small_hypernets")


def adapted(**options):
    found = hal_kernels.patch_model(model(), 2, seed=0, **options)
    optimizer = adam(found, 1e-2)
    message = r"reads the weight of first\.k, second\.k without calling the layer"
    with pytest.warns(UserWarning, match=message) as issued:
        for inputs in batches():
            train(found, optimizer, [inputs])
    assert len(issued) == 1
    return found


def batches():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(4) % models.CLASSES
    for _ in range(6):
        yield {"x": torch.randn(4, models.WIDTH, generator=generator), "labels": labels}


def output(found):
    return predict(found, x=next(batches())["x"], labels=torch.arange(4) % models.CLASSES)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_is_merged_saved_or_exported(options, tmp_path):
    found = adapted(**options)
    expected = output(found)
    weights = [found.get_submodule(name).weight.clone() for name in DEAD]
    hal_kernels.save_adapter(found, tmp_path / "adapter")
    hal_kernels.export_lora(found, tmp_path / "lora")
    torch.testing.assert_close(output(hal_kernels.merge(found)), expected)
    for name, weight in zip(DEAD, weights, strict=True):
        assert torch.equal(found.get_submodule(name).weight, weight)
    loaded = hal_kernels.load_adapter(model(), tmp_path / "adapter")
    torch.testing.assert_close(output(hal_kernels.merge(loaded)), expected)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not set(DEAD) & set(config["target_modules"])
    exported = peft.PeftModel.from_pretrained(model(), tmp_path / "lora")
    torch.testing.assert_close(output(exported.merge_and_unload()), expected)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_under_peft(options, tmp_path):
    config = hal_peft.HyperAdaLoraConfig(
        r=2, seed=0, target_modules=["q", "k"], modules_to_save=["classifier"], **options
    )
    found = peft.get_peft_model(model(), config)
    with pytest.warns(UserWarning, match=r"reads the weight of .*k, .*k without calling the layer"):
        train(found, adam(found, 1e-2), batches())
    expected = output(found)
    found.save_pretrained(tmp_path)
    torch.testing.assert_close(output(found.merge_and_unload()), expected)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(output(loaded), expected)
    torch.testing.assert_close(output(loaded.merge_and_unload()), expected)


class Blocks(models.Holder):
    """Leaves its second block out while told so, as layer-drop and routing to experts do."""

    skips = True

    def forward(self, x, labels=None):
        x = self.one(x)
        logits = self.classifier(x if self.skips else self.two(x))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def blocks():
    def block():
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))

    return hal_kernels.patch_model(Blocks(one=block(), two=block()), 2, hypernet="direct")


def test_a_layer_that_had_no_turn_yet():
    """Nothing is said: pytest makes errors of our warnings."""
    found = blocks()
    optimizer = adam(found, 1e-2)
    train(found, optimizer, batches())
    assert found.hal.never_called.tolist() == [False, False, True, True]
    found.skips = False
    train(found, optimizer, batches())
    assert not found.hal.never_called.any()
    expected = output(found)
    torch.testing.assert_close(output(hal_kernels.merge(found)), expected)


def test_a_layer_that_had_its_turn_before_a_resume(tmp_path):
    """Which layers were called is saved with the adapter."""
    found = blocks()
    found.skips = False
    train(found, adam(found, 1e-2), batches())
    hal_kernels.save_adapter(found, tmp_path)
    again = hal_kernels.load_adapter(blocks(), tmp_path)
    for _ in range(PATIENCE + 1):
        train(again, adam(again, 1e-2), [next(batches())])
    assert not again.hal.never_called.any()


def test_a_member_of_a_list_that_had_no_turn_yet():
    """Experts are called by what comes in: others of their list were."""

    class Experts(models.Holder):
        def forward(self, x, labels=None):
            logits = self.classifier(self.experts[0](x))
            return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    experts = nn.ModuleList(nn.Linear(models.WIDTH, models.WIDTH) for _ in range(2))
    found = hal_kernels.patch_model(Experts(experts=experts), 2, hypernet="direct")
    train(found, adam(found), batches())
    assert found.hal.never_called.tolist() == [False, True]


def test_a_layer_that_never_gets_a_turn():
    found = blocks()
    optimizer = adam(found, 1e-2)
    train(found, optimizer, batches())
    with pytest.warns(UserWarning, match=r"reads the weight of two\.0, two\.2 without"):
        train(found, optimizer, batches())
