"""JSON lines of labelled text: what is read, and what is refused by file and line."""

import gzip
import json

import pytest

from hal_finetune import rows
from hal_finetune.data import load
from hal_finetune.options import DataOptions, OptionsError


def read(train, held_out):
    return load(DataOptions(train_file=str(train), eval_file=str(held_out)), seed=0)


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
        tmp_path / f"train.{suffix}", {key: "good", "label": 10, "idx": 7}, {key: "bad", "label": 9}
    )
    dev = _jsonl(tmp_path / f"dev.{suffix}", {key: "fine", "label": 10})
    data = read(train, dev)
    assert data.label_names == ["9", "10"]
    assert [(e.text, e.pair, e.label) for e in data.train] == [("good", None, 1), ("bad", None, 0)]
    assert [(e.text, e.label) for e in data.held_out] == [("fine", 1)]


def test_jsonl_of_sentence_pairs_with_text_labels(tmp_path):
    train = _jsonl(
        tmp_path / "train.jsonl",
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"},
        {"sentence1": "It rains.", "sentence2": "It is dry.", "label": "contradiction"},
    )
    data = read(train, train)
    assert data.label_names == ["contradiction", "entailment"]
    assert (data.held_out[0].text, data.held_out[0].pair, data.held_out[0].label) == (
        "It rains.",
        "It is wet.",
        1,
    )


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
    monkeypatch.setattr(rows, "LINE", 500 if "without end" in case else rows.LINE)
    line, message = BAD_FILES[case]
    (tmp_path / "train.jsonl").write_text(GOOD + line, errors="surrogateescape")
    dev = _jsonl(tmp_path / "dev.jsonl", {"text": "c", "label": 0})
    with pytest.raises(OptionsError) as error:
        read(tmp_path / "train.jsonl", dev)
    assert message in str(error.value)


def test_jsonl_with_unknown_held_out_label_or_one_label_or_nothing(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(GOOD)
    odd = _jsonl(tmp_path / "odd.jsonl", {"text": "c", "label": 2})
    with pytest.raises(OptionsError, match=r"odd\.jsonl:1: label 2 does not occur in .*train"):
        read(train, odd)
    with pytest.raises(OptionsError, match="at least two different labels, found 2"):
        read(odd, odd)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(OptionsError, match=r"empty\.jsonl: holds no line"):
        read(tmp_path / "empty.jsonl", odd)


def test_jsonl_as_windows_writes_it(tmp_path):
    """With a byte order mark, and with carriage returns."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    data = read(path, path)
    assert [(e.text, e.label) for e in data.train] == [("a", 0), ("b", 1)]


PACKED = gzip.compress(GOOD.encode() * 99, mtime=0)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08", GOOD.encode(), PACKED[:-6], PACKED[:20] + b"\xff" * 9 + PACKED[29:]],
)
def test_broken_gzip_is_a_clear_error(tmp_path, content):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(OptionsError, match=r"train\.jsonl\.gz(:1)?: "):
        read(path, path)
