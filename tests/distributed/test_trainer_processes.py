"""Trainer on several processes: the run of one, a process that dies, and going on with others."""

import multiprocessing
import os
import signal
import time

import models
import pytest
import torch
from training import adapter_state, assert_close

import hal_kernels
from hal_kernels.nn import hypernet

from . import processes

ROWS, STEPS, SAVED = 32, 6, 2
BATCH = 4  # rows of an optimizer step, over all processes
SECONDS = 20  # within which the others notice that one has died


class Rows(torch.utils.data.Dataset):
    def __init__(self, model):
        self.rows = [models.batch(model, 1, seed=i) for i in range(ROWS)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {k: v[0] for k, v in self.rows[index].items()}


def trainer(folder, world, *, seed=0, accumulation=1):
    from transformers import TrainingArguments

    from hal_peft.trainer import AdapterTrainer

    hypernet.HIDDEN, hypernet.INNER = 24, 32
    # Llama's loss is normalised over all processes and micro-batches, with num_items_in_batch.
    model = hal_kernels.patch_model(
        models.llama(), 2, hypernet="bert", init_rank=4, interval=1, gamma=1.0, seed=seed
    )
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH // world // accumulation, max_steps=STEPS,
        gradient_accumulation_steps=accumulation, save_steps=SAVED, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return AdapterTrainer(model, arguments, train_dataset=Rows(model))


def losses(made):
    kept = ("loss", "task_loss", "penalty")
    return [[e[k] for k in kept] for e in made.state.log_history if "loss" in e]


def train_in_processes(rank, world, folder, accumulation):
    made = trainer(folder, world, accumulation=accumulation)
    made.train()
    return losses(made), adapter_state(made.model)


@pytest.fixture
def small(monkeypatch):
    for name in ("HIDDEN", "INNER"):
        monkeypatch.setattr(hypernet, name, getattr(hypernet, name))


def test_two_processes_train_as_one(small, tmp_path):
    accumulation = 2
    ranks = processes.run(train_in_processes, 2, str(tmp_path / "two"), accumulation)
    one = trainer(str(tmp_path / "one"), 1, accumulation=accumulation)
    one.train()
    for found, tensors in ranks:
        # float32: rounding of sums in another order
        torch.testing.assert_close(found, losses(one), rtol=1e-4, atol=1e-6)
        assert_close(tensors, adapter_state(one.model), 1e-3)
        assert torch.equal(tensors["mask"], one.model.hal.mask)
    assert not list((tmp_path / "two" / "checkpoint-2").glob("model*"))


# ---- a process that dies -------------------------------------------------------------------------


def die(made):
    """A callback that kills the process in the step after a checkpoint."""
    from transformers import TrainerCallback

    class Death(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == SAVED + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    made.add_callback(Death())


def mortal(rank, world, port, folder, results):
    processes.connect(rank, world, port)
    made = trainer(folder, world)
    if rank == 1:
        die(made)
    try:
        made.train()
        results.put("finished")
    except Exception as error:
        results.put((time.time(), f"{type(error).__name__}: {error}"))


def resume_in_processes(rank, world, folder):
    # A new process draws other factors; the checkpoint's count.
    made = trainer(folder, world, seed=1)
    made.train(resume_from_checkpoint=True)
    return losses(made), adapter_state(made.model), made.model.hal.steps


def test_a_killed_process_ends_the_others_and_any_number_goes_on(small, tmp_path):
    context = multiprocessing.get_context("forkserver")
    results, port, folder = context.Queue(), processes.free_port(), str(tmp_path / "run")
    started = [
        context.Process(target=mortal, args=(rank, 2, port, folder, results)) for rank in range(2)
    ]
    for process in started:
        process.start()
    started[1].join(120)
    died = time.time()
    assert started[1].exitcode == -signal.SIGKILL
    when, words = results.get(timeout=SECONDS + 10)
    assert when - died < SECONDS
    assert "Connection closed by peer" in words or "Connection reset" in words, words
    started[0].kill()

    whole = trainer(str(tmp_path / "whole"), 1)
    whole.train()
    for world in (1, 4):
        ranks = processes.run(resume_in_processes, world, folder)
        for found, tensors, steps in ranks:
            assert steps == STEPS
            torch.testing.assert_close(found, losses(whole), rtol=1e-4, atol=1e-6)
            assert torch.equal(tensors["mask"], whole.model.hal.mask)
        for later in range(SAVED + 1, STEPS + 1):  # the next one starts from the same checkpoint
            path = tmp_path / "run" / f"checkpoint-{later}"
            if path.exists():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
