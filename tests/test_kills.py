"""SIGKILL at any moment of a save or an export: what is in the folder then."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import models
import pytest
import torch
from lifecycle import patched

from hal_kernels import export_lora, save_adapter

JSON = "adapter.json"


def two_models():
    return [patched(models.net(hidden=512, seed=seed), rank=1 + seed) for seed in (1, 2)]


def nursery(pipe):
    """Runs in a process of its own, without threads: forks one that writes, whenever asked to."""
    torch.set_num_threads(1)
    pair = two_models()
    for write, folder, pause in iter(pipe.recv, None):
        child = os.fork()
        if not child:
            write_for_ever(pair, folder, pause, write)
        pipe.send(child)
        os.waitpid(child, 0)
        pipe.send("gone")


def write_for_ever(pair, folder, pause, write):
    swap = os.replace

    def replace(source, target):
        time.sleep(pause)
        swap(source, target)
        time.sleep(pause)

    os.replace = replace
    while True:
        for model in pair:
            write(model, folder)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def adapter_file(folder):
    """The tensor file that adapter.json names, in its place: another may be there as well."""
    name = json.loads((folder / JSON).read_text())["tensors"]["file"]
    return {name: (folder / name).read_bytes(), JSON: (folder / JSON).read_bytes()}


@pytest.fixture(scope="module")
def pipe():
    own, end = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=nursery, args=(end,))
    process.start()
    yield own
    own.send(None)
    process.join()


@pytest.mark.parametrize(("write", "read"), [(save_adapter, adapter_file), (export_lora, contents)])
def test_sigkill_at_any_moment(write, read, pipe, tmp_path):
    expected = []
    for i, model in enumerate(two_models()):
        write(model, tmp_path / str(i))
        expected.append(contents(tmp_path / str(i)))
    chance, seen, files = random.Random(0), set(), set()
    # With pauses, kills fall between the two files of a save; without, anywhere.
    for pause in (0.0, 0.01):
        folder = tmp_path / "here" / str(pause)
        begun = time.perf_counter()
        write(two_models()[1], folder)
        one_save = time.perf_counter() - begun + 4 * pause
        for _ in range(10):
            pipe.send((write, folder, pause))
            child = pipe.recv()
            time.sleep(chance.uniform(0.0, 3 * one_save))
            os.kill(child, signal.SIGKILL)
            assert pipe.recv() == "gone"
            assert read(folder) in expected, "what is there is neither of the two states"
            seen.add(expected.index(read(folder)))
            files.add(len([*folder.parent.rglob("*")]))
        write(two_models()[0], folder)  # as the last of pair does, or anew
        write(two_models()[1], folder)
        assert contents(folder) == expected[1]
        assert sorted(folder.iterdir()) == [folder / name for name in sorted(expected[1])]
        assert [*folder.parent.iterdir()] == [folder], "temporary files of killed processes remain"
        shutil.rmtree(folder)
    assert seen == {0, 1}, "every kill left the same state"
    assert len(files) > 1, "no kill left a temporary file"
