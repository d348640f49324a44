"""Tiny pretrained models and data files for the tests of fine-tuning."""

import pytest

from .tiny import save_model, write_jsonl


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A BERT encoder with dropout, so that a resumed run needs its random state."""
    return save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    options = {"max_position_embeddings": 128, "num_key_value_heads": 1, "bos_token_id": None}
    return save_model("llama", tmp_path_factory.mktemp("llama"), **options)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """(training, held-out) files of labelled sentences that a classifier can tell apart."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = [
        {"sentence": f"the film was {'very ' * (i % 3)}{word} and so it is", "label": label}
        for i in range(12)
        for word, label in (("good", 1), ("bad", 0), ("great", 1), ("awful", 0))
    ]
    files = {"train.jsonl": rows[:40], "dev.jsonl": rows[40:]}
    return tuple(write_jsonl(folder / name, part) for name, part in files.items())


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
