"""Options of ``hal-finetune``: dataclasses, a config file, and the command line."""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
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

    _argument_group_name = "model and data"

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
    generate: bool = _option(True, "evaluate by the loss alone, without written answers")
    allow_code_execution: bool = _option(
        False, "run the programs a model writes, to test them (HumanEval's pass@1)"
    )


@dataclass
class MethodOptions:
    """How the model is adapted."""

    _argument_group_name = "adapter"

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
        None, "of a new classifier; default: --learning-rate"
    )


@dataclass
class RunOptions(TrainingArguments):
    """Every option of transformers' TrainingArguments.

    Defaults: AdamW without weight decay, batches of 64, linear warm-up over a tenth of the steps,
    then cosine; the learning rate that suits the method. What stands here is in ``--help``.
    """

    _argument_group_name = "training"

    output_dir: str | None = _option("finetune_out", "folder of the run")
    resume: bool = _option(False, "go on from the last checkpoint in the folder of the run")
    recipe: Literal["paper"] | None = _option(
        None, "paper: bert hypernetworks, learning rate 1e-5, 500 steps of warm-up"
    )
    learning_rate: float | None = _option(None, "peak; default: what suits method and data")  # type: ignore[assignment]
    num_train_epochs: float = _option(3.0, "passes over the rows")
    max_steps: int = _option(-1, "optimizer steps, if above 0: instead of epochs")
    per_device_train_batch_size: int = _option(64, "rows of a batch")
    gradient_accumulation_steps: int = _option(1, "batches of an optimizer step")
    per_device_eval_batch_size: int = _option(32, "rows of a batch")
    warmup_steps: float = _option(0.1, "steps, or a share below 1")
    lr_scheduler_type: str = _option("cosine", "after the warm-up")
    bf16: bool = _option(False, "compute in bfloat16")
    seed: int = _option(42, "of weights, order and dropout")
    logging_steps: float = _option(10, "steps between two log lines")
    eval_strategy: str = _option("epoch", "when to evaluate: no, steps, epoch")
    save_strategy: str = _option("epoch", "when to write a checkpoint: no, steps, epoch, best")
    save_total_limit: int | None = _option(2, "checkpoints kept")
    report_to: list[str] | None = _option(  # noqa: RUF009
        lambda: ["tensorboard"], "tensorboard, wandb, trackio, none, …"
    )
    do_train: bool = _option(True, "evaluate, and leave the model as it is")
    do_eval: bool = _option(True, "train, and don't evaluate in the end")
    dataloader_pin_memory: bool = _option(torch.cuda.is_available, "default: with a GPU")


PAPER = ["--hypernet=bert", "--learning-rate=1e-5", "--warmup-steps=500"]
"""The paper's recipe [4.1.4, App. E], where it differs from the defaults."""

_USAGE = "hal-finetune --model MODEL (--dataset NAME | --train-file FILE) [--method …] [options]"
Options = tuple[DataOptions, MethodOptions, RunOptions]
_GROUPS: Any = (DataOptions, MethodOptions, RunOptions)


def parse(argv: list[str]) -> Options:
    """Options from the command line and, beneath it, the file that ``--config`` names.

    Raises:
        OptionsError: what can't be read or can't be. SystemExit: argparse's own errors, ``--help``.
    """
    parser = _parser(shows_all="--help-all" in argv)
    config = parser.parse_known_args(argv)[0].config
    beneath = [] if config is None else arguments_of(Path(config))
    if parser.parse_known_args([*beneath, *argv])[0].recipe == "paper":
        beneath = [*PAPER, *beneath]
    try:
        made: Any = parser.parse_args_into_dataclasses(
            [*beneath, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # TrainingArguments', of any kind: what doesn't go together
        raise OptionsError(str(error)) from error
    data, method, run, _, unknown = made
    if unknown:
        named = [word for word in unknown if word.startswith("-")]
        parser.error(f"unknown options: {_unknown(named or unknown)}")
    _check(data, method, run)
    return data, method, run


def _parser(*, shows_all: bool) -> HfArgumentParser:
    parser = HfArgumentParser(
        _GROUPS, prog="hal-finetune", usage=_USAGE, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--help-all", action="help", help="with every option of transformers")
    parser.add_argument("--config", help="YAML or JSON file with options by name")
    shown = {name for kind in _GROUPS for name in kind.__annotations__}
    shown |= {"help", "help_all", "config", "activation_checkpointing"}
    for action in parser._actions:
        # Of what is on by default only the switch that turns it off is of use.
        if action.default is True or not (shows_all or action.dest in shown):
            action.help = argparse.SUPPRESS
    return parser


class _Help(argparse.HelpFormatter):
    """One spelling of each option, with its default where that says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1]  # with hyphens
        if action.nargs in (0, "?"):
            return name
        metavar = {int: "N", float: "X"}.get(action.type, action.dest.split("_")[-1].upper())  # type: ignore[call-overload]
        return f"{name} {self._format_args(action, metavar)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        words, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or "default" in words:
            return words
        return f"{words} (default: {' '.join(default) if isinstance(default, list) else default})"


def _unknown(names: Iterable[str]) -> str:
    """Names of options that there are not, with what may have been meant."""
    known = [f.name.replace("_", "-") for kind in _GROUPS for f in fields(kind) if f.init]
    words = []
    for name in names:
        bare = name.partition("=")[0].lstrip("-").replace("_", "-")
        near = get_close_matches(bare, known, 1)
        words.append(name + (f" (did you mean --{near[0]}?)" if near else ""))
    return ", ".join(words)


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
        raise OptionsError(f"--config {path}: unknown options: {_unknown(unknown)}")
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
        raise OptionsError("give one of --dataset and --train-file")
    if data.eval_dataset is not None and data.eval_file is not None:
        raise OptionsError("give one of --eval-dataset and --eval-file")
    counts = vars(data) | vars(run)
    for name in (
        "held-out", "max-train-samples", "max-eval-samples", "max-length", "max-new-tokens",
        "per-device-train-batch-size", "per-device-eval-batch-size", "gradient-accumulation-steps",
    ):  # fmt: skip
        count = counts[name.replace("-", "_")]
        if count is not None and count < 1:
            raise OptionsError(f"--{name} is {count}, expected at least 1")
        if count is not None and count >= 2**31:
            raise OptionsError(f"--{name} is {count}, expected less than 2**31")
    if not 0 <= run.seed < 2**32:
        raise OptionsError(f"--seed is {run.seed}, expected 0 to 2**32 - 1")
    chosen = getattr(run, "activation_checkpointing_kwargs", None)
    if isinstance(chosen, dict):
        name = "--activation-checkpointing-kwargs"
        unknown = sorted(set(chosen) - CHECKPOINTING)
        if unknown:
            raise OptionsError(f"{name} has {unknown}, expected some of {sorted(CHECKPOINTING)}")
        if method.method in ON_KERNELS and chosen.get("use_reentrant"):
            raise OptionsError(
                f"{name} chooses reentrant checkpointing, under which the adapter of --method "
                f'{method.method} can\'t train: expected {{"use_reentrant": false}}'
            )
    rates = {
        "learning-rate": run.learning_rate, "head-learning-rate": method.head_learning_rate,
        "num-train-epochs": run.num_train_epochs if run.max_steps <= 0 else None,
        "neftune-noise-alpha": run.neftune_noise_alpha,
    }  # fmt: skip
    for name, value in rates.items():
        if value is not None and not 0 < value < math.inf:
            raise OptionsError(f"--{name} is {value}, expected more than 0")
