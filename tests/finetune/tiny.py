"""A tokenizer of some words and characters, built here: no hub is asked."""

import json

WORDS = [
    "the", "a", "film", "plot", "was", "is", "good", "bad", "great", "awful", "fine", "dull",
    "it", "this", "and", "so", "very", "question", "answer", "number", "add", "two", "three",
    "four", "five", "sum", "of", "below", "instruction", "response", "what", "how", "write",
    "describe",
]  # fmt: skip


def build_tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", *WORDS]
    pieces += [c for c in map(chr, range(33, 127)) if c not in pieces]
    model = models.WordLevel({word: i for i, word in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        model_max_length=64, **special,
    )  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
