"""Run a function in several processes that torch.distributed connects by gloo."""

import datetime
import multiprocessing
import os
import pickle
import traceback
from typing import Any

import torch
from torch import distributed as dist

SECONDS = 60  # that a collective may wait, and a process may take


def run(function: Any, world: int, *arguments: Any) -> list[Any]:
    """`function(rank, world, *arguments)` of every rank: what each returned, in order.

    Raises:
        AssertionError: a process failed; the message holds every process's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    # One process imports them, from which all others are made in no time.
    context.set_forkserver_preload(
        ["transformers.models.bert.modeling_bert", "accelerate", "hal_kernels", "torch._dynamo",
         "hal_peft.trainer", "torch.distributed.fsdp"]
    )  # fmt: skip
    results, over = context.SimpleQueue(), context.Event()
    port = free_port()
    processes = [
        context.Process(target=_work, args=(function, rank, world, port, results, over, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, tuple[bool, Any]] = {}
    try:
        for _ in processes:
            # One that died told nothing, and the others wait for it no longer than this.
            assert results._reader.poll(2 * SECONDS), f"only {sorted(found)} of {world} answered"
            rank, fine, value = pickle.loads(results.get())
            found[rank] = (fine, value)
    finally:
        over.set()
        for process in processes:
            process.join(SECONDS)
            process.kill()
    failures = [f"rank {rank}:\n{value}" for rank, (fine, value) in found.items() if not fine]
    assert not failures, "\n".join(failures)
    return [found[rank][1] for rank in range(world)]


def share(inputs: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """The rows of a batch that one of the processes trains on."""
    rows = len(next(iter(inputs.values()))) // world
    return {k: v[rank * rows : (rank + 1) * rows] for k, v in inputs.items()}


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def connect(rank: int, world: int, port: int) -> None:
    """Make this process one of `world`, as a launcher would."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))


def _work(
    function: Any, rank: int, world: int, port: int, results: Any, over: Any, arguments: Any
) -> None:
    try:
        connect(rank, world, port)
        value = function(rank, world, *arguments)
        results.put(pickle.dumps((rank, True, value)))  # tensors too, by value
    except BaseException:
        results.put(pickle.dumps((rank, False, traceback.format_exc())))
    over.wait(SECONDS)  # the others may still need this process's connections
    # Taking a gloo group down can wait for ever: for its thread, which waits for the interpreter.
    os._exit(0)
