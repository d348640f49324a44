"""The benchmarks' own judgement: budgets that can be missed, tables that can be old."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import (
    common,
    goals,
    host,
    launches,
    least,
    models,
    operator_cases,
    operators,
    replay,
    report,
)  # fmt: skip
from hal_kernels.kernels import configs

ROOT = Path(__file__).parent.parent


def results(**changes):
    """Counts within their budgets, the same at two depths, but for `changes` at the second."""
    parts = dict.fromkeys(launches.BUDGET, 1.0)
    parts |= {"importance and allocation: host synchronisations": 0, "advancing the state": 1}
    changed = parts | {part.replace("_", " "): n for part, n in changes.items()}
    methods = ("hal-direct", "hal-spectral", "hal-hyper")
    return {"2": dict.fromkeys(methods, parts), "12": dict.fromkeys(methods, changed)}


def test_launches_within_budget():
    assert launches.missed(results(), "roberta") == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"penalty_forward": 3}, "penalty forward: 3 > 2"),
        ({"penalty_backward": 0.5}, "penalty backward: 1 becomes 0.5 with depth"),
        ({"advancing_the_state": 2}, "advancing the state: 1 becomes 2 with depth"),
        ({"importance_and_allocation:_host_synchronisations": 1}, "waits for the device"),
    ],
)
def test_launches_beyond_budget(changes, message):
    found = launches.missed(results(**changes), "roberta")
    assert any(message in line for line in found)


def test_host_time_is_that_of_the_cuda_operators():
    """With launches counted; afterwards the CPU's operators serve again."""
    model = host.layers_of("hal-spectral")
    x = torch.randn(8, host.WIDTH)
    before = model(x)
    found = host.measured({"ours": host.pass_of("hal-spectral")}, repeats=3, parts=32)["ours"]
    assert found["launches"] == pytest.approx(4, abs=0.5)
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert min(host.modelled(found)) > 4 * host.LAUNCH_US * 1e-6
    assert torch.equal(model(x), before)


def test_launches_are_counted_from_the_triton_implementations():
    """One patched layer, one forward: what bench.launches sees is what would be launched."""
    from hal_kernels.ops import svd_adapter_add

    x = torch.randn(128, 64)
    p, lam, q = torch.randn(3, 64), torch.randn(3), torch.randn(3, 64)
    found = launches.counted(lambda: svd_adapter_add(x, x, p, lam, q))
    assert dict(found.counts) == {"svd_linear: shrink_kernel": 1, "svd_linear: expand_kernel": 1}
    assert found.syncs == 0
    assert launches.counted(lambda: (x + 1).t()[0, 0].item()).total == 1


@pytest.mark.parametrize("check", [False, True])
def test_every_operator_is_measured_beside_its_floor(check):
    from hal_kernels.ops._library import TRITON

    cases = list(operator_cases.cases(torch.device("cpu"), quick=True, check=check))
    timed = {n for n in TRITON if not n.endswith("_backward")}
    assert {c.operator for c in cases} == timed | {"svd_adapter_add", "svd_linear_penalty"}
    assert all(c.floor.moved > 0 for c in cases)


def test_a_wrong_operator_is_seen():
    """Its output, or one gradient; and a check at a real size is what is timed."""
    (case,) = (
        c for c in operator_cases.cases(torch.device("cpu"), quick=True, check=True)
        if c.operator == "orthogonality_penalty"
    )  # fmt: skip
    assert operators.error(case.ours, case, None) < 1e-5
    off = lambda i: case.ours(i) * 1.01  # noqa: E731
    for wrong in (off, lambda i: off(i) - 0.01 * case.ours(i).detach()):
        assert operators.error(wrong, case, None) > 5e-3
    with pytest.raises(SystemExit, match=r"orthogonality_penalty .*: relative error"):
        wrong = dataclasses.replace(case, ours=off)
        operators.measure(wrong, torch.device("cpu"), compiled=False, budget_s=0.0)
    found = operators.measure(case, torch.device("cpu"), compiled=False, budget_s=0.0)
    assert found["bytes"] == case.floor.moved and found["floor_us"] > 0
    assert found["floor_share"] == found["floor_us"] / found["times"]["hal"]["median_us"]


@pytest.mark.slow  # the cases themselves: test_every_operator_is_measured_beside_its_floor
def test_operators_under_pytest_benchmark(tmp_path):
    """In a process of its own, timed once: its file holds every implementation."""
    out = tmp_path / "found.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "svd_adapter_add",
        "bench/pytest_operators.py", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1",
        f"--benchmark-json={out}",
    ]  # fmt: skip
    # As a worker of pytest-xdist it would time nothing.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {b["name"].split("float32-")[1] for b in found} == {"hal]", "eager]"}


def test_a_wrong_spectral_step_is_seen():
    """It works in place: each call starts from the same tensors, until it is timed."""
    (case,) = (
        c for c in operator_cases.cases(torch.device("cpu"), quick=True, check=True)
        if c.operator == "spectral_step_"
    )  # fmt: skip
    before = {name: t.clone() for name, t in case.inputs.items()}

    def off(i):
        i["momentum_q0"] *= 1.01
        return case.ours(i)

    for _ in range(2):
        assert operators.error(case.ours, case, None) < 1e-5
        assert operators.error(off, case, None) > 1e-3
    assert all(torch.equal(t, before[name]) for name, t in case.inputs.items())
    step = operators.trained(case.ours, case)
    (lam, *_), (later, *_) = (t[1:] for t in ([*step()], [*step()]))
    assert lam is later and not torch.equal(lam, before["lam"])


@pytest.fixture
def faked_gpu(monkeypatch):
    """What is asked of a GPU to take times, by name; an interval lasts 24 µs."""
    log = []

    def noted(name, result=None):
        return lambda *args, **_: log.append(name) or result

    event = SimpleNamespace(
        record=noted("event"), synchronize=noted("wait"), elapsed_time=lambda stop: 0.024
    )
    graph = SimpleNamespace(replay=noted("replay"))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(log.append("in")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    empty = SimpleNamespace(zero_=noted("flush"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty)
    return log


def test_kernels_are_timed_by_replays_of_launches_that_take_turns(faked_gpu):
    runs = [lambda n=n: faked_gpu.append(n) for n in range(3)]
    found = replay.replayed(runs, torch.device("cuda"))
    taken = ["event", "replay", "event", "wait"] * (replay.REPLAYS + 3)
    assert faked_gpu == [0, 1, 2, "in", *[0, 1, 2] * (replay.LAUNCHES // 3), *taken]
    assert found["median_us"] == pytest.approx(24 / replay.LAUNCHES)


def test_operators_are_timed_behind_a_sleep_of_the_gpu(faked_gpu):
    steps = {"hal": lambda: faked_gpu.append("step")}
    found = operators.time_all(steps, torch.device("cuda"), 0.0)
    assert faked_gpu == ["step"] * 3 + ["flush", "sleep", "event", "step", "event", "wait"] * 5
    assert found["hal"]["median_us"] == pytest.approx(24) and found["hal"]["repeats"] == 5


@pytest.mark.parametrize("launched", range(4))
def test_kernels_of_the_spectral_step_are_left_out_from_the_end(launched):
    kernels = replay.SPECTRAL[:launched]
    before = {name: getattr(replay.spectral_kernels, f"{name}_kernel") for name in replay.SPECTRAL}
    with replay.launching(kernels):
        for name, kernel in before.items():
            now = getattr(replay.spectral_kernels, f"{name}_kernel")
            assert (now is kernel) == (name in kernels)
            if now is not kernel:
                now[(1,)](1, R=8)
    assert all(getattr(replay.spectral_kernels, f"{n}_kernel") is k for n, k in before.items())


def test_rows_of_all_suites_may_share_a_file(tmp_path):
    folder, file = tmp_path / "rows", tmp_path / "all.jsonl"
    for out in (folder, file):
        for suite in ("one", "other"):
            common.append_row(suite, {"a": 1}, out)
            common.append_row(suite, {"a": 2}, out)
    assert sorted(path.name for path in folder.iterdir()) == ["one.jsonl", "other.jsonl"]
    assert len(file.read_text().splitlines()) == 4
    with (folder / "one.jsonl").open("a") as old:
        old.write('{"a": 1}\n')  # rows did not always name their suite
    assert [row["suite"] for row in common.stored("one", file, {"a": 1})] == ["one"]
    assert [row["suite"] for row in common.stored("one", folder, {"a": 1})] == ["one", "one"]
    assert common.stored("none", file, {}) == []


def test_least_time_of_a_step(monkeypatch):
    """By launches where those take longer, by products of the layers else."""
    few, parts = ({"lora": {least.TOTAL: count}} for count in (1000, 2000))
    asked = []

    def counts(name, model):
        asked.append(model)
        return [{"parts": {"2": few, "12": parts}}] if model == "roberta" else []

    monkeypatch.setattr(least, "rows_of", counts)
    monkeypatch.setattr(least, "rates", lambda device, dtype: (1e6, 1e8))
    flops = 12 * 2 * 128 * (4 * 768 * 768 + 2 * 768 * 3072)
    products = flops / 1e8 / 1e3
    base, deep = models.roberta_base(), models.roberta_base(layers=22)
    both = ("frozen", "lora")
    found = least.least_ms(base, both, 1, 128)
    assert found == pytest.approx({"frozen": products, "lora": 2 * products})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = dataclasses.replace(configs.DEFAULT, launch_us=1e4)
    with configs.using(gpu):
        assert least.least_ms(base, ["lora"], 1, 128)["lora"] == pytest.approx(2000 * 1e4 / 1e3)
        assert least.least_ms(deep, ["lora"], 1, 128)["lora"] == pytest.approx(3000 * 1e4 / 1e3)
        again = dataclasses.replace(models.llama_31_8b(layers=1), checkpointing=True)
        assert least.least_ms(again, ["lora"], 1, 1)["lora"] == pytest.approx(
            3 * 2 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) / 1e8 / 1e3
        )
    assert asked[-1] == "llama"


def test_tables_are_rewritten_in_place(monkeypatch):
    monkeypatch.setitem(report.TABLES, "made-up", lambda: "| a |\n| --- |\n| 1 |\n")
    text = "before\n<!-- table made-up -->\nold\n<!-- end -->\nafter\n"
    new = report.updated(text)
    assert new == text.replace("old\n", "| a |\n| --- |\n| 1 |\n")
    assert report.updated(new) == new
    with pytest.raises(SystemExit, match="no table 'unknown'"):
        report.updated("<!-- table unknown -->\n<!-- end -->")


def gpu_sh(*arguments, environment=os.environ | {"PYTHON": sys.executable}):
    environment = environment | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [ROOT / "bench/gpu.sh", *arguments], capture_output=True, text=True, env=environment
    )


NOTHING = os.environ | {"PYTHON": "true", "DATA": ""}  # no part does anything


def test_gpu_sh_predicts_every_part_and_skips_what_has_no_data(tmp_path):
    parts = re.findall(r"^part_(\w+)\(", (ROOT / "bench/gpu.sh").read_text(), re.MULTILINE)
    done = gpu_sh(str(tmp_path), "--dry-run", environment=NOTHING)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(row["part"] for row in summary) == sorted(parts)
    assert summary[0]["part"] == "goals"
    assert all(0 < row["predicted_seconds"] <= 540 for row in summary)
    assert "no --data=FOLDER: skipped" in (tmp_path / "log.txt").read_text()


def test_gpu_sh_fits_its_parts_into_a_budget(tmp_path):
    """What is predicted to take longer than is left is not begun; what is begun may take it all."""
    limits, out = tmp_path / "limits", tmp_path / "out"
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$3" >>{limits}\nexit 124\n')
    (tmp_path / "timeout").chmod(0o755)
    environment = NOTHING | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    parts = "goals", "build", "large", "tune"
    done = gpu_sh(str(out), "--dry-run", "--seconds=150", *parts, environment=environment)
    assert done.returncode == 1
    goals, build, large, tune = json.loads((out / "summary.json").read_text())
    for row in (goals, tune):
        assert "s were left" in row["skipped"] and "status" not in row
    for row in (build, large):  # as one that is stopped
        assert row["status"] == 124 and "skipped" not in row
    assert all(120 <= int(limit) <= 150 for limit in limits.read_text().split())


def test_gpu_sh_refuses_what_it_does_not_know(tmp_path):
    environment = os.environ | {"PYTHON": "false"}  # as where torch sees no GPU
    for arguments, message in (
        ((), "bench/gpu.sh OUT"),
        ((tmp_path, "--fast"), "unknown option --fast"),
        ((tmp_path, "--seconds=soon"), "--seconds=soon is no number of seconds"),
        ((tmp_path, "kernel"), "unknown part kernel; there are goals build"),
        ((tmp_path, "goals"), "sees no GPU"),
        ((tmp_path, "--data=/no/such/folder"), "/no/such/folder"),
    ):
        done = gpu_sh(*map(str, arguments), environment=environment)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow  # that every part is called: test_gpu_sh_predicts_every_part…
def test_gpu_sh_runs_parts_dry(tmp_path):
    """Three files hold all that it finds."""
    done = gpu_sh(str(tmp_path), "--dry-run", "goals", "sanitizer", "tune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        '"part": "goals", "predicted_seconds": 240, "status": 0'
        in (tmp_path / "summary.json").read_text()
    )
    log = (tmp_path / "log.txt").read_text()
    assert "svd_linear" in log and "penalty.16.residual: 16×64, 2 warps, " in log
    assert "floor ÷ time ≥ 0.7" in log
    found = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    sections = {row["section"] for row in found if row["suite"] == "goals"}
    assert {"right", "layer", "kernel", "goal", "roberta-base, 1 × 8", "captured"} <= sections
    assert {p.name for p in tmp_path.iterdir()} == {"log.txt", "results.jsonl", "summary.json"}


def test_goals_go_on_after_a_failure_and_leave_a_row_for_each_measurement(tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    written = []

    def section(run):
        run.attempt("made up", "wrong", lambda: exec("raise SystemExit('lora starts at loss 2')"))
        written.append(len(out.read_text().splitlines()))
        run.attempt("made up", "right", lambda: {"ms": 2.0})
        run.goal("a ratio", 0.3, 0.4)
        run.goal("a share", 0.3, 0.4, least=True)
        run.seconds = 0.0
        run.attempt("made up", "late", lambda: pytest.fail("there is no time"))

    monkeypatch.setattr(goals, "SECTIONS", (section,))
    monkeypatch.setattr(sys, "argv", ["goals", "--quick", "--out", str(out)])
    assert goals.main() == 1
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert written == [1]
    assert rows["wrong"]["failed"] == "SystemExit: lora starts at loss 2"
    assert rows["right"]["ms"] == 2.0 and "skipped" in rows["late"]
    assert rows["a ratio"]["reached"] and not rows["a share"]["reached"]


def test_goals_keep_the_methods_that_work(tmp_path, monkeypatch):
    """One that fails, or for which the memory does not suffice, costs the others nothing."""

    def peak_of(name, *rest, **options):
        if name == "lora":
            raise RuntimeError("made up")
        return {"out_of_memory": True} if name == "adalora" else {"peak_mb": 1.0}

    monkeypatch.setattr(goals, "peak_of", peak_of)
    run = goals.Run(goals.SMALL, tmp_path / "rows.jsonl", 1e9)
    medians = goals.steps(run, goals.SMALL.roberta(), goals.METHODS, 1, 8)
    assert set(medians) == set(goals.METHODS) - {"lora", "adalora"} and run.failed
    goals.judge_step(run, medians, "adalora", 0.4, "no AdaLoRA, no ratio")
    assert len(run.goals) == 1


def test_rows_of_a_shared_file_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for suite in ("one", "other", "one"):
        common.append_row(suite, {"a": suite}, tmp_path / "all.jsonl")
    report.take_over(tmp_path / "all.jsonl")
    assert [row["a"] for row in common.stored("one", tmp_path, {})] == ["one", "one"]
    assert len(common.stored("other", tmp_path, {})) == 1
