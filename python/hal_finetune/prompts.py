"""Prompt and answer of one row, for the forms in which instruction and test sets come.

A form is recognised by a row's columns. Prompts end where the model's answer begins; only the
answer is trained on.
"""

from __future__ import annotations

import ast
import contextlib
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLASSIFICATION = "classification"
GSM8K = "gsm8k"
HUMANEVAL = "humaneval"

# Stanford Alpaca's (https://github.com/tatsu-lab/stanford_alpaca), which OpenPlatypus shares.
_PREAMBLE = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_ALONE = _PREAMBLE + f". {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
_WITH_INPUT = (
    _PREAMBLE
    + f", paired with an input that provides further context. {_REQUEST}\n\n"
    + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Prompted:
    """What the model reads, what it should write, and what a test of its answer needs."""

    prompt: str
    answer: str
    tests: str = ""
    """HumanEval: source that defines ``check(candidate)`` and calls it."""
    entry_point: str = ""
    """HumanEval: the name of the function to be completed."""
    head: str = ""
    """HumanEval: source of what comes before that function, for the tests to use, and its stub."""


def instruction(row: Mapping[str, Any]) -> Prompted:
    """Alpaca, OpenPlatypus, Magpie: ``instruction``, ``output`` or ``response``, even ``input``."""
    more = _text(row, "input") if row.get("input") else ""
    template = _WITH_INPUT if more else _ALONE
    prompt = template.format(instruction=_text(row, "instruction"), input=more)
    return Prompted(prompt, _text(row, "output" if "output" in row else "response"))


def gsm8k(row: Mapping[str, Any]) -> Prompted:
    """GSM8K: ``question`` and ``answer``, whose last line is ``#### number``."""
    return Prompted(f"Question: {_text(row, 'question')}\nAnswer:", f" {_text(row, 'answer')}")


def humaneval(row: Mapping[str, Any]) -> Prompted:
    """HumanEval: a function's head is the prompt, its body the answer."""
    prompt, name = _text(row, "prompt"), _text(row, "entry_point")
    tests = f"{_text(row, 'test')}\ncheck({name})\n"
    return Prompted(prompt, _text(row, "canonical_solution"), tests, name, _stub(prompt))


def _stub(prompt: str) -> str:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in docstrings
        for source in (prompt, f"{prompt}    pass\n"):
            with contextlib.suppress(SyntaxError):
                ast.parse(source)
                return source
    raise ValueError(f'"prompt" is {reprlib.repr(prompt)}, expected the head of a Python function')


def completion(row: Mapping[str, Any]) -> Prompted:
    """``prompt`` and ``completion``, as they are."""
    return Prompted(_text(row, "prompt"), _text(row, "completion"))


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f'"{column}" is {reprlib.repr(value)}, expected text')
    return value


FORMS: dict[str, Callable[[Mapping[str, Any]], Prompted]] = {
    HUMANEVAL: humaneval,
    GSM8K: gsm8k,
    "instruction": instruction,
    "completion": completion,
}
"""Generation tasks by name."""

_COLUMNS: list[tuple[str, set[str]]] = [  # the first that fits
    (HUMANEVAL, {"prompt", "canonical_solution", "test", "entry_point"}),
    ("instruction", {"instruction", "output"}),
    ("instruction", {"instruction", "response"}),
    ("completion", {"prompt", "completion"}),
    (GSM8K, {"question", "answer"}),
    (CLASSIFICATION, {"label"}),
]


def form_of(columns: Collection[str]) -> str:
    """The form of a set whose rows have these columns.

    Raises:
        ValueError: no form has them.
    """
    for name, needed in _COLUMNS:
        if needed <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _COLUMNS)
    raise ValueError(f"columns are {sorted(columns)}, expected those of one form ({known})")


def prompted(form: str, row: Mapping[str, Any], where: str) -> Prompted:
    """One row of a generation task.

    Raises:
        ValueError: a column is missing or not text, naming `where`.
    """
    try:
        return FORMS[form](row)
    except KeyError as error:
        raise ValueError(f"{where}: column {error} is missing, expected for {form!r}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def encode(tokenizer: Any, examples: Sequence[Prompted], **options: Any) -> list[list[int]]:
    """Token ids of the prompts, without an eos that the tokenizer ends every text with.

    Args:
        options: of the tokenizer's call.

    Raises:
        ValueError: a prompt has no token.
    """
    found = tokenizer([example.prompt for example in examples], **options)["input_ids"]
    found = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in found]
    for example, ids in zip(examples, found, strict=True):
        if not ids:
            answer = reprlib.repr(example.answer)
            raise ValueError(f"the prompt {example.prompt!r} of the answer {answer} has no token")
    return found
