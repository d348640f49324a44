"""Tables 2, 4, 6 and 10: seconds to a given loss and for a number of steps, on generated text.

    python -m bench.training_time --data FOLDER [--task gsm8k alpaca] [--steps 400] [--seed 0 1 2]

The paper trains 7B and 8B models. Here a Llama of four blocks and width 128, which reads bytes, is
first trained in full on the other task's text, so that there is something to adapt, and then
fine-tuned by each method: PEFT's LoRA and DoRA, a DyLoRA on PEFT's LoRA, these three with
hypernetworks (bench.hyper_peft: "hyper-lora", …), PEFT's AdaLoRA, and this library without and with
hypernetworks ("hal-direct", "hal-hyper"). They take steps in turn on the same batches; rank 3
(initially 5).

Each method has a learning rate of its own (LR), times each of --lr-scale; results are read at the
best one. Only the text's loss counts, without a penalty, and only a step's own seconds. A row holds
all curves and the loss on held-out text; it is not written if the methods do not start from one
loss, or one ends above it. The target is by default what AdaLoRA's worst run ends at.
"""

import dataclasses
import gzip
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from .common import append_row, data_file, parser
from .convergence import WINDOW, reached
from .methods import INIT_RANK, Method
from .models import DECODER, Base
from .training_step import TOLERANCE, check_start, this_device

LR = {  # README: start with these
    "lora": 3e-3, "hyper-lora": 2e-4, "dora": 3e-3, "hyper-dora": 2e-4,
    "dylora": 3e-3, "hyper-dylora": 1e-4, "adalora": 1e-2, "hal-direct": 1e-2, "hal-hyper": 3e-4,
}  # fmt: skip
METHODS = tuple(LR)
LENGTH, BATCH, BASE_LR = 128, 16, 2e-3
HELD_OUT_BATCHES = 8
TINY = Base("tiny-llama", lambda: None, DECODER, head="")


@dataclasses.dataclass(frozen=True)
class Task:
    train: str
    held_out: str
    text: Callable[[dict[str, Any]], str]
    other: str  # the task whose text the base is trained on


TASKS = {
    "gsm8k": Task(
        "gsm8k_train", "gsm8k_test",
        lambda row: f"Question: {row['question']}\nAnswer: {row['answer']}\n\n", "alpaca",
    ),
    "alpaca": Task(
        "alpaca_8k", "alpaca_heldout",
        lambda row: f"{row['instruction']}\n{row['input']}\n{row['output']}\n\n", "gsm8k",
    ),
}  # fmt: skip


def text_of(folder: Path, name: str, text: Callable[[dict[str, Any]], str]) -> torch.Tensor:
    """All of a file's texts as one sequence of bytes [n], int64."""
    path = data_file(folder, name)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # By line feeds alone: str.splitlines would also split at separators inside a text.
    rows = (json.loads(line) for line in content.split(b"\n") if line.strip())
    joined = bytearray("".join(map(text, rows)).encode())
    return torch.frombuffer(joined, dtype=torch.uint8).long()


def batches(
    text: torch.Tensor, steps: int, seed: int, length: int = LENGTH
) -> Iterator[dict[str, torch.Tensor]]:
    """Windows of the text at random places: [rows, length], of BATCH · LENGTH bytes together."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = BATCH * LENGTH // length
        starts = torch.randint(len(text) - length, (rows, 1), generator=generator)
        ids = text[starts + torch.arange(length)].to(this_device())
        yield {"input_ids": ids, "labels": ids}


def text_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean negative log-likelihood of the next byte, in nats; labels of -100 do not count."""
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))


def trained_base(
    text: torch.Tensor, steps: int, progress: Progress, length: int = LENGTH
) -> nn.Module:
    """A tiny Llama, trained in full on windows of `length` bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length,
        use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(this_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_LR, total_steps=steps + 1)
    task = progress.add_task("the base model", total=steps)
    for rows in batches(text, steps, 0, length):
        model(**rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(task)
    progress.remove_task(task)
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, text: torch.Tensor) -> float:
    model.eval()
    found = [
        text_loss(model(input_ids=rows["input_ids"]).logits, rows["input_ids"])
        for rows in batches(text, HELD_OUT_BATCHES, seed=0)
    ]
    return statistics.fmean(found)


def train(
    base: nn.Module,
    shape: Base,
    data: Iterable[dict[str, torch.Tensor]],
    rates: dict[str, float],
    steps: int,
    seed: int,
    progress: Progress,
    *,
    init_rank: int = INIT_RANK,
    after: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> tuple[dict[str, Method], dict[str, dict[str, Any]]]:
    """Fine-tune one causal language model by all methods, in turn; them and their curves by name.

    Args:
        shape: which layers of `base` are adapted.
        data: `steps` batches, with labels.
        rates: learning rate by method.
        after: called with the number of steps taken and the model, after each of a method's.

    Raises:
        SystemExit: they start from different losses.
    """
    from transformers import get_cosine_schedule_with_warmup

    methods = {}
    for name, lr in rates.items():
        torch.manual_seed(seed)
        methods[name] = Method(
            name, base, shape, this_device(), lr=lr, interval=max(1, steps // 20),
            total_step=steps, tfinal=steps // 3, init_rank=init_rank, seed=seed,
        )  # fmt: skip
    schedules = [
        get_cosine_schedule_with_warmup(m.optimizer, steps // 10, steps) for m in methods.values()
    ]
    curves: dict[str, dict[str, Any]] = {
        name: {"lr": lr, "losses": [], "seconds": []} for name, lr in rates.items()
    }
    task = progress.add_task(f"{', '.join(rates)}, seed {seed}", total=steps)
    for step, rows in enumerate(data):
        for name, method in methods.items():
            seconds = method.step(rows)["step"]
            curves[name]["seconds"].append(round(seconds, 5))
            curves[name]["losses"].append(round(text_loss(method.logits, rows["labels"]), 5))
            after(step + 1, method.model)
        if step == 0:
            check_start({n: c["losses"][0] for n, c in curves.items()}, TOLERANCE[shape.dtype])
        for schedule in schedules:
            schedule.step()
        progress.advance(task)
    progress.remove_task(task)
    return methods, curves


def expect_fall(curves: dict[str, dict[str, Any]]) -> None:
    """Means of the first and last steps, since batches differ.

    Raises:
        SystemExit: a method's loss has not fallen.
    """
    for name, run in curves.items():
        first, last = (
            statistics.fmean(part) for part in (run["losses"][:WINDOW], run["losses"][-WINDOW:])
        )
        if not last < first:
            raise SystemExit(f"{name} at {run['lr']:g}: the mean loss goes from {first} to {last}")


def run(
    base: nn.Module,
    text: torch.Tensor,
    held_out: torch.Tensor,
    rates: dict[str, float],
    steps: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """All methods, in turn, from one base; by method its curves."""
    methods, curves = train(
        base, TINY, batches(text, steps, seed + 1), rates, steps, seed, progress
    )
    expect_fall(curves)
    for name, method in methods.items():
        curves[name]["held_out"] = held_out_loss(method.model, held_out)
    return curves


def outcome(runs: list[dict[str, Any]], target: float) -> dict[str, float | None]:
    """One method's runs at one rate, over seeds: seconds to the target (if all reach it), in all,
    and final losses."""
    found = [(reached(run["losses"], target), run["seconds"]) for run in runs]
    return {
        "to_target": None
        if any(step is None for step, _ in found)
        else statistics.fmean(sum(seconds[:step]) for step, seconds in found),
        "in_all": statistics.fmean(sum(seconds) for _, seconds in found),
        "final": statistics.fmean(statistics.fmean(r["losses"][-WINDOW:]) for r in runs),
        "held_out": statistics.fmean(run["held_out"] for run in runs),
    }


def best(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By method its runs, one a seed, at the learning rate with the lowest final loss."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        for name, curves in row["methods"].items():
            found.setdefault(name, {}).setdefault(curves["lr"], []).append(curves)
    return {
        name: min(by_lr.values(), key=lambda runs: outcome(runs, 0.0)["final"] or 0.0)
        for name, by_lr in found.items()
    }


def default_target(runs: dict[str, list[dict[str, Any]]]) -> float:
    """Where AdaLoRA's worst run ends, so that all of its runs get there.

    The first method's where AdaLoRA was not run.
    """
    chosen = runs.get("adalora") or next(iter(runs.values()))
    return max(statistics.fmean(run["losses"][-WINDOW:]) for run in chosen)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the JSONL files")
    options.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--base-steps", type=int, default=1000)
    options.add_argument("--lr-scale", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    options.add_argument("--target", type=float, help="loss, default: see above")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.task, arguments.seed, arguments.lr_scale = arguments.task[:1], [0], [1.0]
        arguments.steps, arguments.base_steps = WINDOW + 5, 10
    console = Console()
    for name in arguments.task:
        task, rows = TASKS[name], []
        other = TASKS[task.other]
        with Progress(console=console, transient=True) as progress:
            base = trained_base(
                text_of(arguments.data, other.train, other.text), arguments.base_steps, progress
            )
            text = text_of(arguments.data, task.train, task.text)
            held_out = text_of(arguments.data, task.held_out, task.text)
            for seed, scale in itertools.product(arguments.seed, arguments.lr_scale):
                rates = {method: scale * LR[method] for method in arguments.method}
                found = run(base, text, held_out, rates, arguments.steps, seed, progress)
                row = {
                    "task": name, "seed": seed, "steps": arguments.steps,
                    "base_steps": arguments.base_steps, "lr_scale": scale, "methods": found,
                }  # fmt: skip
                rows.append(row)
                if not arguments.no_save:
                    append_row("training_time", row, arguments.out)
        runs = best(rows)
        target = arguments.target or default_target(runs)
        view = Table(title=f"{name}, {arguments.steps} steps; target: a mean loss of {target:.3f}")
        for column in ("method", "lr", "s to target", "s in all", "final loss", "held out"):
            view.add_column(column, justify="left" if column == "method" else "right")
        for method, own in runs.items():
            result = outcome(own, target)
            cells = ("–" if value is None else f"{value:.4g}" for value in result.values())
            view.add_row(method, f"{own[0]['lr']:g}", *cells)
        console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
