"""Data for fine-tuning: sets of the hub by name, or local JSONL files, tokenized."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import prompts
from .demo_data import encode
from .finetune_options import DataOptions, OptionsError
from .prompts import Prompted
from .text_data import Dataset, Records, labelled_pair, read_records

IGNORED = -100  # the label of tokens that count in no loss


@dataclass(frozen=True)
class HubSet:
    """Where a data set's two sides are on the hub; None: it has no such side."""

    path: str
    config: str | None
    train: str | None
    held_out: str | None


def _glue(task: str, held_out: str = "validation") -> HubSet:
    return HubSet("nyu-mll/glue", task, "train", held_out)


KNOWN = {
    **{f"glue/{task}": _glue(task) for task in ("rte", "wnli", "sst2", "cola", "mrpc", "qnli")},
    "glue/qqp": _glue("qqp"),
    "glue/mnli": _glue("mnli", "validation_matched"),
    "tatsu-lab/alpaca": HubSet("tatsu-lab/alpaca", None, "train", None),
    "magpie": HubSet("Magpie-Align/Magpie-Pro-300K-Filtered", None, "train", None),
    "open-platypus": HubSet("garage-bAInd/Open-Platypus", None, "train", None),
    "gsm8k": HubSet("openai/gsm8k", "main", "train", "test"),
    "openai_humaneval": HubSet("openai/openai_humaneval", None, None, "test"),
}
"""The paper's data sets, and the rest of GLUE's classification tasks, by short name."""


@dataclass(frozen=True)
class Task:
    """What is trained on and evaluated on.

    Attributes:
        form: `prompts.CLASSIFICATION`, or a generation form of `prompts.FORMS` (of the held-out
            side, which decides how answers are judged).
        labelled: both sides of a classification task.
        train, held_out: both sides of a generation task.
        name: of the data, for people.
    """

    form: str
    name: str
    labelled: Dataset | None = None
    train: tuple[Prompted, ...] = ()
    held_out: tuple[Prompted, ...] = ()


@dataclass(frozen=True)
class _Side:
    form: str
    rows: list[tuple[dict[str, Any], str]]
    name: str
    label_names: list[str] | None = None


def load(options: DataOptions, seed: int) -> Task:
    """Read both sides of the data that the options name.

    Raises:
        OptionsError: unknown names, files that can't be read, rows that don't fit.
    """
    try:
        train, held_out = _sides(options, seed)
        train = _cut(train, options.max_train_samples, seed)
        held_out = _cut(held_out, options.max_eval_samples, seed)
        name = train.name if train.name == held_out.name else f"{train.name}, {held_out.name}"
        if train.form != prompts.CLASSIFICATION:
            if held_out.form == prompts.CLASSIFICATION:
                raise ValueError(f"{held_out.name} holds labels, {train.name} does not")
            return Task(
                form=held_out.form,
                name=name,
                train=tuple(prompts.prompted(train.form, *row) for row in train.rows),
                held_out=tuple(prompts.prompted(held_out.form, *row) for row in held_out.rows),
            )
        labelled = labelled_pair(
            train.rows,
            held_out.rows,
            train_name=train.name,
            description=name,
            label_names=train.label_names,
        )
        return Task(prompts.CLASSIFICATION, name, labelled)
    except (OSError, ValueError) as error:
        raise OptionsError(str(error)) from error


def _sides(options: DataOptions, seed: int) -> tuple[_Side, _Side]:
    train: _Side | None
    held_out: _Side | None
    if options.train_file is not None:
        train, held_out = _from_file(options.train_file), None
    else:
        assert options.dataset is not None  # settled with the options
        train, held_out = _from_hub(options.dataset)
    if options.eval_file is not None:
        held_out = _from_file(options.eval_file)
    elif options.eval_dataset is not None:
        held_out = _from_hub(options.eval_dataset)[1]
        if held_out is None:
            raise ValueError(f"--eval_dataset {options.eval_dataset} has no held-out side")
    if train is None:
        raise ValueError(
            f"--dataset {options.dataset} has no training side: give it as --eval_dataset"
        )
    return (train, held_out) if held_out is not None else _split(train, options.held_out, seed)


def _from_file(name: str) -> _Side:
    path = Path(name)
    return _side(read_records(path), path.name)


def _side(records: Records, name: str, label_names: list[str] | None = None) -> _Side:
    rows = list(records)
    if not rows:
        raise ValueError(f"{name}: holds no row")
    try:
        form = prompts.form_of(rows[0][0].keys())
    except ValueError as error:
        raise ValueError(f"{rows[0][1]}: {error}") from None
    return _Side(form, rows, name, label_names)


def _from_hub(name: str) -> tuple[_Side | None, _Side | None]:
    from datasets import get_dataset_split_names, load_dataset

    where = KNOWN.get(name)
    try:
        if where is None:
            path, _, config = name.partition(":")
            splits = get_dataset_split_names(path, config or None)
            held_out = next((s for s in ("validation", "test") if s in splits), None)
            where = HubSet(path, config or None, "train" if "train" in splits else None, held_out)
        loaded = [
            None if split is None else load_dataset(where.path, where.config, split=split)
            for split in (where.train, where.held_out)
        ]
    except Exception as error:  # any kind: of the network, of the hub, of a script
        known = ", ".join(sorted(KNOWN))
        raise ValueError(
            f"data set {name!r} can't be loaded ({type(error).__name__}: {error}). Known by name: "
            f"{known}; or give --train_file"
        ) from error

    def side(data: Any) -> _Side | None:
        if data is None:
            return None
        names = getattr(data.features.get("label"), "names", None)
        records = ((row, f"{name}, row {i}") for i, row in enumerate(data))
        return _side(records, name, names)

    return side(loaded[0]), side(loaded[1])


def _split(side: _Side, count: int, seed: int) -> tuple[_Side, _Side]:
    """Hold out `count` rows, chosen by the seed, in their order."""
    if len(side.rows) <= count:
        raise ValueError(
            f"{side.name} has {len(side.rows)} rows: --held_out {count} leaves none to train on"
        )
    chosen = set(random.Random(seed).sample(range(len(side.rows)), count))
    parts = [
        [r for i, r in enumerate(side.rows) if (i in chosen) == held] for held in (False, True)
    ]
    train, held_out = (_Side(side.form, rows, side.name, side.label_names) for rows in parts)
    return train, held_out


def _cut(side: _Side, limit: int | None, seed: int) -> _Side:
    if limit is None or len(side.rows) <= limit:
        return side
    return _Side(
        side.form, random.Random(seed).sample(side.rows, limit), side.name, side.label_names
    )


def encode_labelled(
    tokenizer: Any, data: Dataset, max_length: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Token ids and labels of both sides.

    Raises:
        OptionsError: a text has no token, and the tokenizer adds none.
    """
    try:
        return encode(tokenizer, data.train, max_length), encode(tokenizer, data.dev, max_length)
    except ValueError as error:
        raise OptionsError(str(error)) from error


def encode_prompted(
    tokenizer: Any, examples: Sequence[Prompted], max_length: int
) -> list[dict[str, Any]]:
    """Prompt and answer as one sequence that ends with eos; only the answer has labels.

    Answers are cut at `max_length` tokens. Rows whose prompt leaves no room are left out.

    Raises:
        OptionsError: no row is left, or one has no token to begin with.
    """
    try:
        heads = prompts.encode(tokenizer, examples)
    except ValueError as error:
        raise OptionsError(str(error)) from error
    answers = tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for head, answer in zip(heads, answers, strict=True):
        tail = [*answer, *end]
        if len(head) >= max_length or not tail:
            continue
        ids = [*head, *tail][:max_length]
        labels = [*itertools.repeat(IGNORED, len(head)), *tail][:max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not rows:
        raise OptionsError(f"--max_length is {max_length}: every prompt is as long, or longer")
    return rows
