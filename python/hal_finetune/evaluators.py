"""Judge written answers: BLEU-4, ROUGE-1, GSM8K's exact match, HumanEval's pass@1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from transformers.utils.logging import tqdm

from .code_execution import passes
from .prompts import GSM8K, HUMANEVAL, Prompted, encode

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
# Where a HumanEval answer ends: the next thing at the margin.
_AFTER_FUNCTION = re.compile(r"\n(?=class |def |@|if |print|#|import |from |assert )")


def bleu4(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of up to 4-grams (sacrebleu's, tokenizer 13a), 0 to 100."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), [list(references)]).score)


def rouge1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-1 (rouge-score's, without stemming), 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"])
    pairs = zip(references, answers, strict=True)
    scores = [scorer.score(reference, answer)["rouge1"].fmeasure for reference, answer in pairs]
    return 100 * sum(scores) / len(scores)


def final_number(text: str) -> Decimal | None:
    """GSM8K: the number after the last ``####``; without one, the last number there is."""
    _, marked, after = text.rpartition("####")
    found = _NUMBER.findall(after if marked else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def gsm8k_exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers whose final number is the reference's."""
    matches = [
        (number := final_number(reference)) is not None and final_number(answer) == number
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(matches) / len(matches)


def humaneval_program(example: Prompted, answer: str) -> str:
    """The function a model completed, up to the next statement at the margin."""
    body = _AFTER_FUNCTION.split("\n" + answer, maxsplit=1)[0][1:]
    return f"{example.prompt}{body}\n"


def humaneval_pass_at_1(answers: Sequence[str], examples: Sequence[Prompted]) -> float:
    """Share of programs that pass their tests, with one answer for each. Runs them."""
    passed = [
        passes(
            humaneval_program(example, answer),
            example.tests,
            entry_point=example.entry_point,
            head=example.head,
        )
        for example, answer in zip(examples, answers, strict=True)
    ]
    return sum(passed) / len(examples)


def judge(
    form: str, answers: Sequence[str], examples: Sequence[Prompted], *, allow_code_execution: bool
) -> dict[str, float]:
    """The metrics of a generation task. HumanEval's needs leave to run what the model wrote."""
    references = [example.answer for example in examples]
    metrics = {"bleu4": bleu4(answers, references), "rouge1": rouge1(answers, references)}
    if form == GSM8K:
        metrics["exact_match"] = gsm8k_exact_match(answers, references)
    if form == HUMANEVAL and allow_code_execution:
        metrics["pass_at_1"] = humaneval_pass_at_1(answers, examples)
    return metrics


@torch.no_grad()
def write_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Prompted],
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answers. Prompts over `max_length` tokens lose their beginning.

    The model's mode, and the tokenizer's sides of padding and of cutting, are put back.
    """
    sides = tokenizer.padding_side, tokenizer.truncation_side
    training = model.training
    model.eval()
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    # Prompts of about equal length together: little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    answers = [""] * len(examples)
    try:
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="writing answers", disable=not progress):
            chosen = order[start : start + batch_size]
            ids = encode(
                tokenizer, [examples[i] for i in chosen], truncation=True, max_length=max_length
            )
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
            written = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(
                written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = sides
        model.train(training)
    return answers
