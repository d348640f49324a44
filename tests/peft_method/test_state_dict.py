"""State dicts that were filtered before, or come from a model in a wrapper."""

import peft
import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from . import zoo

BERT, LLAMA = (zoo.BY_NAME[name] for name in ("bert", "llama"))


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in state.items())


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_a_state_dict_that_was_filtered_before(case, tmp_path):
    """As scripts have it that replace the model's `state_dict`: filtering twice is once."""
    model = case.adapted(hypernet="bert")
    batch = case.batch(model.get_base_model())
    zoo.train(model, batch)
    once, whole = peft.get_peft_model_state_dict(model), model.state_dict
    model.state_dict = (
        lambda self, *_, **__: peft.get_peft_model_state_dict(self, whole())
    ).__get__(model, type(model))
    assert same(peft.get_peft_model_state_dict(model), once)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(zoo.logits(loaded, batch), zoo.logits(model, batch))
    model.add_adapter("other", case.config())
    with pytest.raises(ValueError, match="filtered already and does not say of which adapter"):
        peft.get_peft_model_state_dict(model)


def test_a_wrapped_model_state_dict():
    """Names are those in the PEFT model, whatever wraps it or parts of it."""
    model = BERT.adapted(hypernet="bert")
    once, whole = peft.get_peft_model_state_dict(model), model.state_dict()
    for prefix in ("module.", "_orig_mod.", "_fsdp_wrapped_module."):
        prefixed = {prefix + key: value for key, value in whole.items()}
        assert same(peft.get_peft_model_state_dict(model, prefixed), once)
    assert same(peft.get_peft_model_state_dict(torch.compile(model)), once)
    for lost in (".hal_adapters.", "mask"):
        rest = {key: value for key, value in whole.items() if lost not in key}
        with pytest.raises(ValueError, match=r"state_dict lacks \d+ tensors of adapter 'default'"):
            peft.get_peft_model_state_dict(model, rest)


def test_fully_sharded_data_parallel(tmp_path):
    """FSDP's own names are taken off on saving; loading is for the model before it is wrapped."""
    model = BERT.adapted(hypernet="bert")
    once = peft.get_peft_model_state_dict(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'processes'}", rank=0, world_size=1
    )
    try:
        block = type(model.get_base_model().bert.encoder.layer[0])
        wrapped = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({block, torch.nn.Linear}),
            device_id=torch.device("cpu"),
        )
        assert same(peft.get_peft_model_state_dict(wrapped), once)
        with pytest.raises(ValueError, match="wrapped in FSDP"):
            peft.set_peft_model_state_dict(wrapped, once)
    finally:
        torch.distributed.destroy_process_group()
