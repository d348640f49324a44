"""A model whose layers were moved, removed or copied after it was patched."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict, unchanged
from torch import nn

import hal_kernels


def swap_blocks(model):
    model.up[0], model.up[1] = model.up[1], model.up[0]


def insert_a_block(model):
    model.up.insert(0, nn.Linear(16, 24))


def remove_a_block(model):
    del model.up[0], model.down[0]


def replace_a_layer(model):
    model.up[0] = nn.Linear(16, 24)


def copy_a_block(model):
    model.up.append(copy.deepcopy(model.up[0]))


OTHERWISE = [
    (swap_blocks, r"'up\.0' is 'up\.1' now; 'up\.1' is 'up\.0' now"),
    (insert_a_block, r"'up\.0' is 'up\.1' now; 'up\.1' is 'up\.2' now"),
    (remove_a_block, r"missing \['up\.0', 'down\.0'\]"),
    (replace_a_layer, r"missing \['up\.0'\]"),
    (copy_a_block, r"added \['up\.2'\]"),
]


@pytest.mark.parametrize(("change", "message"), OTHERWISE)
def test_layers_changed_after_patching(change, message, tmp_path):
    """Names then mean other layers: what is read, saved or merged by name is refused."""
    model = patched(init_rank=3)
    hal_kernels.save_adapter(model, tmp_path / "before")
    change(model)
    calls = [
        hal_kernels.factors,
        hal_kernels.rank_pattern,
        hal_kernels.compact,
        hal_kernels.merge,
        lambda m: hal_kernels.save_adapter(m, tmp_path / "new"),
        lambda m: hal_kernels.export_lora(m, tmp_path / "new"),
        lambda m: hal_kernels.load_adapter(m, tmp_path / "before"),
    ]
    for call in calls:
        with unchanged(model), pytest.raises(ValueError, match=f"no longer those .*: {message}"):
            call(model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("change", "message"), OTHERWISE[:4])
def test_layers_changed_after_merging(change, message):
    model = hal_kernels.merge(patched())
    change(model)
    with unchanged(model), pytest.raises(ValueError, match=f"no longer those .*: {message}"):
        hal_kernels.unmerge(model)


def test_wrapped_and_moved_layers_are_the_same_layers(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = patched()
    expected, names = predict(model), list(hal_kernels.factors(model))
    model.up[0] = Wrapper(model.up[0])
    model.encoder = model.down  # has two names now
    outer = nn.ModuleDict({"part": model})
    assert list(hal_kernels.factors(outer)) == names
    hal_kernels.save_adapter(outer, tmp_path)
    hal_kernels.export_lora(outer, tmp_path)
    loaded = hal_kernels.load_adapter(models.net(), tmp_path)
    assert torch.equal(predict(loaded), expected)
    hal_kernels.load_adapter(outer, tmp_path)
    torch.testing.assert_close(predict(hal_kernels.merge(outer)), expected)
    assert torch.equal(predict(hal_kernels.unmerge(outer)), expected)


@pytest.mark.parametrize(("change", "message"), [OTHERWISE[0], OTHERWISE[2], OTHERWISE[4]])
def test_layers_changed_under_peft(change, message, tmp_path):
    peft = pytest.importorskip("peft")
    import hal_peft

    config = hal_peft.HyperAdaLoraConfig(r=2, hypernet="direct", target_modules=["0", "1"])
    model = peft.get_peft_model(models.net(), config)
    model.save_pretrained(tmp_path / "before")
    change(model.base_model.model)
    calls = [
        lambda: model.factors(),
        lambda: model.compact(),
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: model.export_lora(tmp_path / "new"),
        lambda: hal_peft.export_adalora(model, tmp_path / "new"),
        lambda: model.load_adapter(tmp_path / "before", "default"),
    ]
    for call in calls:
        with unchanged(model), pytest.raises(ValueError, match=f"no longer those .*: {message}"):
            call()
