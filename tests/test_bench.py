"""The benchmarks' own judgement: budgets that can be missed, tables that can be old."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host, launches, least, models, operator_cases, operators, report
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
    assert dict(found.counts) == {
        "svd_linear: shrink_kernel": 1,
        "svd_linear: expand_kernel": 1,
    }
    assert found.syncs == 0
    assert launches.counted(lambda: (x + 1).t()[0, 0].item()).total == 1


@pytest.mark.parametrize("check", [False, True])
def test_every_operator_is_measured_beside_its_floor(check):
    from hal_kernels.ops._library import TRITON

    cases = list(operator_cases.cases(torch.device("cpu"), quick=True, check=check))
    # The spectral step has no time of its own yet: bench.step has it within a training step.
    timed = {n for n in TRITON if not n.endswith("_backward")} - {"spectral_step_"}
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


def test_gpu_sh_predicts_every_part_and_skips_what_has_no_data(tmp_path):
    parts = re.findall(r"^part_(\w+)\(", (ROOT / "bench/gpu.sh").read_text(), re.MULTILINE)
    environment = os.environ | {"PYTHON": "true", "DATA": ""}  # no part does anything
    done = gpu_sh(str(tmp_path), "--dry-run", environment=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(row["part"] for row in summary) == sorted(parts)
    assert all(0 < row["predicted_seconds"] <= 540 for row in summary)
    assert "no --data=FOLDER: skipped" in (tmp_path / "log.txt").read_text()


def test_gpu_sh_refuses_what_it_does_not_know(tmp_path):
    environment = os.environ | {"PYTHON": "false"}  # as where torch sees no GPU
    for arguments, message in (
        ((), "bench/gpu.sh OUT"),
        ((tmp_path, "--fast"), "unknown option --fast"),
        ((tmp_path, "kernel"), "unknown part kernel; there are build check"),
        ((tmp_path, "check"), "sees no GPU"),
        ((tmp_path, "--data=/no/such/folder"), "/no/such/folder"),
    ):
        done = gpu_sh(*map(str, arguments), environment=environment)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow  # that every part is called: test_gpu_sh_predicts_every_part…
def test_gpu_sh_runs_parts_dry(tmp_path):
    done = gpu_sh(str(tmp_path), "--dry-run", "check", "tune")
    assert done.returncode == 0, done.stderr
    assert '"part": "check", "status": 0' in (tmp_path / "summary.json").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert "svd_linear" in log and "penalty.16.residual: 16×64, 2 warps, " in log
