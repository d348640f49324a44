"""Tiny pretrained models and data files for the tests of fine-tuning."""

import pytest
import torch

from .tiny import build_tokenizer, write_jsonl


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A BERT encoder with dropout, so that a resumed run needs its random state."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = build_tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """(training, held-out) files of labelled sentences that a classifier can tell apart."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = [
        {"sentence": f"the film was {'very ' * (i % 3)}{word} and so it is", "label": label}
        for i in range(12)
        for word, label in (("good", 1), ("bad", 0), ("great", 1), ("awful", 0))
    ]
    return write_jsonl(folder / "train.jsonl", rows[:40]), write_jsonl(
        folder / "dev.jsonl", rows[40:]
    )


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    rows = [
        {
            "instruction": f"write the number {i}",
            "input": "a film" * (i % 2),
            "output": f"it is {i}",
        }
        for i in range(20)
    ]
    return write_jsonl(tmp_path_factory.mktemp("instructions") / "rows.jsonl", rows)


@pytest.fixture
def finetune(tmp_path, monkeypatch, small_hypernets):
    """Run the command in this process: `finetune("--flag", value, …)` returns its exit status."""
    from hal_finetune.main import main

    monkeypatch.chdir(tmp_path)
    # Trainer's integration sets it for good.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))

    def run(*arguments):
        return main([*map(str, arguments), "--use-cpu", "--disable-tqdm", "true"])

    return run
