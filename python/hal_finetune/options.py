"""Options of ``hal-finetune``: dataclasses, a config file, and the command line."""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

METHODS = ("hyperadalora", "adalora", "adalora-peft", "lora", "full")
ON_KERNELS = ("hyperadalora", "adalora")
"""Methods that `hal_kernels.patch_model` provides; the others are PEFT's, or none."""
CHECKPOINTING = {
    "use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop",
}  # fmt: skip
"""What `torch.utils.checkpoint.checkpoint` takes beside the function's own arguments."""


class OptionsError(Exception):
    """Something the user gave that can't be: told in one line."""


def _option(default: Any, words: str) -> Any:
    """A field with the words of ``--help``; a function makes its default."""
    name = "default_factory" if callable(default) else "default"
    return field(**{name: default}, metadata={"help": words})


@dataclass
class DataOptions:
    """Which model, and which data."""

    model: str | None = _option(None, "name on the hub, or path")
    dataset: str | None = _option(
        None, "glue/rte, tatsu-lab/alpaca, gsm8k, … or owner/name[:config]"
    )
    train_file: str | None = _option(None, "local JSONL (or .gz) instead of a data set of the hub")
    eval_dataset: str | None = _option(None, "another set to evaluate on, such as openai_humaneval")
    eval_file: str | None = _option(None, "local JSONL (or .gz)")
    held_out: int = _option(500, "rows split off for evaluation where a set has no held-out side")
    max_train_samples: int | None = _option(None, "use that many rows")
    max_eval_samples: int | None = _option(None, "use that many rows")
    max_length: int = _option(512, "tokens a row is cut to")
    template: Literal["auto", "chat", "alpaca", "plain"] = _option(
        "auto", "of instructions and chats: the tokenizer's chat template where it has one"
    )
    max_new_tokens: int = _option(256, "of an answer in evaluation")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", 'of the base weights; "auto": as they were saved'
    )
    generate: bool = _option(True, "evaluate written answers, not the loss alone")
    allow_code_execution: bool = _option(
        False, "run the programs a model writes, to test them (HumanEval's pass@1)"
    )


@dataclass
class MethodOptions:
    """How the model is adapted."""

    method: Literal[METHODS] = _option(  # type: ignore[valid-type]
        "hyperadalora", '"adalora" is on the kernels of hal_kernels, "adalora-peft" PEFT\'s'
    )
    rank: int = _option(3, "average rank after allocation")
    init_rank: int | None = _option(None, "default: 1.5 times the rank")
    alpha: float = _option(8.0, "scaling is alpha / rank")
    dropout: float = _option(0.0, "on the adapter's input")
    gamma: float = _option(0.1, "weight of the orthogonality penalty")
    hypernet: Literal["bert", "mlp", "cnn"] | None = _option(
        None, "hyperadalora: the paper's hypernetworks in place of spectral steps"
    )
    update: Literal["spectral", "anchor", "replace", "residual"] | None = _option(
        None, "hyperadalora: spectral steps, or how hypernetworks' output becomes the factors"
    )
    interval: int | None = _option(
        None, "steps between two allocations (default: 100, fewer in a short run)"
    )
    tinit: int | None = _option(None, "adalora: steps before the first (default: a tenth)")
    tfinal: int | None = _option(None, "adalora: steps after the last (default: a third)")
    target_modules: list[str] | None = _option(  # noqa: RUF009
        None, "names or endings; default: every linear layer but the head"
    )
    head_learning_rate: float | None = _option(
        None, "of a new classifier; default: --learning_rate"
    )


@dataclass
class RunOptions(TrainingArguments):
    """Every option of transformers' TrainingArguments.

    Defaults: AdamW without weight decay, batches of 64, linear warm-up over a tenth of the steps,
    then cosine; the learning rate that suits the method.
    """

    output_dir: str | None = _option("finetune_out", "folder of the run")
    learning_rate: float | None = _option(None, "peak; default: what suits the method")  # type: ignore[assignment]
    per_device_train_batch_size: int = _option(64, "rows of a batch")
    per_device_eval_batch_size: int = _option(32, "rows of a batch")
    lr_scheduler_type: str = _option("cosine", "after the warm-up")
    warmup_steps: float = _option(0.1, "steps, or a share below 1")
    logging_steps: float = _option(10, "steps between two log lines")
    eval_strategy: str = _option("epoch", "when to evaluate the loss")
    save_strategy: str = _option("epoch", "when to write a checkpoint")
    save_total_limit: int | None = _option(2, "checkpoints kept")
    report_to: list[str] | None = _option(  # noqa: RUF009
        lambda: ["tensorboard"], "tensorboard, wandb, none, …"
    )
    dataloader_pin_memory: bool = _option(torch.cuda.is_available, "default: where there is a GPU")
    do_train: bool = _option(True, "train")
    do_eval: bool = _option(True, "evaluate")
    resume: bool = _option(False, "go on from the last checkpoint in output_dir")


_USAGE = "hal-finetune --model MODEL (--dataset NAME | --train-file FILE) [--method …] [options]"
Options = tuple[DataOptions, MethodOptions, RunOptions]
_GROUPS: Any = (DataOptions, MethodOptions, RunOptions)


def parse(argv: list[str]) -> Options:
    """Options from the command line and, beneath it, the file that ``--config`` names.

    Raises:
        OptionsError: what can't be read or can't be. SystemExit: argparse's own errors, ``--help``.
    """
    parser = HfArgumentParser(_GROUPS, prog="hal-finetune", usage=_USAGE, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file with options by name")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    before, _ = first.parse_known_args(argv)
    from_file = [] if before.config is None else arguments_of(Path(before.config))
    namespace = parser.parse_args([*from_file, *argv])
    values = vars(namespace)

    def made(kind: Any) -> Any:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.init})

    try:
        data, method, run = made(DataOptions), made(MethodOptions), made(RunOptions)
    except Exception as error:  # TrainingArguments', of any kind: what doesn't go together
        raise OptionsError(str(error)) from error
    _check(data, method, run)
    return data, method, run


def arguments_of(path: Path) -> list[str]:
    """A YAML or JSON file's options as command line arguments.

    Raises:
        OptionsError: the file can't be read, is no mapping, or has an unknown name.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionsError(f"--config {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise OptionsError(f"--config {path}: holds a {type(loaded).__name__}, expected a mapping")
    known = {f.name for kind in _GROUPS for f in fields(kind) if f.init}
    unknown = sorted(str(key) for key in loaded if str(key).replace("-", "_") not in known)
    if unknown:
        raise OptionsError(f"--config {path}: unknown options {unknown}")
    arguments: list[str] = []
    for key, value in loaded.items():
        if value is None:
            continue
        name = f"--{str(key).replace('-', '_')}"
        if isinstance(value, list):
            arguments += [name, *map(str, value)]
        elif isinstance(value, dict):
            arguments += [name, json.dumps(value)]
        else:
            arguments.append(f"{name}={value}")
    return arguments


def _check(data: DataOptions, method: MethodOptions, run: RunOptions) -> None:
    if data.model is None:
        raise OptionsError("--model is missing: a name on the hub, or a path")
    if (data.dataset is None) == (data.train_file is None):
        raise OptionsError("give one of --dataset and --train_file")
    if data.eval_dataset is not None and data.eval_file is not None:
        raise OptionsError("give one of --eval_dataset and --eval_file")
    counts = vars(data) | vars(run)
    for name in (
        "held_out", "max_train_samples", "max_eval_samples", "max_length", "max_new_tokens",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    ):  # fmt: skip
        if counts[name] is not None and counts[name] < 1:
            raise OptionsError(f"--{name} is {counts[name]}, expected at least 1")
        if counts[name] is not None and counts[name] >= 2**31:
            raise OptionsError(f"--{name} is {counts[name]}, expected less than 2**31")
    if not 0 <= run.seed < 2**32:
        raise OptionsError(f"--seed is {run.seed}, expected 0 to 2**32 - 1")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        chosen = getattr(run, name, None)
        unknown = sorted(set(chosen) - CHECKPOINTING) if isinstance(chosen, dict) else []
        if unknown:
            raise OptionsError(f"--{name} has {unknown}, expected some of {sorted(CHECKPOINTING)}")
        if method.method in ON_KERNELS and isinstance(chosen, dict) and chosen.get("use_reentrant"):
            raise OptionsError(
                f"--{name} chooses reentrant checkpointing, under which the adapter of --method "
                f'{method.method} can\'t train: expected {{"use_reentrant": false}}'
            )
    rates = {
        "learning_rate": run.learning_rate, "head_learning_rate": method.head_learning_rate,
        "num_train_epochs": run.num_train_epochs if run.max_steps <= 0 else None,
        "neftune_noise_alpha": run.neftune_noise_alpha,
    }  # fmt: skip
    for name, value in rates.items():
        if value is not None and not 0 < value < math.inf:
            raise OptionsError(f"--{name} is {value}, expected more than 0")
