"""The fine-tuning command, end to end on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file

import hal_kernels

from .tiny import write_jsonl

METHODS = ("hyperadalora", "adalora", "adalora-peft", "lora", "full")
# 40 rows in batches of 4: ten steps an epoch; 14 layers of rank 3, 2 on average in the end.
RECIPE = (
    "--per-device-train-batch-size", 4, "--learning-rate", 1e-3, "--warmup-steps", 2, "--rank", 2,
    "--interval", 1, "--logging-steps", 2, "--max-steps", 12, "--save-strategy", "steps",
    "--save-steps", 8, "--eval-strategy", "steps", "--eval-steps", 8,
)  # fmt: skip
LAYERS = 2 * 6 + 1  # with the pooler


def classification(bert_folder, reviews, *more):
    train, dev = reviews
    files = ("--train-file", train, "--eval-file", dev)
    return ("--model", bert_folder, *files, "--report-to", "none", *RECIPE, *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter_tensors(folder):
    (path,) = folder.glob("adapter-*.safetensors")
    return load_file(path)


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(6, 40, (3, 9))).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_its_files(
    method, finetune, bert_folder, reviews, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = classification(bert_folder, reviews, "--method", method, "--output-dir", out)
    assert finetune(*arguments, "--head-learning-rate", 1e-2) == 0
    assert "accuracy" in capsys.readouterr().out
    logged = lines(out / "metrics.jsonl")
    assert [e["step"] for e in logged if "loss" in e] == [2, 4, 6, 8, 10, 12]
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["metrics"]["accuracy"] <= 1
    assert results["settings"]["learning_rate"] == 1e-3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "| accuracy |" in card and str(bert_folder) in card
    allocates = method not in ("lora", "full")
    assert (out / "ranks.png").exists() == allocates
    if allocates:
        assert sum(results["ranks"].values()) == 2 * LAYERS
        assert f"{3 * LAYERS} directions at first, {2 * LAYERS} kept" in card
    assert (out / ("model" if method == "full" else "adapter")).is_dir()
    if method in ("hyperadalora", "adalora"):
        for entry in logged:
            if "loss" in entry:
                assert entry["task_loss"] + entry["penalty"] == pytest.approx(entry["loss"])
                assert entry["penalty"] > 0
        assert not list((out / "checkpoint-8").glob("model*")), "the whole model was saved"


def test_the_adapter_and_its_lora_load_elsewhere(finetune, bert_folder, reviews, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Auto

    assert finetune(*classification(bert_folder, reviews, "--output-dir", tmp_path)) == 0
    torch.manual_seed(7)  # another head than the one that was trained
    model = hal_kernels.load_adapter(Auto.from_pretrained(bert_folder), tmp_path / "adapter")
    lora = PeftModel.from_pretrained(Auto.from_pretrained(bert_folder), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(Auto.from_pretrained(bert_folder))).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["hyperadalora", "adalora"])
def test_a_resumed_run_is_the_uninterrupted_one(method, finetune, bert_folder, reviews, tmp_path):
    """Bit for bit, and with each step's line in the metrics once."""
    arguments = classification(bert_folder, reviews, "--method", method)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*arguments, "--output-dir", whole) == 0
    assert finetune(*arguments, "--output-dir", parts) == 0
    for path in [*(parts / "checkpoint-12").iterdir(), *(parts / "adapter").iterdir()]:
        path.unlink()  # as if it had been killed in between
    (parts / "checkpoint-12").rmdir()
    assert finetune(*arguments, "--output-dir", parts, "--resume") == 0
    expected, found = adapter_tensors(whole / "adapter"), adapter_tensors(parts / "adapter")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    kept = ("step", "loss", "task_loss", "penalty", "directions_kept", "eval_loss")
    for entry, other in zip(
        lines(whole / "metrics.jsonl"), lines(parts / "metrics.jsonl"), strict=True
    ):
        assert [entry.get(k) for k in kept] == [other.get(k) for k in kept]


def test_a_run_is_not_overwritten(finetune, bert_folder, reviews, tmp_path, capsys):
    arguments = classification(bert_folder, reviews, "--output-dir", tmp_path / "out")
    assert finetune(*arguments, "--resume") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert finetune(*arguments) == 0
    assert finetune(*arguments) == 2
    assert "holds a run: --resume" in capsys.readouterr().err


def test_tensorboard_has_both_parts_of_the_loss(finetune, bert_folder, reviews, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    arguments = classification(bert_folder, reviews, "--output-dir", tmp_path)
    assert finetune(*arguments, "--report-to", "tensorboard") == 0
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (losses, penalties) = (found.Scalars(f"train/{name}") for name in ("task_loss", "penalty"))
    assert [event.step for event in losses] == [event.step for event in penalties]
    assert len(losses) == 6


def test_instructions(finetune, llama_folder, instructions, tmp_path, capsys):
    status = finetune(
        "--model", llama_folder, "--train-file", instructions, "--held-out", 4, *RECIPE,
        "--output-dir", tmp_path, "--max-length", 110, "--max-new-tokens", 4, "--report-to", "none",
    )  # fmt: skip
    assert status == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert {"loss", "answers_bleu4", "answers_rouge1"} <= metrics.keys()
    assert "answers_bleu4" in capsys.readouterr().out


@pytest.mark.parametrize("allowed", [False, True])
def test_humaneval_runs_programs_only_with_leave(
    allowed, finetune, llama_folder, instructions, tmp_path, capsys, monkeypatch
):
    from hal_peft import evaluators

    ran = []
    monkeypatch.setattr(evaluators, "passes", lambda program, *_, **__: ran.append(program) or True)
    row = {
        "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }  # fmt: skip
    status = finetune(
        "--model", llama_folder, "--train-file", instructions, "--max-steps", 1,
        "--eval-file", write_jsonl(tmp_path / "humaneval.jsonl", [row, row]), "--report-to", "none",
        "--output-dir", tmp_path / "out", "--max-length", 110, "--max-new-tokens", 4,
        *(["--allow-code-execution"] if allowed else []),
    )  # fmt: skip
    assert status == 0
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert len(ran) == (2 if allowed else 0)
    assert metrics.get("answers_pass_at_1") == (1.0 if allowed else None)
    assert ("pass@1 is left out" in capsys.readouterr().err) == (not allowed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--model is missing"),
        (["--model", "x"], "one of --dataset and --train_file"),
        (["--model", "x", "--train-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "x", "--dataset", "no/such"], "data set 'no/such' can't be loaded"),
        (["--model", "x", "--dataset", "gsm8k", "--held-out", "0"], "--held_out is 0"),
        (["--model", "x", "--dataset", "gsm8k", "--fp16", "--bf16"], "fp16"),
    ],
)
def test_errors_are_one_line(arguments, message, finetune, capsys, monkeypatch):
    assert finetune(*arguments) == 2
    said = capsys.readouterr().err
    assert "hal-finetune: error: " in said and message in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rank", 0], "rank is 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--target-modules", "nothing"], "'nothing' matches no module"),
        (["--method", "lora", "--target-modules", "nothing"], "'nothing' matches no module"),
    ],
)
def test_options_that_do_not_fit_the_model(more, message, finetune, bert_folder, reviews, capsys):
    assert finetune(*classification(bert_folder, reviews, *more)) == 2
    assert message in capsys.readouterr().err


def test_accumulated_micro_batches_are_averaged(finetune, bert_folder, reviews, tmp_path):
    """Logged at a learning rate of nothing: rows in one batch, or in two, have the same loss."""
    found = []
    for rows, micro in ((4, 1), (2, 2)):
        out = tmp_path / str(micro)
        arguments = classification(bert_folder, reviews, "--output-dir", out, "--max-steps", 10)
        more = ("--per-device-train-batch-size", rows, "--gradient-accumulation-steps", micro)
        assert finetune(*arguments, "--learning-rate", 1e-30, "--logging-steps", 10, *more) == 0
        found.append(next(e for e in lines(out / "metrics.jsonl") if "loss" in e))
    assert found[0]["penalty"] == pytest.approx(found[1]["penalty"], rel=1e-4)
    assert found[0]["task_loss"] == pytest.approx(found[1]["task_loss"], rel=0.1)  # dropout
