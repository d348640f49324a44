"""Tables 1, 3 and 9: how good text is that each method's model writes after fine-tuning.

    python -m bench.quality --data FOLDER [--model PATH] [--task alpaca gsm8k] [--seed 0 1 2]

BLEU-4 and ROUGE-1 for every task, exact match for GSM8K, pass@1 for HumanEval, of greedy answers to
held-out prompts (hal_finetune.evaluators; prompts as in hal-finetune, the loss on answers alone).
Each method is fine-tuned with each seed at a learning rate of its own, that of bench.training_time
times each of --lr-scale; rank 3 (initially 5). "frozen" is the base model as it is.

The paper's models have 7B and 8B parameters: --model takes such a one, from the hub or a folder.
Without it, what is adapted is the tiny Llama of bench.training_time, which reads bytes: trained in
full on another task's text, it writes words and no answers, so that its scores compare the methods
on it and say nothing else.

FOLDER holds JSONL files (or .gz): those of bench.training_time, and for further tasks magpie,
open_platypus (a part is held out) and humaneval (which follows training on Alpaca's). pass@1 runs
what the model wrote, which --allow-code-execution permits, under limits that are no sandbox.

Each run appends a row as it is done, and is not run again if it has one. It writes none if it does
not start from the base model's loss, does not bring the loss down, or writes nothing.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from hal_finetune.prompts import HUMANEVAL

from . import training_time
from .common import append_row, data_file, parser, stored
from .convergence import WINDOW
from .models import Base
from .training_step import TOLERANCE, check_start, this_device
from .training_time import LR, TINY, expect_fall, text_loss, text_of, train, trained_base

METHODS = ("frozen", *LR)
# By task the files of its two sides; None: some rows are held out.
FILES: dict[str, tuple[str, str | None]] = {
    **{name: (task.train, task.held_out) for name, task in training_time.TASKS.items()},
    "magpie": ("magpie", None),
    "open-platypus": ("open_platypus", None),
    "humaneval": (training_time.TASKS["alpaca"].train, "humaneval"),
}
METRICS = {
    "bleu4": "BLEU-4", "rouge1": "ROUGE-1", "exact_match": "exact match", "pass_at_1": "pass@1"
}  # fmt: skip
PAD, END = 0, 4  # bytes that are in no text: NUL, and the end of a transmission


class Subject(NamedTuple):
    """What is fine-tuned."""

    model: nn.Module
    shape: Base
    tokenizer: Any


def byte_tokenizer() -> Any:
    """A token for each byte, with the byte as its number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = {PAD: "<|pad|>", END: "<|end|>"}
    vocabulary = {special.get(byte, text): byte for byte, text in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[PAD], eos_token=special[END],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny(arguments: argparse.Namespace, task: str, progress: Progress) -> Subject:
    """The Llama of bench.training_time, trained on another task's text."""
    texts = training_time.TASKS
    other = texts[texts.get(task, texts["alpaca"]).other]
    text = text_of(arguments.data, other.train, other.text)
    model: Any = trained_base(text, arguments.base_steps, progress, arguments.length)
    model.config.pad_token_id = model.generation_config.pad_token_id = PAD
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    model.generation_config.use_cache = True
    return Subject(model, TINY, byte_tokenizer())


def pretrained(source: str) -> Subject:
    """A causal language model of the hub or a folder, in the precision it was saved in."""
    from hal_finetune.model import load_base, load_tokenizer

    model = load_base(source, None, dtype="auto", seed=0)
    shape = Base(Path(source).name, lambda: None, "all-linear", head="", dtype=model.dtype)
    return Subject(model.to(this_device()).train(), shape, load_tokenizer(source))


def load(arguments: argparse.Namespace, task: str) -> Any:
    """Both sides of a task: hal_finetune.data.Task, with --held-out rows on the second."""
    from hal_finetune import data
    from hal_finetune.options import DataOptions

    train_name, held_out = FILES[task]
    options = DataOptions(
        train_file=str(data_file(arguments.data, train_name)),
        eval_file=held_out and str(data_file(arguments.data, held_out)),
        held_out=arguments.held_out, max_eval_samples=arguments.held_out,
    )  # fmt: skip
    return data.load(options, seed=0)


def batches(
    subject: Subject, task: Any, arguments: argparse.Namespace, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts with their answers, of which alone there are labels."""
    from transformers import DataCollatorForSeq2Seq

    from examples.demo.task import training_batches
    from hal_finetune.data import encode
    from hal_finetune.options import OptionsError

    pad = DataCollatorForSeq2Seq(subject.tokenizer)
    try:
        rows = encode(subject.tokenizer, task.train, arguments.length)
    except OptionsError as error:  # in the words of hal-finetune's options
        raise SystemExit(f"--length: {error}") from error
    made = training_batches(
        subject.tokenizer, rows, arguments.batch, arguments.steps, seed, lambda _, own: pad(own)
    )
    for batch in made:
        yield {name: batch[name].to(this_device()) for name in batch}


def scores(
    model: Any, subject: Subject, task: Any, arguments: argparse.Namespace
) -> dict[str, float]:
    """The metrics of what a model writes.

    Raises:
        SystemExit: it writes nothing.
    """
    from hal_finetune.evaluators import judge, write_answers

    answers = write_answers(
        model, subject.tokenizer, task.held_out, batch_size=64, max_length=arguments.length,
        max_new_tokens=arguments.new_tokens,
    )  # fmt: skip
    if not any(answers):
        raise SystemExit(f"all of {len(answers)} answers are empty")
    return judge(
        task.form, answers, task.held_out, allow_code_execution=arguments.allow_code_execution
    )


def run(
    key: dict[str, Any],
    subject: Subject,
    task: Any,
    arguments: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """One method's losses, first and last (means of WINDOW steps), and its scores."""
    method, seed = key["method"], key["seed"]
    if method == "frozen":
        return {"scores": scores(subject.model, subject, task, arguments)}
    with torch.no_grad():
        rows = next(batches(subject, task, arguments, seed))
        start = text_loss(subject.model(**rows).logits, rows["labels"])
    methods, curves = train(
        subject.model, subject.shape, batches(subject, task, arguments, seed),
        {method: key["lr"]}, arguments.steps, seed, progress,
    )  # fmt: skip
    expect_fall(curves)
    losses = curves[method]["losses"]
    check_start({"the base model": start, method: losses[0]}, TOLERANCE[subject.shape.dtype])
    return {
        "first_loss": statistics.fmean(losses[:WINDOW]),
        "last_loss": statistics.fmean(losses[-WINDOW:]),
        "scores": scores(methods[method].model, subject, task, arguments),
    }


def best(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By method its rows, one a seed, at the learning rate with the lowest last loss."""
    found: dict[str, dict[float | None, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["lr"], []).append(row)

    def last(own: list[dict[str, Any]]) -> float:
        return statistics.fmean(row.get("last_loss", 0.0) for row in own)

    return {method: min(by_lr.values(), key=last) for method, by_lr in found.items()}


def summary(
    runs: dict[str, list[dict[str, Any]]], show: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table; `show` says several seeds' values in one cell."""
    metrics = [
        m for m in METRICS if any(m in row["scores"] for own in runs.values() for row in own)
    ]
    body = []
    for method, own in runs.items():
        line = [method, f"{own[0]['lr']:g}" if own[0]["lr"] else "–", str(len(own))]
        line.append(show([row["last_loss"] for row in own]) if "last_loss" in own[0] else "–")
        body.append([*line, *(show([row["scores"][m] for row in own]) for m in metrics)])
    return ["method", "lr", "seeds", "last loss", *(METRICS[m] for m in metrics)], body


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the JSONL files")
    options.add_argument("--model", default="", help="default: a tiny Llama that is trained first")
    options.add_argument("--task", nargs="+", choices=FILES, default=list(training_time.TASKS))
    options.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--base-steps", type=int, default=300, help="of the tiny Llama")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=384, help="tokens of prompt and answer")
    options.add_argument("--new-tokens", type=int, default=128, help="of a written answer")
    options.add_argument("--held-out", type=int, default=48, help="prompts that are answered")
    options.add_argument("--lr-scale", type=float, nargs="+", default=[1.0])
    options.add_argument(
        "--allow-code-execution", action="store_true", help="run the programs that a model writes"
    )
    arguments = options.parse_args()
    if arguments.quick:
        arguments.task, arguments.seed, arguments.lr_scale = arguments.task[:1], [0], [1.0]
        arguments.method = ["adalora", "hal-hyper"]
        arguments.steps, arguments.base_steps = WINDOW + 5, 60
        arguments.batch, arguments.held_out, arguments.new_tokens = 4, 8, 32
    if HUMANEVAL in arguments.task and not arguments.allow_code_execution:
        raise SystemExit(f"--task {HUMANEVAL} runs what a model writes: --allow-code-execution")
    console = Console()
    for name in arguments.task:
        rows = measured(arguments, name, console)
        head, body = summary(best(rows), lambda values: f"{statistics.fmean(values):.4g}")
        view = Table(*head, title=f"{name}, {rows[0]['model']}, {arguments.steps} steps")
        for line in body:
            view.add_row(*line)
        console.print(view)
    return 0


def measured(arguments: argparse.Namespace, name: str, console: Console) -> list[dict[str, Any]]:
    """The rows of one task, those that are missing measured first."""
    common = {
        "task": name, "model": Path(arguments.model).name or TINY.name, "steps": arguments.steps,
        "base_steps": None if arguments.model else arguments.base_steps,
        "batch": arguments.batch, "length": arguments.length,
        "new_tokens": arguments.new_tokens, "held_out": arguments.held_out,
    }  # fmt: skip
    keys = [
        common | {"method": method, "lr": scale * LR[method], "seed": seed}
        for seed, method, scale in itertools.product(
            arguments.seed, arguments.method, arguments.lr_scale
        )
        if method != "frozen"
    ]
    if "frozen" in arguments.method:  # nothing is drawn
        keys.insert(0, common | {"method": "frozen", "lr": None, "seed": None})
    rows, subject = [], None
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(name, total=len(keys))
        for key in keys:
            found = stored("quality", arguments.out, key)
            if not found:
                if subject is None:
                    task = load(arguments, name)
                    subject = (
                        pretrained(arguments.model)
                        if arguments.model
                        else tiny(arguments, name, progress)
                    )
                found = [key | run(key, subject, task, arguments, progress)]
                if not arguments.no_save:
                    append_row("quality", found[0], arguments.out)
            rows.append(found[-1])
            progress.advance(bar)
    return rows


if __name__ == "__main__":
    sys.exit(main())
