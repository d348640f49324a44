"""From labelled texts to padded batches of tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .text_data import Example

Batch = dict[str, torch.Tensor]

_BATCHES_SORTED = 10  # batches drawn at a time and sorted by length among themselves
_STRIDE = 3  # coprime with it


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """Tokenize without padding: one dict a row, as `collate` takes it.

    Raises:
        ValueError: a text has no token, naming its source.
    """
    pairs = [example.pair for example in examples]
    encoded = tokenizer(
        [example.text for example in examples],
        None if None in pairs else pairs,
        truncation=True,
        max_length=max_length,
    )
    rows = [{key: encoded[key][i] for key in encoded} for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        if not row["input_ids"]:
            raise ValueError(f"{example.source}: the text {example.text!r} has no token")
        row["labels"] = example.label
    return rows


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
