"""Prompt and answer of one row, for the forms in which instruction and test sets come.

A form is recognised by a row's columns. Prompts end where the model's answer begins; only the
answer is trained on.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
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
    messages: tuple[tuple[str, str], ...] = ()
    """Of a chat: role and content of each turn, up to the last answer."""
    templated: bool = False
    """Whether `prompt` is by the tokenizer's chat template."""
    source: str = ""
    """The place it came from, for errors."""


_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def instruction(row: Mapping[str, Any]) -> Prompted:
    """Alpaca, OpenPlatypus, Magpie: ``instruction``, ``output`` or ``response``, even ``input``."""
    asked, more = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
    prompt = (_WITH_INPUT if more else _ALONE).format(instruction=asked, input=more)
    answer = _text(row, "output" if "output" in row else "response")
    return Prompted(prompt, answer, messages=_exchange(asked + f"\n\n{more}" * bool(more), answer))


def gsm8k(row: Mapping[str, Any]) -> Prompted:
    """GSM8K: ``question`` and ``answer``, whose last line is ``#### number``."""
    question, answer = _text(row, "question"), _text(row, "answer")
    prompt = f"Question: {question}\nAnswer:"
    return Prompted(prompt, f" {answer}", messages=_exchange(question, answer))


def _exchange(asked: str, answer: str) -> tuple[tuple[str, str], ...]:
    return ("user", asked), ("assistant", answer)


def conversation(row: Mapping[str, Any]) -> Prompted:
    """``messages`` (TRL's: role and content) or ``conversations`` (ShareGPT's: from and value).

    What follows the last answer is left out.
    """
    column = "messages" if "messages" in row else "conversations"
    if not isinstance(row[column], list) or not row[column]:
        raise ValueError(f'"{column}" is {reprlib.repr(row[column])}, expected a list of turns')
    messages = tuple(_turn(turn, f'"{column}"[{i}]') for i, turn in enumerate(row[column]))
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise ValueError(f'"{column}" has no turn of the assistant to learn from: leave it out')
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f'"{column}" has no turn of the user before the assistant answers')
    messages = messages[: len(roles) - roles[::-1].index("assistant")]
    if len(messages) == 2:
        return instruction({"instruction": messages[0][1], "output": messages[1][1]})
    return Prompted("", messages[-1][1], messages=messages)


def _turn(turn: Any, name: str) -> tuple[str, str]:
    keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in keys):
        expected = '"role" and "content", or "from" and "value", as texts'
        raise ValueError(f"{name} is {reprlib.repr(turn)}, expected {expected}")
    if turn[keys[0]] not in _ROLES:
        raise ValueError(f'{name} has the {keys[0]} "{turn[keys[0]]}", expected one of {[*_ROLES]}')
    return _ROLES[turn[keys[0]]], turn[keys[1]]


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
    "conversation": conversation,
    "completion": completion,
}
"""Generation tasks by name."""

_COLUMNS: list[tuple[str, set[str]]] = [  # the first that fits
    (HUMANEVAL, {"prompt", "canonical_solution", "test", "entry_point"}),
    ("instruction", {"instruction", "output"}),
    ("instruction", {"instruction", "response"}),
    ("conversation", {"messages"}),
    ("conversation", {"conversations"}),
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
        return dataclasses.replace(FORMS[form](row), source=where)
    except KeyError as error:
        raise ValueError(f"{where}: column {error} is missing, expected for {form!r}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def templated(tokenizer: Any, example: Prompted, template: str) -> Prompted:
    """A chat as a template has it; what is no chat as it is.

    Args:
        template: "chat", the tokenizer's own; "alpaca", what the form has without it; "plain", the
            user's words and a new line.

    Raises:
        ValueError: the template does not take this chat.
    """
    turns = len(example.messages)
    if turns == 0 or (template == "alpaca" and turns == 2):
        return example
    if template == "chat":
        prompt = _render(tokenizer, example, turns - 1, asks=True)
        return dataclasses.replace(example, prompt=prompt, templated=True)
    if turns > 2:
        raise ValueError(
            f"{example.source}: a conversation of {turns} turns, expected a question and its "
            "answer: more takes a --model whose tokenizer has a chat template, and --template chat"
        )
    return dataclasses.replace(example, prompt=f"{example.messages[0][1]}\n")


def chat_tokens(tokenizer: Any, example: Prompted) -> tuple[list[int], list[int]]:
    """A whole chat's token ids by the tokenizer's template, and 1 where the assistant writes.

    Where the template doesn't mark that, it is what each of the assistant's turns adds to the text,
    but for white space at the end.

    Raises:
        ValueError: the template does not take this chat, or show what the assistant writes.
    """
    if _GENERATION.search(tokenizer.get_chat_template()):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = _render(tokenizer, example, **options)
        ids, mask = found["input_ids"], found["assistant_masks"]
    else:
        whole, spans = _render(tokenizer, example), []
        for i, (role, _) in enumerate(example.messages):
            if role == "assistant":
                before = _render(tokenizer, example, i, asks=True)
                after = _render(tokenizer, example, i + 1)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise _refusal(example, f"turn {i + 1} reads otherwise when it is the last")
                spans.append(range(len(before), len(after.rstrip())))
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = found["input_ids"], [start for start, _ in found["offset_mapping"]]
        mask = [int(any(start in span for span in spans)) for start in starts]
    if not any(mask):
        raise _refusal(example, "it marks nothing as the assistant's")
    return ids, mask


def _render(
    tokenizer: Any, example: Prompted, turns: int | None = None, asks: bool = False, **options: Any
) -> Any:
    """The first `turns` (None: all) by the chat template; `asks`: for the assistant's next one."""
    chat = [{"role": role, "content": content} for role, content in example.messages[:turns]]
    options = {"tokenize": False, "add_generation_prompt": asks} | options
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # any kind: a template raises what it likes
        raise _refusal(example, str(error) or repr(error)) from error


def _refusal(example: Prompted, words: str) -> ValueError:
    return ValueError(
        f"{example.source}: the tokenizer's chat template does not take this chat ({words}): "
        "change the row, or take another --template"
    )


def encode(tokenizer: Any, examples: Sequence[Prompted], **options: Any) -> list[list[int]]:
    """Token ids of the prompts, without an eos that the tokenizer ends every text with.

    Args:
        options: of the tokenizer's call.

    Raises:
        ValueError: a prompt has no token.
    """
    special = not examples[0].templated  # a chat template has brought its own
    texts = [example.prompt for example in examples]
    found = tokenizer(texts, add_special_tokens=special, **options)["input_ids"]
    if special:
        found = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in found]
    for example, ids in zip(examples, found, strict=True):
        if not ids:
            answer = reprlib.repr(example.answer)
            raise ValueError(f"the prompt {example.prompt!r} of the answer {answer} has no token")
    return found
