"""Labelled sentences: the records every text classification here works on, and a JSONL reader."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast


@dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts, and the file it came from."""

    text: str
    label: int
    pair: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples; `Example.label` indexes `label_names`."""

    train: list[Example]
    dev: list[Example]
    label_names: list[str]
    description: str


LINE = 64 << 20
"""Characters that a line may have: a file of one endless line would fill the memory."""


def read_jsonl_pair(train_file: Path, dev_file: Path) -> Dataset:
    """Read a training and a held-out JSONL file (plain or .gz) into one data set.

    Each line holds ``sentence`` or ``text``, or ``sentence1`` and ``sentence2``, and a ``label``
    that is an int or a str. Labels are numbered in the order of the training file's sorted labels.

    Raises:
        ValueError: a line that does not fit, naming file and line; fewer than two labels.
        OSError: a file that cannot be read.
    """
    return labelled_pair(
        read_records(train_file),
        read_records(dev_file),
        train_name=str(train_file),
        description=f"{train_file.name} and {dev_file.name}",
    )


Records = Iterable[tuple[dict[str, Any], str]]
"""Rows, each with the words that name its place in an error."""


def labelled_pair(
    train: Records,
    dev: Records,
    *,
    train_name: str,
    description: str,
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """Labelled rows of both sides as one data set; `read_jsonl_pair` says what a row holds.

    Args:
        train_name: what errors call the training side.
        label_names: of labels 0, 1, …; None takes the labels of the training side, sorted.

    Raises:
        ValueError: a row that does not fit, or does not go with the others; fewer than two labels.
    """
    train_rows = [_row(*record) for record in train]
    dev_rows = [_row(*record) for record in dev]
    labels = _sorted_labels([label for _, _, label, _ in train_rows])
    if label_names is not None:
        labels = list(range(len(label_names)))
    if len(labels) < 2:
        found = ", ".join(repr(label) for label in labels) or "none"
        raise ValueError(f"{train_name}: need at least two different labels, found {found}")
    names = list(label_names or map(str, labels))
    if len(set(names)) < len(names):
        raise ValueError(f"{train_name}: some labels differ in their type alone: {labels}")
    number = {label: index for index, label in enumerate(labels)}
    kinds = "a single text", "a pair of texts"
    paired = train_rows[0][1] is not None
    for _, pair, label, where in [*train_rows, *dev_rows]:
        if label not in number:
            raise ValueError(f"{where}: label {label!r} does not occur in {train_name}")
        if (pair is not None) != paired:
            raise ValueError(
                f"{where}: holds {kinds[not paired]}, but the first row of {train_name} "
                f"{kinds[paired]}"
            )

    def examples(rows: Sequence[_Row]) -> list[Example]:
        return [Example(text, number[label], pair, where) for text, pair, label, where in rows]

    return Dataset(
        train=examples(train_rows),
        dev=examples(dev_rows),
        label_names=names,
        description=description,
    )


# GLUE's names, and "text". Of those that fit a record the first is taken.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence", None),
    ("text", None),
)
_Label = int | str
_Row = tuple[str, str | None, _Label, str]


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (JSON object, "file:line") of every non-empty line of a JSONL file (plain or .gz).

    Raises:
        ValueError: a line that is no JSON object, naming file and line; no line at all.
        OSError: a file that cannot be read.
    """
    found = False
    with _open_text(path) as stream:
        try:
            for number, line in enumerate(iter(lambda: stream.readline(LINE), ""), start=1):
                where = f"{path}:{number}"
                if len(line) == LINE:
                    raise ValueError(f"{where}: longer than {LINE} characters, expected JSON lines")
                if line.strip():
                    found = True
                    yield _parse_record(line, where), where
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a UTF-8 JSONL file ({error})") from error
    if not found:
        raise ValueError(f"{path}: holds no line")


def _open_text(path: Path) -> IO[str]:
    encoding = "utf-8-sig"  # a byte order mark at the start is none of the text
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding=encoding))
    return path.open(encoding=encoding)


def _parse_record(line: str, where: str) -> dict[str, Any]:
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


def _row(record: dict[str, Any], where: str) -> _Row:
    text, pair = _texts(record, where)
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f'{where}: "label" must be an int or a str, found {reprlib.repr(label)}')
    return text, pair, label, where


def _texts(record: dict[str, Any], where: str) -> tuple[str, str | None]:
    for first, second in _TEXT_COLUMNS:
        if first not in record:
            continue
        text = _string(record, first, where)
        return text, None if second is None else _string(record, second, where)
    raise ValueError(
        f'{where}: expected "sentence", "text", or "sentence1" and "sentence2"; '
        f"found {', '.join(map(repr, record)) or 'no key'}"
    )


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" must be a str, found {reprlib.repr(value)}')
    return value


def _sorted_labels(labels: Sequence[_Label]) -> list[_Label]:
    """Distinct labels: ints in numeric order, before strs in alphabetic order."""
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))
