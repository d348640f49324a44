"""Data for fine-tuning: sets of the hub by name, or local JSONL files, tokenized."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import prompts
from .options import DataOptions, OptionsError
from .prompts import CLASSIFICATION, Prompted
from .rows import Example, Records, labelled, read_records

IGNORED = -100  # the label of tokens that count in no loss


KNOWN = {
    **{
        f"glue/{task}": f"nyu-mll/glue:{task}"
        for task in ("rte", "wnli", "sst2", "cola", "mrpc", "qnli", "qqp", "mnli")
    },
    "tatsu-lab/alpaca": "tatsu-lab/alpaca",
    "magpie": "Magpie-Align/Magpie-Pro-300K-Filtered",
    "open-platypus": "garage-bAInd/Open-Platypus",
    "gsm8k": "openai/gsm8k:main",
    "openai_humaneval": "openai/openai_humaneval",
}
"""The paper's data sets, and the rest of GLUE's classification tasks, by short name."""
HELD_OUT = ("validation", "validation_matched", "test")  # the first that there is


def hub_path(name: str) -> str:
    """The repository on the hub of a data set that ``--dataset`` names."""
    return KNOWN.get(name, name).partition(":")[0]


@dataclass(frozen=True)
class Task:
    """What is trained on and evaluated on.

    Attributes:
        form: `prompts.CLASSIFICATION`, or a generation form of `prompts.FORMS` (of the held-out
            side, which decides how answers are judged).
        name: of the data, for people.
        train, held_out: `Example` of a classification task, else `Prompted`.
        label_names: of a classification task.
    """

    form: str
    name: str
    train: Sequence[Any]
    held_out: Sequence[Any]
    label_names: list[str] | None = None


@dataclass(frozen=True)
class _Side:
    form: str
    rows: list[tuple[dict[str, Any], str]]
    name: str
    label_names: list[str] | None = None

    def drawn(self, count: int | None, seed: int) -> _Side:
        """That many rows, drawn at random; all for None, or if there are no more."""
        if count is None or len(self.rows) <= count:
            return self
        return dataclasses.replace(self, rows=random.Random(seed).sample(self.rows, count))


def load(options: DataOptions, seed: int) -> Task:
    """Read both sides of the data that the options name.

    Raises:
        OptionsError: unknown names, files that can't be read, rows that don't fit.
    """
    try:
        train, held_out = _sides(options, seed)
        train = train.drawn(options.max_train_samples, seed)
        held_out = held_out.drawn(options.max_eval_samples, seed)
        name = train.name if train.name == held_out.name else f"{train.name}, {held_out.name}"
        if train.form == CLASSIFICATION:
            sides = labelled(
                train.rows, held_out.rows, train_name=train.name, label_names=train.label_names
            )
            return Task(CLASSIFICATION, name, *sides)
        if held_out.form == CLASSIFICATION:
            raise ValueError(f"{held_out.name} holds labels, {train.name} does not")
        asked, answered = (
            [prompts.prompted(side.form, *row) for row in side.rows] for side in (train, held_out)
        )
        return Task(held_out.form, name, asked, answered)
    except (OSError, ValueError) as error:
        raise OptionsError(str(error)) from error


def templated(task: Task, tokenizer: Any, template: str) -> Task:
    """The task's chats as a template has them; "auto": the tokenizer's where it has one.

    A tokenizer whose own template is not taken is left without it, so that what is saved of it
    doesn't say how the model was not trained.

    Raises:
        OptionsError: the tokenizer has no chat template, or it does not take a row.
    """
    if task.form == CLASSIFICATION:
        return task
    has = bool(tokenizer.chat_template)
    if template == "auto":
        template = "chat" if has else "alpaca"
    if template == "chat" and not has:
        raise OptionsError("--template is chat, and the tokenizer of --model has no chat template")
    if template != "chat":
        tokenizer.chat_template = None
    try:
        train, held_out = (
            [prompts.templated(tokenizer, example, template) for example in side]
            for side in (task.train, task.held_out)
        )
    except ValueError as error:
        raise OptionsError(str(error)) from error
    return dataclasses.replace(task, train=train, held_out=held_out)


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
            raise ValueError(f"--eval-dataset {options.eval_dataset} has no held-out side")
    if train is None:
        raise ValueError(
            f"--dataset {options.dataset} has no training side: give it as --eval-dataset"
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
    from datasets import load_dataset

    path, _, config = KNOWN.get(name, name).partition(":")
    try:
        loaded = load_dataset(path, config or None)
    except Exception as error:  # any kind: of the network, of the hub, of a script
        known = ", ".join(sorted(KNOWN))
        raise ValueError(
            f"data set {name!r} can't be loaded ({type(error).__name__}: {error}). Known by name: "
            f"{known}; or give --train-file"
        ) from error

    def side(split: str | None) -> _Side | None:
        if split not in loaded:
            return None
        data = loaded[split]
        names = getattr(data.features.get("label"), "names", None)
        return _side(((row, f"{name}, row {i}") for i, row in enumerate(data)), name, names)

    return side("train"), side(next((split for split in HELD_OUT if split in loaded), None))


def _split(side: _Side, count: int, seed: int) -> tuple[_Side, _Side]:
    """Hold out `count` rows, chosen by the seed, in their order."""
    if len(side.rows) <= count:
        raise ValueError(
            f"{side.name} has {len(side.rows)} rows: --held-out {count} leaves none to train on"
        )
    chosen = set(random.Random(seed).sample(range(len(side.rows)), count))
    train, held_out = (
        [row for i, row in enumerate(side.rows) if (i in chosen) == held] for held in (False, True)
    )
    return dataclasses.replace(side, rows=train), dataclasses.replace(side, rows=held_out)


def encode(
    tokenizer: Any, examples: Sequence[Example] | Sequence[Prompted], max_length: int
) -> list[dict[str, Any]]:
    """Token ids, attention mask and labels of each row, not padded.

    A text, or a pair of texts, is cut at `max_length` tokens. A prompt and its answer are one
    sequence that ends with eos, of which only the answer has labels and is cut; rows whose prompt
    leaves no room are left out.

    Raises:
        OptionsError: a row has no token to begin with, or none is left.
    """
    try:
        if isinstance(examples[0], Prompted):
            return _encode_prompted(tokenizer, examples, max_length)  # type: ignore[arg-type]
        return _encode_labelled(tokenizer, examples, max_length)  # type: ignore[arg-type]
    except (ValueError, NotImplementedError) as error:  # a slow tokenizer knows no offsets
        raise OptionsError(str(error)) from error


def _encode_labelled(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> list[dict[str, Any]]:
    texts, pairs = [e.text for e in examples], [e.pair for e in examples]
    encoded = tokenizer(
        texts, None if None in pairs else pairs, truncation=True, max_length=max_length
    )
    rows = []
    for i, example in enumerate(examples):
        rows.append({key: encoded[key][i] for key in encoded} | {"labels": example.label})
        if not rows[-1]["input_ids"]:
            raise ValueError(f"{example.source}: the text {example.text!r} has no token")
    return rows


def _encode_prompted(
    tokenizer: Any, examples: Sequence[Prompted], max_length: int
) -> list[dict[str, Any]]:
    if examples[0].templated:
        pairs = [prompts.chat_tokens(tokenizer, example) for example in examples]
    else:
        heads = prompts.encode(tokenizer, examples)
        answers = tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pairs = [
            ([*head, *answer, *end], [0] * len(head) + [1] * len([*answer, *end]))
            for head, answer in zip(heads, answers, strict=True)
        ]
    rows = []
    for ids, mask in pairs:
        ids, mask = ids[:max_length], mask[:max_length]
        if any(mask):
            labels = [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not rows:
        raise ValueError(f"--max-length is {max_length}: every prompt is as long, or longer")
    return rows
