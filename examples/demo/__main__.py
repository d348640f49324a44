"""Fine-tune one model with HyperAdaLoRA and with PEFT's AdaLoRA, side by side.

A pretrained MiniLM learns to tell which part of the Python standard library a docstring or comment
comes from. Both methods train on the same batches, step by step in turn. Then the demo prints what
each came to, plots loss and ranks, saves the HyperAdaLoRA adapter, and checks that it loads onto a
fresh model with equal outputs, both here and, exported, as a plain LoRA adapter in PEFT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

import hal_kernels
from hal_finetune.data import Task, encode, load
from hal_finetune.model import adapt, load_base, load_tokenizer, ranks
from hal_finetune.options import DataOptions, MethodOptions, OptionsError
from hal_finetune.plots import plot_losses, plot_ranks
from hal_finetune.report import LABELS
from hal_kernels.integration import saved_module_names

from . import stdlib_corpus
from .task import accuracy, collate, packaged_model, running_mean, training_batches

METHODS = ("hyperadalora", "adalora-peft")
WINDOW = 10  # steps of a mean of the loss
TOLERANCE = 1e-4  # LoRA sums in another order


@dataclasses.dataclass
class Contender:
    """One method in training: its model, how it steps, and what was seen."""

    method: str
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    milliseconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, batch: dict[str, torch.Tensor], number: int) -> None:
        """One timed training step (counted from 1); the loss kept is without the penalty."""
        self.model.train()
        start = time.perf_counter()
        output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()  # hal_kernels notices it; PEFT's AdaLoRA has to be told
        if self.method == "adalora-peft":
            self.model.base_model.update_and_allocate(number)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.losses.append(float(cross_entropy(output.logits.detach(), batch["labels"])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.train_file is None) != (options.dev_file is None):
        parser.error("--train-file and --dev-file go together")
    if options.quick:
        options.steps, options.dev_rows = 20, 128
    try:
        return _run(options)
    except OptionsError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--model", help="name or path; default: the MiniLM packaged on PyPI")
    parser.add_argument("--train-file", help="JSONL (or .gz) instead of the library's text")
    parser.add_argument("--dev-file", help="held-out JSONL (or .gz)")
    parser.add_argument("--steps", type=_positive, default=160, help="default: 160")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--max-length", type=_positive, default=48, help="tokens a text is cut to")
    parser.add_argument("--rank", type=_positive, default=3, help="average rank after allocation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="of HyperAdaLoRA")
    parser.add_argument("--lr-adalora", type=float, default=1e-2, help="of AdaLoRA's factors")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="of both classifiers")
    parser.add_argument("--dev-rows", type=_positive, default=1000, help="held-out texts at most")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="20 steps, 128 held-out texts")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def load_task(options: argparse.Namespace) -> Task:
    """The files given, or the standard library's text; a held-out side of a limited size.

    Raises:
        OptionsError: files that can't be read, or are not labelled; no library text.
    """
    if options.train_file is None:
        task = stdlib_corpus.load(options.seed)
    else:
        files = DataOptions(train_file=options.train_file, eval_file=options.dev_file)
        task = load(files, options.seed)
    if task.label_names is None:
        raise OptionsError(f"{task.name}: the rows have no label")
    count = min(options.dev_rows, len(task.held_out))
    chosen = random.Random(options.seed).sample(list(task.held_out), count)
    return dataclasses.replace(task, held_out=chosen)


def build(method: str, options: argparse.Namespace, label_names: list[str]) -> Contender:
    """A contender ready to train. Both adapt the same layers, start from the same classifier, use
    the same scaling, and reach the same rank budget after two thirds of the steps."""
    base = load_base(options.model, label_names, dtype="float32", seed=options.seed)
    base.config.pad_token_id = load_tokenizer(options.model).pad_token_id
    heads = saved_module_names(base, hal_kernels.HALConfig())
    model = adapt(
        base,
        MethodOptions(method=method, rank=options.rank),
        classifies=True,
        total_steps=options.steps,
        seed=options.seed,
    )
    inside: list[Any] = []
    outside: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_head = any(f".{head}." in f".{name}" for head in heads)
            (inside if in_head else outside).append(parameter)
    rate = options.lr if method == "hyperadalora" else options.lr_adalora
    optimizer = torch.optim.AdamW(
        [{"params": outside, "lr": rate}, {"params": inside, "lr": options.head_lr}],
        weight_decay=0.0,
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    return Contender(method, model, optimizer, scheduler)


def _run(options: argparse.Namespace) -> int:
    """The whole demo: train, report, save, check."""
    logging.set_verbosity_error()  # a classifier is new, as it should be
    logging.disable_progress_bar()
    # Of names that PEFT uses and transformers has changed: nothing to act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    options.model = options.model or packaged_model()
    console, task = Console(highlight=False), load_task(options)
    assert task.label_names is not None
    console.print(
        f"{task.name}: {len(task.train)} training and {len(task.held_out)} held-out texts, "
        f"{len(task.label_names)} classes ({', '.join(task.label_names)})"
    )
    tokenizer = load_tokenizer(options.model)
    contenders = [build(method, options, task.label_names) for method in METHODS]
    train, dev = (encode(tokenizer, s, options.max_length) for s in (task.train, task.held_out))
    before = [accuracy(c.model, tokenizer, dev) for c in contenders]
    batches = training_batches(tokenizer, train, options.batch_size, options.steps, options.seed)
    progress = track(batches, "training", total=options.steps, console=console)
    for number, batch in enumerate(progress, start=1):
        # Who goes first alternates; the seed makes the base model's dropout equal for both.
        for contender in contenders if number % 2 else contenders[::-1]:
            torch.manual_seed(options.seed + number)
            contender.step(batch, number)
    after = [accuracy(c.model, tokenizer, dev) for c in contenders]
    results = [figures(*one) for one in zip(contenders, before, after, strict=True)]
    add_what_it_took(results)
    console.print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    write(results, options.out)
    inputs = collate(tokenizer, dev[:32])
    del inputs["labels"]
    met = True
    for words, holds in check(contenders[0].model, inputs, options, task.label_names):
        console.print(f"{'ok  ' if holds else 'FAIL'} {words}")
        met = met and holds
    files = sorted(path.name for path in options.out.iterdir())
    console.print(f"written to {options.out}: {', '.join(files)}")
    return 0 if met else 1


def figures(contender: Contender, before: float, after: float) -> dict[str, Any]:
    """What one method's run came to."""
    losses, model = contender.losses, contender.model
    half = (len(losses) + 1) // 2
    ranks_before, ranks_after = ranks(model, contender.method)
    return {
        "method": LABELS[contender.method],
        "loss_half": statistics.fmean(losses[:half][-WINDOW:]),
        "loss_end": statistics.fmean(losses[-WINDOW:]),
        "milliseconds": contender.milliseconds,
        "state_bytes": state_bytes(contender),
        "accuracy_before": before,
        "accuracy_after": after,
        "step_ms": statistics.median(contender.milliseconds),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "ranks_before": ranks_before,
        "ranks_after": ranks_after,
        "losses": losses,
    }


def state_bytes(contender: Contender) -> int:
    """Of the adapter's parameters and the optimizer's moments of them, without the classifier."""
    held = list(contender.optimizer.param_groups[0]["params"])
    moments = [t for p in held for t in contender.optimizer.state.get(p, {}).values()]
    tensors = [*held, *(t for t in moments if isinstance(t, torch.Tensor))]
    if hasattr(contender.model, "hal"):
        tensors += [t for n, t in contender.model.hal.named_buffers() if n.startswith("momentum_")]
    return sum(t.numel() * t.element_size() for t in tensors)


def add_what_it_took(results: Sequence[dict[str, Any]]) -> None:
    """Steps and seconds of each method to the mean loss that AdaLoRA has at half of its steps."""
    target = results[-1]["loss_half"]
    for result in results:
        means = enumerate(running_mean(result["losses"], WINDOW), start=1)
        steps = next((n for n, mean in means if n >= WINDOW and mean <= target), None)
        result["steps_to_target"] = steps
        result["seconds_to_target"] = steps and sum(result["milliseconds"][:steps]) / 1e3


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The figures, a column a method."""
    made = Table("", title="both methods in turn, step by step")
    for result in results:
        made.add_column(result["method"], justify="right")
    target = results[-1]["loss_half"]
    rows = {
        f"steps to a loss of {target:.2f}, AdaLoRA's at half": "{steps_to_target}",
        "seconds to it": "{seconds_to_target:.1f}",
        "time a step, median (ms)": "{step_ms:.0f}",
        "training loss at the end, without penalty": "{loss_end:.3f}",
        "held-out accuracy before": "{accuracy_before:.1%}",
        "held-out accuracy after": "{accuracy_after:.1%}",
        "KiB of the adapter and its optimizer state": "{kib:,.0f}",
    }
    shown = [
        result
        | {"kib": result["state_bytes"] / 2**10}
        | {"seconds_to_target": result["seconds_to_target"] or math.nan}
        for result in results
    ]
    for name, text in rows.items():
        made.add_row(name, *(text.format(**result) for result in shown))
    for when in ("before", "after"):
        kept = [list(result[f"ranks_{when}"].values()) for result in results]
        cells = [f"{sum(own)} ({min(own)}–{max(own)})" for own in kept]
        made.add_row(f"ranks {when}, total (least–most in a layer)", *cells)
    return made


def write(results: Sequence[dict[str, Any]], out: Path) -> None:
    """metrics.json, loss.png, and ranks-….png of each method."""
    (out / "metrics.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    means = {r["method"]: running_mean(r["losses"], WINDOW) for r in results}
    plot_losses(means, out / "loss.png", every=1, mean_of=WINDOW)
    for name, result in zip(METHODS, results, strict=True):
        path = out / f"ranks-{name}.png"
        plot_ranks(result["method"], result["ranks_before"], result["ranks_after"], path)


@torch.no_grad()
def check(
    model: Any, inputs: dict[str, torch.Tensor], options: argparse.Namespace, names: list[str]
) -> list[tuple[str, bool]]:
    """Save the trained adapter and its LoRA export, and load both onto the base model.

    Returns:
        Each check's outcome in words, and whether it is met.
    """
    logits, out = model.eval()(**inputs).logits, options.out
    hal_kernels.save_adapter(model, out / "adapter")
    hal_kernels.export_lora(model, out / "lora")
    # Another classifier than the trained one began as: it must come out of the files.
    fresh = [
        load_base(options.model, names, dtype="float32", seed=options.seed + 1) for _ in range(2)
    ]
    loaded = hal_kernels.load_adapter(fresh[0], out / "adapter").eval()(**inputs).logits
    exported = PeftModel.from_pretrained(fresh[1], str(out / "lora")).eval()(**inputs).logits
    return compared(logits, loaded, exported)


def compared(
    logits: torch.Tensor, loaded: torch.Tensor, exported: torch.Tensor
) -> list[tuple[str, bool]]:
    """What `check` says of logits before saving, of the loaded adapter, and of its LoRA export."""
    count, equal = f"{len(logits)} held-out inputs", torch.equal(loaded, logits)
    off, distance = (float((other - logits).abs().max()) for other in (loaded, exported))
    words = "equal bit for bit" if equal else f"differ by {off:.1e}"
    return [
        (f"load_adapter onto a fresh model: logits of {count} {words}", equal),
        (
            f"export_lora loaded by PEFT: logits of {count} differ by at most {distance:.1e} "
            f"(allowed {TOLERANCE:.0e})",
            distance <= TOLERANCE,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
