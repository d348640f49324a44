"""bench.data_parallel: steps of all methods, what they send, and checks that can fail."""

import json
import os
import sys

import pytest
import torch

from bench import data_parallel, methods, models, pages, rows, scaling
from bench.methods import METHODS, WARMUP
from hal_kernels.nn import hypernet

from .processes import run

POINT = {"layers": 2, "width": 64, "batch": 2, "length": 8, "rank": 3, "init_rank": 5}


def in_processes(process, world):
    hypernet.HIDDEN, hypernet.INNER = 24, 32
    return data_parallel.in_process(process, repeats=2, warmup=WARMUP, **POINT)


@pytest.fixture(scope="module")
def ranks():
    return run(in_processes, 2)


def test_losses_are_the_mean_of_all_processes(ranks):
    first, second = ranks
    for name in METHODS:
        for loss in ("first_loss", "last_loss"):
            assert first[name][loss] == second[name][loss]
    base = models.roberta_base(layers=2, width=64).build(torch.device("cpu"))
    with torch.no_grad():
        each = [base(**methods.batch_of(2, 8, torch.device("cpu"), p)).loss.item() for p in (0, 1)]
    assert each[0] != each[1]
    # sums in another order
    assert first["frozen"]["first_loss"] == pytest.approx(sum(each) / 2, rel=1e-5)


def test_bytes_sent_are_gradients_and_what_allocation_needs(ranks):
    for name, result in ranks[0].items():
        expected = 4 * result["trained_parameters"]  # two processes send each byte once
        if name.startswith("hal"):
            expected += 4 + 4 * 12 * POINT["init_rank"] / methods.INTERVAL  # votes; scores
        assert result["sent_bytes"] == expected, name


def part(process, world, name):
    """The one process's copy is changed after the last step."""
    base, cpu = models.roberta_base(layers=1, width=64), torch.device("cpu")
    method = data_parallel.Parallel(name, base.build(cpu), base, cpu, rank=3, init_rank=5)
    method.step(methods.batch_of(2, 8, cpu, process))
    method.check_alike()
    if process == 1:
        next(p for p in method.model.parameters() if p.requires_grad).detach()[0] += 1e-6
    try:
        method.check_alike()
    except SystemExit as error:
        return str(error)


def test_processes_that_part_are_seen_by_all():
    message = "lora: the processes end with different parameters"
    assert run(part, 2, "lora") == [message] * 2


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    points = [scaling.Point(layers=1, width=64, processes=n) for n in (1, 2)]
    axis = scaling.AXES["processes"]
    monkeypatch.setitem(scaling.AXES, "processes", scaling.Axis(axis.label, points, axis.quick))

    def call(*arguments):
        options = ["--axis", "processes", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", ["scaling", *options])
        scaling.main()

    call.rows = tmp_path / "scaling.jsonl"
    return call


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_points_have_a_row_and_a_place_on_the_page(measured, command, ranks, monkeypatch):
    if not measured:
        alone = {name: found | {"sent_bytes": 0} for name, found in ranks[0].items()}
        results = {1: alone, 2: ranks[0]}
        monkeypatch.setattr(data_parallel, "measure", lambda processes, **_: results[processes])
    command("--repeats", "2", "--warmup", "1")
    found = [json.loads(line) for line in command.rows.read_text().splitlines()]
    assert [row["value"] for row in found] == [1, 2]
    for row in found:
        assert list(row["methods"]) == list(METHODS)
        assert all(result["step"]["median_ms"] > 0 for result in row["methods"].values())
        assert row["title"].endswith(" tokens a process")
    assert not any(result["sent_bytes"] for result in found[0]["methods"].values())
    assert all(result["sent_bytes"] for result in found[1]["methods"].values())
    text, _ = pages.scaling_page()
    heading = f"## Processes of one thread ({os.cpu_count()} cores): 1 blocks, width 64, rank 3"
    assert heading in text and "MB that each process sends" in text


def test_a_process_that_fails_leaves_no_row(command, monkeypatch):
    points = [scaling.Point(layers=1, width=64, rank=0, processes=2)]
    monkeypatch.setitem(scaling.AXES, "processes", scaling.Axis("processes", points, (0,)))
    with pytest.raises(SystemExit, match=r"2 processes: [\s\S]*value passed is 0"):
        command("--quick")
    assert not command.rows.exists()


def test_a_check_that_fails_is_an_error_of_its_process(tmp_path, monkeypatch):
    """A process that only exits would leave no message to the one that started it."""

    def failing(process, **point):
        raise SystemExit("lora starts at loss 2")

    monkeypatch.setattr(data_parallel, "in_process", failing)
    monkeypatch.setattr(data_parallel.distributed, "init_process_group", lambda *a, **k: None)
    with pytest.raises(RuntimeError, match="lora starts at loss 2"):
        data_parallel._work(0, 2, tmp_path, POINT)


def test_no_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = scaling.points_of(scaling.AXES["processes"], quick=False)
    assert [point.processes for point in found] == [1, 2]
