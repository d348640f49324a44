"""Options from the command line and from a config file."""

import json
import re

import pytest

from hal_finetune import model
from hal_finetune.options import METHODS, OptionsError, parse

NEEDED = ["--model", "m", "--dataset", "gsm8k"]


def test_defaults():
    _, method, run = parse(NEEDED)
    assert (method.method, method.rank, method.gamma) == (METHODS[0], 3, 0.1)
    assert model.hal_config(method, 10_000, seed=0).interval is None  # 100 in a long run
    assert (run.learning_rate, run.per_device_train_batch_size) == (None, 64)
    assert (run.lr_scheduler_type, run.warmup_steps, run.weight_decay) == ("cosine", 0.1, 0.0)
    assert run.optim.startswith("adamw_torch")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_file_beneath_the_command_line(suffix, tmp_path):
    values = {
        "model": "m", "dataset": "glue/rte", "learning-rate": "3e-4", "target_modules": ["q", "v"],
        "bf16": False, "rank": 5, "max_steps": None, "lr_scheduler_kwargs": {"num_cycles": 0.25},
    }  # fmt: skip
    path = tmp_path / f"run.{suffix}"
    path.write_text(json.dumps(values).replace('"3e-4"', "3e-4"))
    data, method, run = parse(["--config", str(path), "--rank", "7"])
    assert (data.model, data.dataset) == ("m", "glue/rte")
    assert run.learning_rate == 3e-4  # which YAML itself takes for text
    assert method.target_modules == ["q", "v"]
    assert method.rank == 7
    assert run.lr_scheduler_kwargs == {"num_cycles": 0.25}


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", r"unknown options: learning_rat \(did you mean --learning-rate\?\)"),
        ("- model", "holds a list, expected a mapping"),
        ("{", "--config"),
    ],
)
def test_config_files_that_cannot_be(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(OptionsError, match=message):
        parse([*NEEDED, "--config", str(path)])


def test_a_config_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionsError, match=r"nowhere\.yaml"):
        parse([*NEEDED, "--config", str(tmp_path / "nowhere.yaml")])


def test_the_papers_recipe_is_beneath_everything_else(tmp_path):
    _, method, run = parse([*NEEDED, "--recipe", "paper"])
    assert (method.hypernet, run.learning_rate, run.warmup_steps) == ("bert", 1e-5, 500)
    path = tmp_path / "run.yaml"
    path.write_text("recipe: paper\nwarmup_steps: 7\nhypernet: mlp")
    _, method, run = parse([*NEEDED, "--config", str(path), "--hypernet", "cnn"])
    assert (method.hypernet, run.learning_rate, run.warmup_steps) == ("cnn", 1e-5, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dora"], "invalid choice: 'dora'"),
        (["--rank", "three"], "invalid int value: 'three'"),
        (["--ran", "3"], "unknown options: --ran (did you mean --rank?)"),
        (["--warmup_step=3", "--no-such"], "--warmup_step=3 (did you mean --warmup-steps?), --no-"),
        (["train.jsonl"], "unknown options: train.jsonl"),
    ],
)
def test_the_command_line_is_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse([*NEEDED, *arguments])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hal-finetune: error: ") and message in said


def test_help_is_in_groups_of_a_screen_with_one_spelling_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse([flag])
        said[flag] = capsys.readouterr().out
        listed = re.findall(r"^  (--\S+)", said[flag], re.MULTILINE)
        assert len(set(listed)) == len(listed) and not any("_" in name for name in listed)
        assert {"--train-file", "--no-generate", "--rank", "--recipe", "--bf16"} <= {*listed}
        assert ("--adam-beta1" in listed) == (flag == "--help-all")
        assert "None" not in said["--help"]
    groups = re.split(r"^(\S.*):$", said["--help"], flags=re.MULTILINE)
    assert groups[1::2] == ["options", "model and data", "adapter", "training"]
    assert all(len(text.splitlines()) <= 32 for text in groups[2::2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--per-device-train-batch-size", "0"], "--per-device-train-batch-size is 0"),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps is 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan, expected more than 0"),
        (["--head-learning-rate", "-1"], "--head-learning-rate is -1.0"),
        (["--num-train-epochs", "0"], "--num-train-epochs is 0.0"),
        (["--max-length", str(10**20)], r"--max-length is 1\d*, expected less than 2\*\*31"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (["--seed", str(2**32)], "--seed is 4294967296, expected 0 to"),
        (["--neftune-noise-alpha", "-1"], "--neftune-noise-alpha is -1.0"),
        (["--accelerator-config", '{"x": 1}'], "unexpected keyword argument 'x'"),
        (
            ["--activation-checkpointing-kwargs", '{"x": 1}'],
            r"-checkpointing-kwargs has \['x'\], expected some of \['context_fn'",
        ),
        (
            ["--activation-checkpointing-kwargs", '{"use_reentrant": true}'],
            "reentrant checkpointing, under which the adapter of --method hyperadalora can't",
        ),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(OptionsError, match=message):
        parse([*NEEDED, *arguments])


def test_wrong_values_of_a_config_file_are_the_command_lines(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("rank: three")
    with pytest.raises(SystemExit):
        parse([*NEEDED, "--config", str(path)])
    assert "invalid int value: 'three'" in capsys.readouterr().err
