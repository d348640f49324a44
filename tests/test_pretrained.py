"""save_pretrained of a patched transformers model: the base model, and the adapter beside it."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict
from training import train, trainable

import hal_kernels

hf = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")


def trained(model):
    hal_kernels.patch_model(model, 2, hypernet="direct", seed=0)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), [models.batch(model)] * 3)
    return model


def keys(folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def save(model, folder):
    with pytest.warns(UserWarning, match=r"hal_kernels: from_pretrained.* will give the base mod"):
        model.save_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["word_embeddings"]}])
def test_from_pretrained_gives_the_base_and_load_adapter_the_rest(options, tmp_path):
    model = models.bert()
    base, names = predict(model), set(model.state_dict())
    model = trained(model) if not options else patched(model, **options)
    expected = predict(model)
    save(model, tmp_path)
    assert keys(tmp_path) == names
    assert torch.equal(predict(model), expected)  # which was not changed by it
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), base)
    hal_kernels.load_adapter(loaded, tmp_path)
    assert torch.equal(predict(loaded), expected)
    with hal_kernels.disabled(loaded):
        assert torch.equal(predict(loaded), base)


def test_a_state_dict_that_the_caller_gathered(tmp_path):
    """As Trainer passes one of a sharded model: its file is the base model's all the same."""
    model = models.bert()
    base, names = predict(model), set(model.state_dict())
    trained(model)
    with pytest.warns(UserWarning, match=r"will give the base model"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert keys(tmp_path) == names
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), base)
    assert torch.equal(predict(hal_kernels.load_adapter(loaded, tmp_path)), predict(model))


def test_one_process_writes_the_adapter(tmp_path):
    model = trained(models.bert())
    with pytest.warns(UserWarning, match=r"will give the base model"):
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "adapter.json").exists()


def test_a_copy_saves_itself(tmp_path):
    model = trained(models.llama(tie_word_embeddings=True))
    copied = copy.deepcopy(model)
    train(copied, torch.optim.AdamW(trainable(copied), lr=1e-2), [models.batch(model)])
    save(copied, tmp_path)
    loaded = hal_kernels.load_adapter(type(model).from_pretrained(tmp_path), tmp_path)
    assert torch.equal(predict(loaded), predict(copied))
    assert not torch.equal(predict(loaded), predict(model))


def test_merged_it_saves_as_any_model_does(tmp_path):
    model = hal_kernels.merge(trained(models.bert()))
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model).from_pretrained(tmp_path)), predict(model))
    assert not (tmp_path / "adapter.json").exists()
    save(hal_kernels.unmerge(model), tmp_path / "again")


def test_trainer_saves_so_and_resumes_from_its_own_checkpoints(tmp_path):
    """Whose model file holds the adapter's tensors too: Trainer reads nothing else."""
    model = models.bert()
    names = set(model.state_dict())
    hal_kernels.patch_model(model, 2, hypernet="direct", seed=0)
    rows = models.batch(model)
    data = [{name: column[i] for name, column in rows.items()} for i in range(4)]
    options = hf.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = hf.Trainer(model, options, train_dataset=data)
    with pytest.warns(UserWarning, match=r"will give the base model"):
        trainer.train()
    trainer.save_model()  # told already
    assert keys(tmp_path) == names < keys(tmp_path / "checkpoint-2")
    other = hal_kernels.patch_model(models.bert(), 2, hypernet="direct", seed=3)
    resumed = hf.Trainer(other, options, train_dataset=data)
    with pytest.warns(UserWarning, match=r"will give the base model"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(predict(other), predict(model))
