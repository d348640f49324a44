"""Convergence: training loss against steps and seconds, methods over a grid of learning rates.

    python -m bench.convergence --data FOLDER --task sst2 [--method spectral adalora]
                                [--lr 5e-4 1e-3] [--seed 0 1 2] [--steps 160] [--target 0.5]
                                [--warmup 0] [--beta2 0.95]

FOLDER holds ``<task>_train.jsonl`` and ``<task>_dev.jsonl`` (or .gz). The task "stdlib", the
families of the standard library's modules told by their docstrings, needs none; "gsm8k" tells from
a question how many calculations its answer takes, of ``gsm8k_train`` and ``_test``. Batches, head,
warm-up and schedule are the same for all methods; r = 3 and nothing is pruned, unless --rank and
--init-rank say otherwise. Each run appends a row with its whole loss curve; a run that has a row is
not run again, so the command can be stopped and repeated. At the end: for each method the mean
number of steps and seconds until the running mean of the loss (over 20 steps) is below the target.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hal_kernels

from .common import append_row, data_file, parser, stored
from .widened import widened

WINDOW = 20  # steps of the running mean
ALPHA, GAMMA, HEAD_LR, BATCH = 8.0, 0.1, 1e-3, 32
BETA2 = 0.999  # Adam's, of the adapters; the head has the same by every method
LENGTHS = {
    "sst2": 48,
    "stdlib": 48,
    "gsm8k": 96,
}  # tokens a row is cut to; longer where a task has pairs
PAIR_LENGTH = 128
GSM8K_FILES = ("gsm8k_train", "gsm8k_test")
RANK = 3
HEADS = ("classifier", "score")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},  # every parameter of the base model, without adapters
    "adalora": {},  # PEFT's
    "direct": {"hypernet": "direct", "penalty": "frobenius"},
    "spectral": {},
    "spectral-magnitude": {"allocation": "magnitude"},
    "spectral-cubic": {"schedule": "cubic"},  # AdaLoRA's, with spectral steps' own scores
    "generated": {"hypernet": "bert"},
    "generated-mlp": {"hypernet": "mlp"},
    "generated-cnn": {"hypernet": "cnn"},
    "generated-replace": {"hypernet": "bert", "update": "replace"},
    "generated-residual": {"hypernet": "bert", "update": "residual"},
}
GRIDS = {  # factor-3 steps; the paper's 1e-5 is in all of them
    "full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "adalora": (1e-5, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "direct": (1e-5, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "spectral": (3e-4, 1e-3, 2e-3, 4e-3),
    "generated": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
}


def build(key: dict[str, Any], model: Any) -> tuple[Any, Any]:
    """(adapted model, what is called after each step)."""
    from transformers.pytorch_utils import Conv1D

    method, seed, steps = key["method"], key["seed"], key["steps"]
    init_rank, rank, gamma = key["init_rank"], key.get("rank", RANK), key.get("gamma", GAMMA)
    if method == "full":
        return model, lambda step: None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not _in_head(name)
    ]
    interval = max(1, steps // 20)
    if method == "adalora":
        from peft import AdaLoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = AdaLoraConfig(
            task_type="SEQ_CLS", target_modules=targets, modules_to_save=list(HEADS),
            init_r=init_rank, target_r=rank, orth_reg_weight=gamma, deltaT=interval,
            lora_alpha=ALPHA * init_rank / rank,  # type: ignore[arg-type]
            tinit=steps // 10, tfinal=steps // 3, total_step=steps,
        )  # fmt: skip
        adapted: Any = get_peft_model(model, config)
        # Pruning from a rank to itself fails in PEFT, and would do nothing.
        after = adapted.base_model.update_and_allocate if init_rank > rank else lambda step: None
        return adapted, after
    options = dict(METHODS[method])
    if options.get("schedule") == "cubic":
        options |= {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3}
    hal_kernels.patch_model(
        model, rank, init_rank=init_rank, targets=targets, modules_to_save=HEADS, alpha=ALPHA,
        gamma=gamma, interval=interval, seed=seed, **options,
    )  # fmt: skip
    return model, lambda step: None


def _in_head(name: str) -> bool:
    return not set(HEADS).isdisjoint(name.split("."))


def run(
    key: dict[str, Any],
    source: str,
    data: Path | None,
    look: Callable[[Any], dict[str, Any]] = lambda model: {},
) -> dict[str, Any]:
    """Train once; the loss (without the penalty) and the seconds at each step, and accuracies.

    Args:
        key: the row's fields; "gamma", "rank" and "beta2" where they are not GAMMA, RANK and BETA2,
            "hidden_size" where it is not the model's own, "warmup" where it is not a tenth of the
            steps.
        look: what it finds in the trained model, in evaluation mode, joins the result.
    """
    from torch.nn.functional import cross_entropy
    from transformers import get_cosine_schedule_with_warmup

    from examples.demo.task import accuracy, training_batches
    from hal_finetune.data import encode
    from hal_finetune.model import load_base, load_tokenizer

    found = _examples(key["task"], data)
    tokenizer = load_tokenizer(source)
    length = LENGTHS.get(key["task"], PAIR_LENGTH)
    train, dev = (encode(tokenizer, rows, length) for rows in (found.train, found.held_out))
    base = load_base(source, found.label_names, dtype="float32", seed=key["seed"])
    base.config.pad_token_id = tokenizer.pad_token_id
    model, after = build(key, widened(base, key.get("hidden_size", base.config.hidden_size)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in named if _in_head(n)]
    rest = [p for n, p in named if not _in_head(n)]
    beta2 = key.get("beta2") or BETA2
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": key["lr"], "betas": (0.9, beta2)}, {"params": head, "lr": HEAD_LR}],
        weight_decay=0.0,
    )
    warmup = key.get("warmup")
    warmup = key["steps"] // 10 if warmup is None else warmup
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, key["steps"])
    losses: list[float] = []
    seconds: list[float] = []
    course: list[dict[str, float]] = []
    batches = training_batches(tokenizer, train, BATCH, key["steps"], key["seed"])
    look_every = max(1, key["steps"] // 20)
    for step, batch in enumerate(batches, start=1):
        batch = {name: t.to(device) for name, t in batch.items()}
        torch.manual_seed(1000 * key["seed"] + step)  # the base model's dropout
        start = time.perf_counter()
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        after(step)
        schedule.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 5))
        losses.append(round(float(cross_entropy(out.logits.detach(), batch["labels"])), 5))
        if hasattr(model, "hal") and (step == 1 or step % look_every == 0):
            course.append({"step": step} | _state(model))
    model.eval()
    result = {"losses": losses, "seconds": seconds, "accuracy": accuracy(model, tokenizer, dev)}
    return result | ({"course": course} if course else {}) | look(model)


@torch.no_grad()
def _state(model: Any) -> dict[str, float]:
    """What would show a blow-up: the penalty, and the largest singular value of any layer."""
    lams = [f.lam.abs().max() for f in hal_kernels.factors(model).values()]
    penalty = hal_kernels.penalty(model)
    return {"penalty": round(float(penalty), 6), "lam": round(float(torch.stack(lams).max()), 5)}


def _examples(task: str, data: Path | None) -> Any:
    from examples.demo import stdlib_corpus
    from hal_finetune.data import Task, load
    from hal_finetune.options import DataOptions
    from hal_finetune.prompts import CLASSIFICATION
    from hal_finetune.rows import labelled, read_records

    if task == "stdlib":
        return stdlib_corpus.load()
    if data is None:
        raise SystemExit(f"--data is needed: the folder of {task}_train.jsonl and {task}_dev.jsonl")
    if task == "gsm8k":
        train, dev = (calculations(read_records(data_file(data, name))) for name in GSM8K_FILES)
        return Task(CLASSIFICATION, task, *labelled(train, dev, train_name=GSM8K_FILES[0]))
    files = [str(data_file(data, f"{task}_{side}")) for side in ("train", "dev")]
    return load(DataOptions(train_file=files[0], eval_file=files[1]), seed=0)


def calculations(
    records: Iterable[tuple[dict[str, Any], str]],
) -> Iterator[tuple[dict[str, Any], str]]:
    """GSM8K's questions by how many calculations the answer marks: up to two, three, or more."""
    for row, where in records:
        label = min(max(row["answer"].count("<<"), 2), 4)
        yield {"text": row["question"], "label": label}, where


def reached(losses: Sequence[float], target: float) -> int | None:
    """The first step whose running mean is at or below `target`."""
    for step in range(WINDOW, len(losses) + 1):
        if statistics.fmean(losses[step - WINDOW : step]) <= target:
            return step
    return None


def summary(rows: Iterable[dict[str, Any]], target: float) -> list[dict[str, Any]]:
    """One entry a method and lr: means over its seeds."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["lr"]), []).append(row)
    found = []
    for (method, lr), members in groups.items():
        steps = [reached(m["losses"], target) for m in members]
        got = [
            (s, sum(m["seconds"][:s]) if m["seconds"] else math.nan)
            for s, m in zip(steps, members, strict=True)
            if s
        ]
        found.append(
            {
                "method": method,
                "lr": lr,
                "seeds": len(members),
                "reached": len(got),
                "steps": statistics.fmean(s for s, _ in got) if got else None,
                "seconds": statistics.fmean(t for _, t in got) if got else None,
                "final": statistics.fmean(statistics.fmean(m["losses"][-WINDOW:]) for m in members),
                "accuracy": statistics.fmean(m["accuracy"] for m in members),
            }
        )
    return sorted(found, key=lambda f: (f["method"], f["lr"]))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder of the tasks' JSONL files")
    options.add_argument("--task", default="sst2")
    options.add_argument("--model", default="", help="default: the packaged MiniLM")
    options.add_argument("--method", nargs="+", choices=METHODS, default=["adalora", "spectral"])
    options.add_argument("--lr", type=float, nargs="+", help="instead of the methods' grids")
    options.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=160)
    options.add_argument("--rank", type=int, default=RANK)
    options.add_argument("--init-rank", type=int, help="default: the rank, so nothing is pruned")
    options.add_argument("--hidden-size", type=int, help="widen the model to this (bench.widened)")
    options.add_argument("--warmup", type=int, help="steps; default: a tenth of them")
    options.add_argument("--beta2", type=float, help=f"of AdamW for the adapters; default: {BETA2}")
    options.add_argument("--target", type=float, default=0.5, help="loss that is to be reached")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.seed, arguments.steps = [0], WINDOW + 5
    from examples.demo.task import packaged_model

    # Rows name the model, not where it lies.
    model = Path(arguments.model).name or "MiniLM-L6"
    source = arguments.model or packaged_model()
    console = Console()
    common = {
        "task": arguments.task, "steps": arguments.steps, "rank": arguments.rank,
        "init_rank": arguments.init_rank or arguments.rank, "model": model,
        "warmup": arguments.warmup, "beta2": arguments.beta2,
    }  # fmt: skip
    if arguments.hidden_size:
        size = arguments.hidden_size
        common |= {"model": f"{model}-d{size}", "hidden_size": size}
    for method, seed in itertools.product(arguments.method, arguments.seed):
        grid = arguments.lr or GRIDS[next(own for own in GRIDS if method.startswith(own))]
        for lr in grid[:1] if arguments.quick else grid:
            key = common | {"method": method, "lr": lr, "seed": seed}
            if stored("convergence", arguments.out, key):
                continue
            result = run(key, source, arguments.data)
            append_row("convergence", key | result, arguments.out)
            console.print(
                f"{method} lr {lr:g} seed {seed}: last loss "
                f"{statistics.fmean(result['losses'][-WINDOW:]):.3f}, accuracy "
                f"{result['accuracy']:.3f}, {sum(result['seconds']):.0f} s"
            )
    rows = stored("convergence", arguments.out, common)
    rows = [row for row in rows if row["method"] in arguments.method]
    found = summary(rows, arguments.target)
    table = Table(title=f"{arguments.task}: until the mean loss is {arguments.target:g}")
    for column in ("method", "lr", "seeds", "reached", "steps", "seconds", "final", "accuracy"):
        table.add_column(column)
    for entry in found:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in entry.values())
        table.add_row(*cells)
    console.print(table)
    best = {
        method: min(
            (e for e in found if e["method"] == method),
            key=lambda e: (-e["reached"], e["steps"] or 0.0, e["final"]),
        )["lr"]
        for method in dict.fromkeys(e["method"] for e in found)
    }
    console.print(f"best learning rates {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
