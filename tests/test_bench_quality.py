"""bench.quality: scores are of what a model wrote, and runs that are wrong write no row."""

import json
import sys

import pytest
import torch
from finetune.tiny import write_jsonl

from bench import language, quality, training_time
from hal_finetune import evaluators
from hal_finetune.prompts import Prompted

STEPS, WINDOW = 8, 4  # the suite's means are of 20 steps
TINY = ["--steps", f"{STEPS}", "--base-steps", "4", "--batch", "2", "--length", "192"]
TINY += ["--new-tokens", "6", "--held-out", "3", "--seed", "0"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The suite on made-up sums; what is called gives its arguments, and takes its rows."""
    sums = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)]
    orders = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(40)]
    for name, rows in (
        ("gsm8k_train", sums), ("gsm8k_test", sums), ("alpaca_8k", orders),
        ("alpaca_heldout", orders),
    ):  # fmt: skip
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.setattr(training_time, "BATCH", 2)  # of the base model's training
    for module in (quality, training_time):
        monkeypatch.setattr(module, "WINDOW", WINDOW)

    def call(*arguments):
        options = ["--data", str(tmp_path), "--out", str(tmp_path), *TINY, *arguments]
        monkeypatch.setattr(sys, "argv", ["quality", *options])
        quality.main()
        lines = (tmp_path / "quality.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    call.rows = tmp_path / "quality.jsonl"
    return call


def test_bytes_are_tokens():
    tokenizer = quality.byte_tokenizer()
    text = "a line\nund Größe, 一 <b>,  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, quality.END, quality.PAD], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (quality.PAD, quality.END)


def test_a_run_has_scores_and_is_not_run_again(command, monkeypatch):
    found = command("--task", "gsm8k", "--method", "frozen", "lora")
    assert [row["method"] for row in found] == ["frozen", "lora"]
    assert all(set(row["scores"]) == {"bleu4", "rouge1", "exact_match"} for row in found)
    assert found[1]["last_loss"] < found[1]["first_loss"] and found[1]["lr"] == quality.LR["lora"]
    more = command("--task", "gsm8k", "--method", "lora", "hal-hyper")
    assert more[:2] == found and [row["method"] for row in more[2:]] == ["hal-hyper"]
    monkeypatch.setattr(quality, "tiny", None)  # no base model is trained for nothing
    assert command("--task", "gsm8k", "--method", "frozen", "lora", "hal-hyper") == more


def test_what_is_scored_are_the_answers(command, monkeypatch):
    """A model that writes the references scores full marks."""
    monkeypatch.setattr(
        evaluators,
        "write_answers",
        lambda model, tokenizer, examples, **o: [e.answer for e in examples],
    )
    (row,) = command("--task", "gsm8k", "--method", "frozen")
    assert row["scores"] == pytest.approx({"bleu4": 100.0, "rouge1": 100.0, "exact_match": 1.0})


@pytest.mark.parametrize(
    "module, name, replacement, message",
    [
        (evaluators, "write_answers", lambda *a, **o: ["", ""], "all of 2 answers are empty"),
        (quality, "text_loss", lambda *a: 9.0, "lora starts at loss .*, the base model at 9.0"),
        (quality, "LR", quality.LR | {"lora": 0.0}, "lora at 0: the mean loss goes from"),
    ],
)  # fmt: skip
def test_a_wrong_run_writes_no_row(command, monkeypatch, module, name, replacement, message):
    monkeypatch.setattr(module, name, replacement)
    if name == "LR":  # the same batch, so that the loss stays as it is
        first = quality.batches

        def same(*arguments):
            rows = next(first(*arguments))
            return iter([rows] * STEPS)

        monkeypatch.setattr(quality, "batches", same)
    with pytest.raises(SystemExit, match=message):
        command("--task", "alpaca", "--method", "lora")
    assert not command.rows.exists()


def test_a_length_that_leaves_no_row_is_refused(command):
    with pytest.raises(SystemExit, match="every prompt is as long, or longer"):
        command("--task", "gsm8k", "--method", "lora", "--length", "9")


def test_programs_run_with_leave_alone(command):
    with pytest.raises(SystemExit, match="humaneval runs what a model writes"):
        command("--task", "humaneval")


def test_pass_at_1_of_a_file_of_problems(command, tmp_path, monkeypatch):
    problem = {
        "prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }  # fmt: skip
    write_jsonl(tmp_path / "humaneval.jsonl", [problem])
    monkeypatch.setattr(evaluators, "write_answers", lambda *a, **o: ["    return 1\n"])
    options = ("--task", "humaneval", "--method", "frozen", "--allow-code-execution")
    (row,) = command(*options)
    assert row["scores"]["pass_at_1"] == 1.0


def test_each_method_at_the_rate_that_ends_lowest():
    row = {"scores": {"rouge1": 1.0}, "seed": 0}
    rows = [row | {"method": "lora", "lr": lr, "last_loss": lr} for lr in (2.0, 1.0)]
    rows.append(row | {"method": "frozen", "lr": None})
    found = quality.best(rows)
    assert [own[0]["lr"] for own in found.values()] == [1.0, None]
    head, body = quality.summary(found, lambda values: str(len(values)))
    assert head == ["method", "lr", "seeds", "last loss", "ROUGE-1"]
    assert body == [["lora", "1", "1", "1", "1"], ["frozen", "–", "1", "–", "1"]]


def test_labels_that_do_not_count():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[:, :3] = -100
    own = training_time.text_loss(logits[:, 2:], labels[:, 2:])
    assert training_time.text_loss(logits, labels) == pytest.approx(own)


def test_held_out_loss_by_steps(command, monkeypatch, tmp_path):
    """bench.language: rows of every method on one model, and the frozen one's loss at the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": quality.END}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).train()
    subject = model.requires_grad_(False), quality.byte_tokenizer()
    monkeypatch.setattr(language, "pretrained", lambda source: subject)
    own = ["--data", str(tmp_path), "--out", str(tmp_path), "--task", "gsm8k", "--seed", "0"]
    own += ["--steps", "4", "--batch", "2", "--length", "80", "--look", "2"]
    methods = ["frozen", "adalora", "hal-spectral"]
    monkeypatch.setattr(sys, "argv", ["language", *own, "--method", *methods, "--lr", "1e-2"])
    language.main()
    rows = [json.loads(line) for line in (tmp_path / "language.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == methods
    start = rows[0]["held_out"]["0"]
    for row in rows[1:]:
        assert len(row["losses"]) == 4 and row["held_out"].keys() == {"2", "4"}
        assert row["held_out"]["4"] < row["held_out"]["2"] < start


def test_rows_that_do_not_fit_are_left_out():
    tokenizer = quality.byte_tokenizer()
    texts = [Prompted(prompt="ab", answer="c" * n) for n in (1, 3, 4)]
    found = language.fitting_rows(tokenizer, texts, 6)
    assert [len(row["input_ids"]) for row in found] == [4, 6]  # with the end
