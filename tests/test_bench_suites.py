"""The suites that reproduce the paper's tables: their checks can fail, their rows stay."""

import dataclasses
import json
import re
import sys
import weakref

import pytest
import torch

from bench import (
    compare,
    memory,
    methods,
    models,
    pages,
    rows,
    similarity,
    table7,
    training_step,
    training_time,
)
from bench.methods import ALL_METHODS


def tiny_roberta():
    return models.roberta_base(layers=2, width=64, vocabulary=60_000, length=64)


def test_all_methods_share_the_frozen_weights_and_pass_the_checks():
    base = tiny_roberta()
    found = training_step.measure(base, ALL_METHODS, batch=2, length=8, repeats=2, warmup=1)
    assert list(found) == list(ALL_METHODS)
    assert len({round(result["first_loss"], 4) for result in found.values()}) == 1
    assert all(result["step"]["median_ms"] > 0 for result in found.values())


def test_a_method_that_is_not_the_identity_writes_no_speed(monkeypatch):
    build = training_step.Method.step

    def wrong(self, batch):
        seconds = build(self, batch)
        self.logits = self.logits + torch.tensor([1.0, 0.0]) * (self.name == "hal-direct")
        return seconds

    monkeypatch.setattr(training_step.Method, "step", wrong)
    with pytest.raises(SystemExit, match="hal-direct starts at loss"):
        training_step.measure(
            tiny_roberta(), ["frozen", "hal-direct"], batch=2, length=8, repeats=1, warmup=0
        )


@pytest.mark.parametrize("loss", [0.8, float("nan")])
def test_a_loss_that_rises_is_seen(loss):
    training_step.check_end({"lora": 0.7}, {"lora": 0.69}, 1e-4)
    with pytest.raises(SystemExit, match="lora: the loss of the batch went"):
        training_step.check_end({"lora": 0.7}, {"lora": loss}, 1e-4)


def test_models_of_real_shapes():
    """Parameters without the heads, as published: 124.6 M, 183.8 M, 7.5 B, 7.07 B, 14.0 B."""
    sizes = {name: base().parameters / 1e9 for name, base in models.BASES.items()}
    assert sizes == pytest.approx(
        {
            "roberta-base": 0.1246, "deberta-v3-base": 0.1844, "llama-3.1-8b": 7.505,
            "qwen2.5-7b": 7.071, "qwen2.5-14b": 13.99,
        },
        rel=5e-3,
    )  # fmt: skip


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(
        models.psutil, "virtual_memory", lambda: type("M", (), {"available": 2**30})
    )
    models.roberta_base().require_memory(torch.device("cpu"))
    with pytest.raises(
        SystemExit, match=r"llama-3.1-8b: the weights need 14.0 GiB in torch.bfloat"
    ):
        models.llama_31_8b().require_memory(torch.device("cpu"))


def test_table7_keeps_what_ran_out_of_memory_out_of_the_timing(tmp_path, monkeypatch):
    peaks = {"frozen": {"peak_mb": 1.0}, "dora": {"out_of_memory": True}, "lora": {"peak_mb": 2.0}}
    asked = []

    def measure(base, methods, batch, *rest):
        asked.append((batch, methods))
        if batch == 2:
            raise KeyboardInterrupt  # what is measured by then stays
        step = {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0}
        return {n: {"step": step, "first_loss": 1.0, "last_loss": 0.5} for n in methods}

    monkeypatch.setattr(table7, "peaks", lambda *rest: {n: dict(p) for n, p in peaks.items()})
    monkeypatch.setattr(table7, "measure", measure)
    arguments = ["table7", "--batch", "1", "2", "--method", *peaks, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyboardInterrupt):
        table7.main()
    assert asked == [(1, ["frozen", "lora"]), (2, ["frozen", "lora"])]
    (row,) = map(json.loads, (tmp_path / "table7.jsonl").read_text().splitlines())
    assert row["methods"]["dora"] == {"out_of_memory": True}
    assert row["methods"]["lora"]["peak_mb"] == 2.0
    assert row["methods"]["lora"]["step"]["median_ms"] == 3.0


@pytest.mark.parametrize("name", ["adalora", "hal-spectral"])
def test_captured_steps_must_leave_the_same_gradients(name, monkeypatch):
    """What is captured is called with a batch's tensors alone; phases are not told apart in it."""
    cpu, base = torch.device("cpu"), tiny_roberta()
    batch = methods.batch_of(2, 8, cpu)
    one, other = (methods.Method(name, base.build(cpu), base, cpu, phases=False) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, *_, **__: module)
    one.capture(batch)
    for _ in range(2):
        assert [*one.step(batch)] == [*other.step(batch)] == ["step"]
    assert torch.equal(one.logits, other.logits)
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables",
        lambda module, *_, **__: lambda *batch: tuple(1.01 * t for t in module(*batch)),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"a captured gradient has relative error 1\.0e-02"):
        other.capture(batch)


@pytest.mark.parametrize("gpu", [True, False])
def test_peak_memory_is_that_of_one_method_at_a_time(gpu, monkeypatch):
    """On a GPU of the allocator, in one process; what was built before is gone by then."""
    cpu, base = torch.device("cpu"), tiny_roberta()
    alive, log = [], []

    def method(name, model, base, device, **options):
        made = methods.Method(name, model, base, cpu, **options)
        log.append((name, sum(ref() is not None for ref in alive)))
        alive.append(weakref.ref(made.model))
        return made

    def in_own_process(module, *arguments):
        log.append(arguments)
        return {"peak_mb": 1.0}

    monkeypatch.setattr(memory, "Method", method)
    monkeypatch.setattr(memory, "in_own_process", in_own_process)
    monkeypatch.setattr(memory, "batch_of", lambda *sizes: methods.batch_of(*sizes[:2], cpu))
    if not gpu:
        base = dataclasses.replace(base, checkpointing=True)
        assert memory.peaks(base, ["lora"], 2, 8) == {"lora": {"peak_mb": 1.0}}
        options = "--model roberta-base --layers 2 --batch 2 --length 8 --gradient-checkpointing"
        assert log == [("--method", "lora", *options.split())]
        return
    monkeypatch.setattr(memory, "this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(models.Base, "build", lambda base, device, build=base.build: build(cpu))
    for name, value in (
        ("empty_cache", None), ("reset_peak_memory_stats", None), ("max_memory_reserved", 2**21),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(memory, "peak_memory_mb", lambda: 1.0)
    found = memory.peaks(base, ["lora", "adalora", "hal-spectral", "hal-hyper"], 2, 8)
    assert all(peak == {"peak_mb": 1.0, "reserved_mb": 2.0} for peak in found.values())
    assert log == [(name, 0) for name in found]
    monkeypatch.setattr(methods.Method, "step", lambda *_: exec("raise torch.OutOfMemoryError"))
    assert memory.peaks(base, ["lora"], 2, 8) == {"lora": {"out_of_memory": True}}


def a_layer(generator):
    shapes = ((3, 8), (3,), (3, 6))
    return similarity.Directions(*(torch.randn(s, generator=generator) for s in shapes))


def test_similarity_ignores_order_and_signs_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    one, other = a_layer(generator), a_layer(generator)
    same = similarity.matched(one, similarity.shuffled(one))
    assert same == pytest.approx(dict.fromkeys(similarity.PARTS, 1.0))
    assert similarity.as_they_stand(one, similarity.shuffled(one))["P"] < 0.9
    assert max(abs(v) for v in similarity.matched(one, other).values()) < 0.95
    flipped = one._replace(lam=-one.lam)
    assert similarity.matched(one, flipped)["Λ"] == pytest.approx(-1)
    with pytest.raises(SystemExit, match=r"different layers: \['b'\]"):
        similarity.compare({"a": one}, {"a": one, "b": other})


def test_dylora_truncates_while_it_trains_and_not_afterwards():
    torch.manual_seed(0)
    base = tiny_roberta()
    model = methods.build("dylora", base.build(torch.device("cpu")), base.targets, base.head)
    rows = methods.batch_of(2, 8, torch.device("cpu"))
    layer = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
    seen = []
    layer.register_forward_hook(lambda m, args, h: seen.append((h != 0).any(1).any(0).tolist()))
    for _ in range(20):
        model.train()(**rows)
    kept = {tuple(found) for found in seen}
    assert kept == {(True, False, False), (True, True, False), (True, True, True)}
    model.eval()(**rows)
    assert seen[-1] == [True, True, True]
    while all(seen[-1]):
        model.train()(**rows)
    model.eval().base_model.model(**rows)  # as generate() does, past the whole model's hooks
    assert seen[-1] == [True, True, True]


def test_text_is_split_at_line_feeds_alone(tmp_path):
    rows = [{"t": "a\u2028b"}, {"t": "c"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "made_up.jsonl").write_text(lines, encoding="utf-8")
    found = training_time.text_of(tmp_path, "made_up", lambda row: row["t"])
    assert bytes(found.tolist()).decode() == "a\u2028bc"
    with pytest.raises(SystemExit, match=r"there is no other.jsonl \(or .gz\) in"):
        training_time.text_of(tmp_path, "other", str)


def test_seconds_to_a_loss_count_the_steps_until_it_is_reached():
    window = training_time.WINDOW
    run = {"losses": [2.0] * window + [0.0] * window, "seconds": [0.5] * 2 * window, "held_out": 1}
    found = training_time.outcome([run], target=1.0)
    assert found["to_target"] == 0.5 * (window + window // 2)
    assert found["in_all"] == window and found["final"] == 0.0
    assert (
        training_time.outcome([run, run | {"losses": [2.0] * 2 * window}], 1.0)["to_target"] is None
    )
    rows = [{"methods": {"lora": run | {"lr": lr, "losses": [lr] * 2 * window}}} for lr in (2, 1)]
    assert training_time.best(rows)["lora"][0]["lr"] == 1
    # All of AdaLoRA's runs reach the default target, though not all end as low.
    runs = {"lora": [run], "adalora": [run, run | {"losses": [2.0] * window + [1.5] * window}]}
    assert training_time.default_target(runs) == 1.5
    assert training_time.outcome(runs["adalora"], 1.5)["to_target"] is not None


def test_training_time_in_small(tmp_path, monkeypatch):
    row = {"question": "one and one? " * 9, "answer": "two", "instruction": "add", "input": ""}
    for name in ("gsm8k_train", "gsm8k_test", "alpaca_8k", "alpaca_heldout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"output": "sum" * 60}))
    arguments = ["--quick", "--method", "lora", "--data", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["training_time", *arguments])
    monkeypatch.setattr(training_time, "BATCH", 2)
    training_time.main()
    (row,) = map(json.loads, (tmp_path / "training_time.jsonl").read_text().splitlines())
    lora = row["methods"]["lora"]
    assert len(lora["losses"]) == len(lora["seconds"]) == training_time.WINDOW + 5
    assert lora["held_out"] < lora["losses"][0]  # the task's text, as the training side's


def test_compare_takes_what_both_measured():
    rounds = [
        {"this": {"a": 1.0, "new": 1.0}, "other": {"a": 4.0, "old": 1.0}},
        {"this": {"a": 3.0, "new": 1.0}, "other": {"a": 4.0, "old": 1.0}},
    ]
    assert compare.combined(rounds) == {
        "a": {
            "this_ms": 2.0, "this_range": [1.0, 3.0], "other_ms": 4.0, "other_range": [4.0, 4.0],
            "ratio": 0.5,
        }
    }  # fmt: skip


def test_compare_reports_nothing_of_a_suite_that_fails(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/step.py").write_text("raise SystemExit('lora starts at loss 2')")
    with pytest.raises(SystemExit, match=r"bench.step failed in .*\nlora starts at loss 2"):
        compare.measured(tmp_path, "step", [])
    with pytest.raises(SystemExit, match="git rev-parse"), compare.worktree("no-such-revision"):
        pass


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A made-up folder of results; what is called adds a row to it."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    machine = {
        "time": "2000-01-01", "cpu": "made up", "threads": 1, "torch": "2", "peft": "0",
        "commit": "0" * 40, "command": "python -m bench.made_up",
    }  # fmt: skip

    def add(name, row, **changed):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row | {"machine": machine | changed}) + "\n")

    return add


def made_up_rows(add):
    step = {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 12.0}
    both = {"adalora": {"step": step, "peak_mb": 100.0}}
    both["hal-hyper"] = {"step": step | {"median_ms": 9.0}, "peak_mb": 90.0}
    table7 = {"model": "roberta-base", "layers": None, "length": 128, "checkpointing": False}
    for batch in (1, 2):
        add(
            "table7", table7 | {"batch": batch, "methods": both | {"dora": {"out_of_memory": True}}}
        )
    axis = {"axis": "rank", "label": "rank", "title": "made up"}
    for value in (1, 4):
        add("scaling", axis | {"value": value, "methods": both})
    run = {"task": "sst2", "model": "tiny", "steps": 9}
    for gamma in (0.0, 0.1):
        own = {"lr": 1e-4, "gamma": gamma, "seed": 0, "accuracy": 0.5, "loss": 0.7}
        add("gamma", run | own | {"seconds": 3.0, "orthogonality": 0.1})
    parts = dict.fromkeys(similarity.PARTS, 0.25)
    kinds = dict.fromkeys(("matched", "as they stand", "chance"), parts)
    add("similarity", run | {"peer": "adalora", "lr": {}, "seed": 0, "similarity": kinds})
    curve = {"losses": [2.0] * 30, "seconds": [0.1] * 30, "held_out": 2.0, "lr": 1e-3}
    text = {"task": "alpaca", "seed": 0, "steps": 30, "base_steps": 1, "lr_scale": 1.0}
    text_run = {
        "task": "alpaca", "model": "Llama-3.1-8B", "steps": 30, "held_out": 4, "new_tokens": 8,
        "lr": 1e-3, "last_loss": 1.0,
    }  # fmt: skip
    slow = curve | {"seconds": [0.2] * 30}
    add("training_time", text | {"methods": {"hal-hyper": curve, "adalora": slow}})
    own = {"method": "hyper", "rank": 3, "seed": 0, "accuracy": 0.5}
    add("convergence", run | curve | own)
    for method, score in (("adalora", 2.0), ("hal-hyper", 3.0)):
        for seed in (0, 1):
            scores = {"bleu4": score + seed, "rouge1": 10.0}
            add("quality", text_run | {"method": method, "seed": seed, "scores": scores})
    times = {"hal": {"median_us": 5.0}}
    operator = {"operator": "svd_linear", "size": "r=3", "times": times, "floor_share": 0.5}
    add("operators", operator | {"errors": {"hal": 1e-7}})


def test_every_page_is_written_from_rows_and_told_when_old(results, tmp_path):
    out = tmp_path / "pages"
    assert pages.write(out) == []  # no rows, no page
    made_up_rows(results)
    names = [f"docs/results/{name}.md" for name in pages.PAGES]
    assert pages.write(out, check=True) == names and not out.exists()
    assert pages.write(out) == names and pages.write(out, check=True) == []
    for page in out.glob("*.md"):
        for plot in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (out / plot).stat().st_size > 10_000
    assert "| 2 | 100 / 10.0 | 90 / 9.0 | out of memory |" in (out / "table7.md").read_text()
    line = "| hal-hyper | 0.001 | 2 | 1 [1–1] | 3.5 [3–4] | 10 [10–10] |"
    assert line in (out / "quality.md").read_text()
    results("gamma", {"task": "new", "model": "tiny", "steps": 9} | dict.fromkeys(
        ("lr", "gamma", "seed", "accuracy", "loss", "seconds", "orthogonality"), 0.5
    ))  # fmt: skip
    assert pages.write(out, check=True) == ["docs/results/gamma.md"]


def test_quick_rows_are_no_results(results):
    results("gamma", {"a": 1})
    results("gamma", {"a": 2}, command="python -m bench.gamma --quick")
    assert [row["a"] for row in rows.rows("gamma")] == [1]


def test_beside_the_paper_is_what_was_measured_or_says_that_nothing_was(results):
    assert set(re.findall(r"\| ([^|]*) \|\n", pages.beside_the_paper())) == {
        "here", "---", pages.NOT_MEASURED
    }  # fmt: skip
    made_up_rows(results)
    found = pages.beside_the_paper()
    for line in (
        "| ms a step, batch 2 | 0.896 | 0.900 |",
        "| peak memory, batch 4 | 0.989 | not measured |",
        "| cosine of P | 0.986 | 0.250 (chance: 0.250) |",
        "| seconds of a whole run, Alpaca | 0.818 | 0.500 (for the same number of steps) |",
        "| BLEU-4, alpaca, LLaMA3.1-8B | 1.001 | 1.400 |",
        "| pass@1, humaneval, LLaMA3.1-8B | 1.000 | not measured |",
    ):
        assert line in found


def test_all_methods_scale_alike():
    """ΔW is α / r times its factors, whatever a method calls α and r."""
    base = models.roberta_base(layers=1, width=64)
    found = {}
    for name in ("lora", "dora", "adalora", "hal-direct", "hal-hyper"):
        model = methods.Method(
            name, base.build(torch.device("cpu")), base, torch.device("cpu")
        ).model
        if name.startswith("hal"):
            found[name] = set(model.hal.scalings)
            continue
        layers = [m for m in model.modules() if hasattr(m, "lora_A")]
        found[name] = {
            m.scaling["default"] / (m.ranknum["default"].item() if name == "adalora" else 1)
            for m in layers
        }
    # AdaLoRA adds 1e-5 to its number of directions
    assert all(s == pytest.approx(8 / 3, rel=1e-5) for own in found.values() for s in own), found
    assert all(found.values())
