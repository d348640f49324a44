"""Rows of text: JSON lines, and what a labelled row holds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LINE = 64 << 20
"""Characters that a line may have: a file of one endless line would fill the memory."""

Records = Iterable[tuple[dict[str, Any], str]]
"""Rows, each with the words that name its place in an error."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts, and the place it came from."""

    text: str
    label: int
    pair: str | None = None
    source: str = ""


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (JSON object, "file:line") of every non-empty line of a JSONL file (plain or .gz).

    Raises:
        ValueError: a line that is no JSON object, naming file and line; no line at all.
        OSError: a file that cannot be read.
    """
    found = False
    opened: Any = gzip.open if path.suffix == ".gz" else open
    # A byte order mark at the start is none of the text.
    with opened(path, "rt", encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(iter(lambda: stream.readline(LINE), ""), start=1):
                where = f"{path}:{number}"
                if len(line) == LINE:
                    raise ValueError(f"{where}: longer than {LINE} characters, expected JSON lines")
                if line.strip():
                    found = True
                    yield _record(line, where), where
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a UTF-8 JSONL file ({error})") from error
    if not found:
        raise ValueError(f"{path}: holds no line")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_object)
        if r"\ud" in line or r"\uD" in line:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a character ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return record


def labelled(
    train: Records,
    held_out: Records,
    *,
    train_name: str,
    label_names: Sequence[str] | None = None,
) -> tuple[list[Example], list[Example], list[str]]:
    """Both sides of a classification task, and the names of its labels 0, 1, ….

    A row holds ``sentence`` or ``text``, or ``sentence1`` and ``sentence2`` (or GLUE's other names
    for a pair), and a ``label`` that is an int or a str.

    Args:
        train_name: what errors call the training side.
        label_names: of the labels 0, 1, …; None: the training side's labels are numbered in order,
            ints before strs.

    Raises:
        ValueError: a row that does not fit, or does not go with the others; fewer than two labels.
    """
    sides = [[_example(*record) for record in side] for side in (train, held_out)]
    found: set[Any] = {example.label for example in sides[0]}
    labels = sorted(found, key=lambda label: (isinstance(label, str), label))
    if label_names is not None:
        labels = list(range(len(label_names)))
    if len(labels) < 2:
        words = ", ".join(map(repr, labels)) or "none"
        raise ValueError(f"{train_name}: need at least two different labels, found {words}")
    names = list(label_names or map(str, labels))
    if len(set(names)) < len(names):
        raise ValueError(f"{train_name}: some labels differ in their type alone: {labels}")
    number = {label: index for index, label in enumerate(labels)}
    kinds = "a single text", "a pair of texts"
    paired = sides[0][0].pair is not None
    for example in [*sides[0], *sides[1]]:
        if example.label not in number:
            raise ValueError(
                f"{example.source}: label {example.label!r} does not occur in {train_name}"
            )
        if (example.pair is not None) != paired:
            raise ValueError(
                f"{example.source}: holds {kinds[not paired]}, but the first row of {train_name} "
                f"{kinds[paired]}"
            )
    train_side, held_out_side = (
        [dataclasses.replace(example, label=number[example.label]) for example in side]
        for side in sides
    )
    return train_side, held_out_side, names


# GLUE's names, and "text". Of those that fit a row the first is taken.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence", None),
    ("text", None),
)


def _example(row: dict[str, Any], where: str) -> Example:
    """A row as it stands, with its label as it stands: an int or a str."""
    columns = next((pair for pair in _TEXT_COLUMNS if pair[0] in row), None)
    if columns is None:
        raise ValueError(
            f'{where}: expected "sentence", "text", or "sentence1" and "sentence2"; '
            f"found {', '.join(map(repr, row)) or 'no key'}"
        )
    texts = [row.get(column) for column in columns if column is not None]
    for column, text in zip(columns, texts, strict=False):
        if not isinstance(text, str):
            raise ValueError(f'{where}: "{column}" must be a str, found {reprlib.repr(text)}')
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f'{where}: "label" must be an int or a str, found {reprlib.repr(label)}')
    return Example(texts[0], label, texts[1] if len(texts) > 1 else None, where)  # type: ignore[arg-type]
