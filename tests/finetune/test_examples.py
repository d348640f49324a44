"""The example scripts, each run as a user would, on small settings."""

import ast
import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import processes

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCHER += ["--main_process_port", "0"]  # a free one


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script as python does, in this process; returns its output."""

    def run(script, *arguments):
        path = EXAMPLES / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def launched(script, *arguments, launcher):
    """The output of several processes, which must end well."""
    paths = [str(EXAMPLES.parent), str(EXAMPLES.parent / "python")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("[!_]*.py"))


def test_plain_loop(run, tmp_path):
    said = run("plain_loop.py", "--steps", 40, "--out", tmp_path)
    assert "directions kept" in said
    assert (tmp_path / "adapter.json").exists()


def test_trainer_on_rte(run, bert_folder, tmp_path):
    from .tiny import write_jsonl

    row = {"sentence1": "the film was good", "sentence2": "it was a film", "label": "entailment"}
    rows = [row, row | {"sentence2": "it was awful", "label": "not_entailment"}] * 8
    given = os.environ.get("HAL_DATA")  # the real set, where there is one
    train = Path(given or tmp_path) / "rte_train.jsonl.gz"
    dev = Path(given or tmp_path) / "rte_dev.jsonl"
    if not given:
        train, dev = (write_jsonl(tmp_path / name, rows) for name in ("train.jsonl", "dev.jsonl"))
    said = run(
        "trainer_rte.py", train, dev, "--model", bert_folder, "--steps", 4, "--batch-size", 4,
        "--rows", 16, "--out", tmp_path,
    )  # fmt: skip
    assert "eval_accuracy" in said
    assert (tmp_path / "lora" / "adapter_config.json").exists()


def test_sft_on_alpaca(run, instructions, tmp_path):
    pytest.importorskip("trl")
    options = ("--steps", 3, "--batch-size", 2, "--rows", 8, "--max-length", 256)
    said = run("sft_alpaca.py", instructions, *options, "--out", tmp_path)
    assert "q_proj" in said
    assert (tmp_path / "adapter" / "adapter.json").exists()


def in_processes(rank, world, *arguments):
    sys.argv = ["accelerate_loop.py", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("launch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accelerate_launch(launch, tmp_path):
    options = ("--steps", "20", "--out", str(tmp_path))
    if launch:
        said = launched("accelerate_loop.py", *options, launcher=LAUNCHER)
    else:
        said, nothing = processes.run(in_processes, 2, *options)
        assert not nothing
    assert "2 processes" in said and "39 directions" in said  # 13 layers of rank 3
    assert (tmp_path / "adapter.json").exists()


def test_fused_layer(run):
    lines = run("fused_layer.py").splitlines()
    first, last = (float(lines[index].rpartition(" ")[2]) for index in (0, -1))
    assert last < first
    source = (EXAMPLES / "fused_layer.py").read_text()
    (kind,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    assert kind.end_lineno - kind.lineno < 20, "it is meant to be short"


def test_fused_layer_is_lora():
    namespace = {"__name__": "fused_layer"}
    exec((EXAMPLES / "fused_layer.py").read_text(), namespace)
    layer = namespace["FusedLoRA"](torch.nn.Linear(9, 7), rank=2).double()
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 9, dtype=torch.float64)
    expected = layer.base(x) + layer.scaling * (x @ layer.a.T) @ layer.b
    torch.testing.assert_close(layer(x), expected)
