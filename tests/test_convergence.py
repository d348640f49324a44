"""bench.convergence: what a run keeps, and the same task at another width."""

import json

import pytest
import torch
from finetune.tiny import save_model
from transformers import BertConfig, BertForSequenceClassification

from bench import convergence, report
from bench.widened import widened
from hal_finetune.data import Task
from hal_finetune.prompts import CLASSIFICATION
from hal_finetune.rows import Example


@pytest.fixture
def trained():
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=42, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().eval()
    with torch.no_grad():  # as trained: no bias is zero, no two LayerNorm scales are equal
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("size", "normalised"), [(48, True), (72, True), (40, False)])
def test_a_widened_model_computes_what_it_did(trained, size, normalised):
    ids = torch.randint(50, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [7], [3], [1]])).long()
    wide = widened(trained, size).double()
    shape = wide.bert.encoder.layer[0].intermediate.dense.weight.shape
    assert shape == (42 * size // 24, size)
    if not normalised:  # all that is not exact at a width that is no multiple
        for model in (trained, wide):
            for name, module in list(model.named_modules()):
                if isinstance(module, torch.nn.LayerNorm):
                    model.set_submodule(name, torch.nn.Identity())
    with torch.no_grad():
        expected = trained(ids, attention_mask=mask).logits
        found = wide(ids, attention_mask=mask).logits
    # Sums of a few hundred float64 terms in another order.
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("size", [16, 36])  # narrower; four and a half heads
def test_a_width_that_cannot_be_is_refused(trained, size):
    with pytest.raises(ValueError, match=f"hidden_size is {size}"):
        widened(trained, size)


@pytest.fixture
def few_examples(monkeypatch):
    texts = [Example(f"number {i} of some texts", i % 2) for i in range(64)]
    found = Task(CLASSIFICATION, "some texts", texts, texts[:16], ["even", "odd"])
    monkeypatch.setattr(convergence, "_examples", lambda task, data: found)


@pytest.mark.parametrize("method", ["full", "adalora", "spectral"])
def test_a_run_keeps_its_losses_and_what_would_show_a_blow_up(few_examples, method, tmp_path):
    save_model("bert", tmp_path)
    key = {"task": "stdlib", "method": method, "lr": 1e-4, "seed": 0, "steps": 6, "init_rank": 3}
    found = convergence.run(key | {"rank": 3}, str(tmp_path), None)
    assert len(found["losses"]) == len(found["seconds"]) == 6
    assert 0 <= found["accuracy"] <= 1
    assert ("course" in found) == (method == "spectral")
    if method == "spectral":  # singular values grow
        lams = [state["lam"] for state in found["course"]]
        assert lams[-1] > 0 and all(state["penalty"] >= 0 for state in found["course"])


def test_a_task_that_needs_data_says_so():
    with pytest.raises(SystemExit, match="--data is needed: the folder of sst2_train"):
        convergence._examples("sst2", None)


def test_questions_by_the_calculations_of_their_answers(tmp_path):
    answers = ["a", "<<1+1=2>>2", "<<1+1=2>> <<2+1=3>> <<3+1=4>>4", "<<1=1>>" * 7]
    for name in convergence.GSM8K_FILES:
        rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = convergence._examples("gsm8k", tmp_path)
    assert [(e.text, e.label) for e in found.train] == [("q0", 0), ("q1", 0), ("q2", 1), ("q3", 2)]
    assert [e.label for e in found.held_out] == [0, 0, 1, 2]
    assert found.label_names == ["2", "3", "4"]


def test_a_table_of_steps_and_of_the_seconds_that_are_known(monkeypatch):
    def row(method, seed, drop, seconds):
        losses = [1.0] * drop + [0.0] * (60 - drop)  # the mean of 20 is 0.5 ten steps later
        return {"method": method, "lr": 1e-3, "seed": seed, "losses": losses,
                "seconds": seconds and [seconds] * 60, "accuracy": 0.5}  # fmt: skip

    found = [row("b", 0, 10, None), row("b", 1, 20, 2.0), row("a", 0, 50, 0.5)]
    found.append(row("c", 0, 10, None))
    monkeypatch.setattr(report, "rows", lambda name, **wanted: found)
    table = report.convergence(targets=(0.5, 0.25))
    body = [[cell.strip() for cell in line.split("|")[3:-3]] for line in table.split("\n")[2:-1]]
    assert body == [
        ["0", "60", "–", "30.0, –"],
        ["0, 1", "20, 30", "25, 35", "60.0, 70.0"],  # of seed 1 alone
        ["0", "20", "25", "–, –"],
    ]
    for own in found:
        own["seconds"] = None
    assert "seconds" not in report.convergence(targets=(0.5,))
