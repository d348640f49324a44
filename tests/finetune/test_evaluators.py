"""Prompts, the judges of written answers, and the limits of programs that a model wrote."""

import os
import time
from decimal import Decimal

import pytest

from hal_finetune import data, evaluators, prompts
from hal_finetune.code_execution import passes
from hal_finetune.options import DataOptions, OptionsError

from .tiny import build_tokenizer, save_model, write_jsonl

# -- prompts and data ------------------------------------------------------------------------------


def test_alpacas_template():
    alone = prompts.instruction({"instruction": "Say hi.", "input": "", "output": "hi"})
    assert alone.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert alone.answer == "hi"
    both = prompts.instruction({"instruction": "Add {it}.", "input": "1 2", "response": "3"})
    assert "paired with an input" in both.prompt
    assert "### Instruction:\nAdd {it}.\n\n### Input:\n1 2\n\n### Response:\n" in both.prompt


@pytest.mark.parametrize(
    "columns, form",
    [
        (["instruction", "input", "output"], "instruction"),
        (["uuid", "instruction", "response", "conversations"], "instruction"),
        (["question", "answer", "final"], "gsm8k"),
        (["task_id", "prompt", "canonical_solution", "test", "entry_point"], "humaneval"),
        (["prompt", "completion"], "completion"),
        (["idx", "sentence1", "sentence2", "label"], "classification"),
        (["question", "sentence", "label"], "classification"),
    ],
)
def test_forms_are_known_by_their_columns(columns, form):
    assert prompts.form_of(columns) == form


def test_unknown_columns():
    with pytest.raises(ValueError, match=r"columns are \['text'\], expected those of one form"):
        prompts.form_of(["text"])


def test_only_the_answer_has_labels():
    tokenizer = build_tokenizer()
    examples = [
        prompts.Prompted("write the number", " two three"),
        prompts.Prompted("write " * 9, "two"),  # leaves no room
        prompts.Prompted("write", "two " * 9),  # is cut
    ]
    rows = data.encode(tokenizer, examples, max_length=7)
    assert len(rows) == 2
    for row in rows:
        assert len(row["input_ids"]) == len(row["attention_mask"]) == len(row["labels"])
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        assert all(label in (token, data.IGNORED) for token, label in pairs)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert words == ["write", "the", "number", "two", "three", "</s>"]
    assert [label != -100 for label in rows[0]["labels"]] == [False] * 3 + [True] * 3
    assert [label != -100 for label in rows[1]["labels"]] == [False] + [True] * 6


def test_prompts_end_where_the_answer_begins(tmp_path):
    """Without the eos that BART's tokenizer, say, ends every text with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_model("bart", tmp_path))
    (ids,) = prompts.encode(tokenizer, [prompts.Prompted("write the number", "")])
    assert tokenizer.convert_ids_to_tokens(ids) == ["write", "the", "number"]
    with pytest.raises(ValueError, match="the prompt '' of the answer 'two' has no token"):
        prompts.encode(tokenizer, [prompts.Prompted("", "two")])


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds what the test puts into it: (path, config, split) -> rows."""
    datasets = pytest.importorskip("datasets")
    stored = {}

    def load_dataset(path, config):
        return {s: rows for (p, c, s), rows in stored.items() if (p, c) == (path, config)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def test_glue_by_name(hub):
    import datasets

    labels = datasets.ClassLabel(names=["entailment", "not_entailment"])
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": labels,
        }
    )
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": 1} for i in range(3)]
    for split in ("train", "validation"):
        hub["nyu-mll/glue", "rte", split] = datasets.Dataset.from_list(rows, features)
    task = data.load(DataOptions(model="m", dataset="glue/rte"), seed=0)
    assert task.form == prompts.CLASSIFICATION
    assert task.label_names == ["entailment", "not_entailment"]
    assert [e.label for e in task.train] == [1, 1, 1]
    assert (task.held_out[2].text, task.held_out[2].pair) == ("a 2", "b")


def test_a_side_is_held_out_where_there_is_none(hub):
    import datasets

    rows = [{"instruction": f"do {i}", "input": "", "output": f"{i}"} for i in range(30)]
    hub["tatsu-lab/alpaca", None, "train"] = datasets.Dataset.from_list(rows)
    options = DataOptions(model="m", dataset="tatsu-lab/alpaca", held_out=5)
    task = data.load(options, seed=0)
    assert len(task.train) == 25 and len(task.held_out) == 5
    assert not set(task.train) & set(task.held_out)
    assert data.load(options, seed=0) == task
    assert data.load(options, seed=1) != task


def test_train_on_one_set_and_test_on_another(hub):
    import datasets

    rows = [{"prompt": "x", "completion": "y"}] * 3
    hub["me/mine", "small", "train"] = datasets.Dataset.from_list(rows)
    program = {"prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "f"}
    hub["openai/openai_humaneval", None, "test"] = datasets.Dataset.from_list([program])
    options = DataOptions(model="m", dataset="me/mine:small", eval_dataset="openai_humaneval")
    task = data.load(options, seed=0)
    assert task.form == prompts.HUMANEVAL
    assert len(task.train) == 3 and task.held_out[0].tests == "t\ncheck(f)\n"
    with pytest.raises(OptionsError, match="has no training side"):
        data.load(DataOptions(model="m", dataset="openai_humaneval"), seed=0)


def test_a_data_set_without_a_row(hub):
    import datasets

    empty = datasets.Dataset.from_dict({"prompt": [], "completion": []})
    hub["me/empty", None, "train"] = empty
    with pytest.raises(OptionsError, match=r"me/empty.*: holds no row"):
        data.load(DataOptions(model="m", dataset="me/empty"), seed=0)


HUMANEVAL = {"prompt": "def f():", "canonical_solution": "", "test": "", "entry_point": "f"}


@pytest.mark.parametrize(
    "row, change, message",
    [
        ({"prompt": "a", "completion": "b"}, {"completion": 3}, '"completion" is 3, expected text'),
        ({"question": "a", "answer": "b"}, {"answer": None}, '"answer" is None, expected text'),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": ["a"]},
            r'"instruction" is \[\'a\'\]',
        ),
        ({"instruction": "a", "response": "b"}, {"input": 5}, '"input" is 5'),
        (HUMANEVAL, {"prompt": "def f)"}, '"prompt" is .*expected the head of a Python function'),
    ],
)
def test_rows_that_do_not_fit_name_their_place(row, change, message, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row | change])
    options = DataOptions(model="m", train_file=str(path), eval_file=str(path))
    with pytest.raises(OptionsError, match=r"rows\.jsonl:2: " + message):
        data.load(options, seed=0)


# -- judges ----------------------------------------------------------------------------------------


def test_bleu_and_rouge():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = ["the cat sat on the mat", "it is so very good"]
    assert evaluators.bleu4(same, same) == pytest.approx(100)
    assert evaluators.rouge1(same, same) == pytest.approx(100)
    other = ["the cat sat on a hat", "no"]
    assert 0 < evaluators.bleu4(other, same) < 100
    # of six words four are met, of the other answer none: F = 4/6
    assert evaluators.rouge1(other, same) == pytest.approx(100 * (4 / 6) / 2)


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### -3.50", "-3.5"),
        ("#### $20.", "20"),
        ("The answer is 7 apples of 12.", "12"),
        ("about .5", "0.5"),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert evaluators.final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_exact_match():
    references = ["a\n#### 18", "b\n#### 2", "c\n#### 1,000", "no number"]
    answers = ["it is 18", "#### 3", "#### 1000.0", "no number"]
    assert evaluators.gsm8k_exact_match(answers, references) == 0.5


def test_programs_end_with_their_function():
    example = prompts.Prompted("def f(x):\n", "", "check(f)\n")
    answer = "    y = x\n\n    return y\n\nprint(f(3))\ndef g():\n    pass\n"
    program = evaluators.humaneval_program(example, answer)
    assert program == "def f(x):\n    y = x\n\n    return y\n\n"


@pytest.mark.parametrize("body, expected", [("    return x + 1\n", 1.0), ("    return x\n", 0.0)])
@pytest.mark.parametrize("doc", ["", '    """Add one."""\n'])
def test_pass_at_1(doc, body, expected):
    """Tests use what the prompt imports and defines, as HumanEval's do."""
    row = {
        "prompt": f"import math\ndef two():\n    return 2\n\ndef add(x):\n{doc}",
        "canonical_solution": "    return x + 1\n", "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1) == two() == math.ceil(add(0.5))\n",
    }  # fmt: skip
    assert evaluators.humaneval_pass_at_1([body], [prompts.humaneval(row)]) == expected


def test_answers_do_not_depend_on_their_batch(llama_folder, capsys):
    """Padding is on the left, and what the tokenizer and model were set to comes back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder).train()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    examples = [prompts.Prompted("write " * n + "the sum", "") for n in (1, 5, 9, 2)]
    options = {"max_length": 32, "max_new_tokens": 5}
    together = evaluators.write_answers(model, tokenizer, examples, batch_size=3, **options)
    assert "writing answers" not in capsys.readouterr().err
    options["progress"] = True
    alone = evaluators.write_answers(model, tokenizer, examples, batch_size=1, **options)
    assert "writing answers: 100%" in capsys.readouterr().err
    assert together == alone
    assert len(set(alone)) > 1
    assert tokenizer.padding_side == "right" and model.training


# -- programs --------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc"), reason="there is no /proc")
ADDS = "\ndef f(x):\n    return x + 1\n"
LOOKS = """
import gc, os, sys
seen = [open(f"/proc/{pid}/cmdline").read() for pid in ("self", os.getppid())] + sys.argv
frame = sys._getframe()
while frame:
    seen += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
seen += [o for o in gc.get_objects() if isinstance(o, str)]
assert not any("assert " + "f(1)" in text for text in seen)
"""
WRITES = """
import contextlib, os
for descriptor in range(20):
    with contextlib.suppress(OSError):
        os.write(descriptor, b'{"value": 2}' + bytes([10]))
os._exit(0)
"""


def runs(program, tests="assert f(1) == 2 and f(5) == 6", **options):
    pytest.importorskip("resource")
    return passes(program, tests, entry_point="f", memory_mb=512, **options)


@pytest.mark.parametrize(
    "program, expected",
    [
        (ADDS, True),
        ("import math\nprint(math.pi)" + ADDS, True),
        ("import os\nassert 'SECRET' not in os.environ" + ADDS, True),
        ("def f(x):\n    return x", False),
        ("def f(x):\n    return 2", False),
        ("assert False" + ADDS, False),
        ("syntax error", False),
        ("x = 1", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\ndef f(x):\n    os._exit(0)", False),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)" + ADDS, False),
        # Objects that equal everything are no plain data, and do not reach the tests.
        ("class C:\n    __eq__ = lambda *_: True\ndef f(x):\n    return C()", False),
        ("class C(int):\n    __eq__ = lambda *_: True\ndef f(x):\n    return C()", False),
        ("import builtins\nbuiltins.AssertionError = None\ndef f(x):\n    return 3", False),
        pytest.param(LOOKS + ADDS, True, marks=needs_proc),
        (WRITES, False),
        ("x = bytearray(1 << 31)" + ADDS, False),
        ("def f(x):\n    return 'x' * (1 << 28)", False),
        ("open('f', 'wb').write(b'x' * (2 << 20))" + ADDS, False),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", False),
    ],
)
def test_programs(program, expected, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert runs(program) is expected


def test_what_passes_between_tests_and_program():
    """Plain data keep their types, and exceptions theirs."""
    values = "[None, True, 3, 2.5, float('inf'), 1j, 'ä', (1, [2]), {3: {4}}, {frozenset({5})}]"
    tests = f"for v in {values}:\n    assert f(v) == v and type(f(v)) is type(v), v"
    assert runs("def f(x):\n    return x", tests)
    assert runs("def f(*, x):\n    yield from x", "assert tuple(f(x=[1, 2])) == (1, 2)")
    tests = "try:\n    f(1)\nexcept IndexError:\n    pass\nelse:\n    assert False"
    assert runs("def f(x):\n    return [][x]", tests)
    assert not runs(ADDS, tests)
    head = "import math\ndef half(x):\n    return x / 2\n"
    assert runs(head + "def f(x):\n    return half(x)", "assert f(3) == half(3)", head=head)


def test_the_judge_has_limits_too():
    """What a program returns could fill its memory."""
    tests = "import resource\nassert resource.getrlimit(resource.RLIMIT_AS)[0] == 512 << 20"
    assert runs(ADDS, tests)


@needs_proc
@pytest.mark.parametrize("hangs", [False, True])
def test_nothing_that_a_program_started_is_left(hangs, tmp_path):
    """Neither its child, nor one in another session, nor an orphan; and the wait is short."""
    program = f"""
import os, time
def start(leave, orphan=False):
    if os.fork() == 0:
        leave()
        if orphan and os.fork():
            os._exit(0)
        open(os.path.join({str(tmp_path)!r}, str(os.getpid())), "w").close()
        time.sleep(60)
start(lambda: None)
start(os.setsid)
start(os.setsid, orphan=True)
while len(os.listdir({str(tmp_path)!r})) < 3:
    time.sleep(0.01)
{"time.sleep(60)" if hangs else ""}
"""
    start = time.monotonic()
    assert runs(program + ADDS, seconds=2.0) is not hangs
    assert time.monotonic() - start < 4
    assert len(list(tmp_path.iterdir())) == 3
    assert not [path.name for path in tmp_path.iterdir() if _alive(int(path.name))]


def test_a_judge_that_is_stopped_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("hal_finetune.code_execution._GRACE", 0.5)
    start = time.monotonic()
    assert not runs("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)", seconds=0.5)
    assert time.monotonic() - start < 3


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
