"""Training steps of several processes that average their gradients, on one machine.

Each process has one thread (gloo), or a GPU of its own (nccl). All take as many rows, of their own,
however many they are: what a step costs more than in one process is what they wait for each other,
and for what they share of the machine.
"""

import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from hal_kernels.nn.processes import all_agree

from .common import hush
from .communication import Counter, sent
from .methods import INTERVAL, METHODS, Method, batch_of
from .models import roberta_base
from .training_step import this_device, timed

# One process imports them, from which all others are made in no time.
PRELOAD = [__name__, "peft", "transformers.models.roberta.modeling_roberta"]
PATIENCE = datetime.timedelta(minutes=5)  # of a collective


class Parallel(Method):
    """A method in one of the processes; they begin each step together."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model = DistributedDataParallel(self.model)

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        distributed.barrier()
        return super().step(batch)

    def sent_bytes(self, batch: dict[str, torch.Tensor]) -> float:
        """Bytes that a process sends in a step, counted in as many as hold one allocation.

        Those of all-reduces: the frozen model's buffers, which are broadcast, do not count.
        """
        with Counter() as counter:
            for _ in range(INTERVAL):
                super().step(batch)
        return sent(counter.bytes["allreduce_"] / INTERVAL, distributed.get_world_size())

    def check_alike(self) -> None:
        """All processes hold the same bits.

        Raises:
            SystemExit: in every process, if one of them has other trained parameters or buffers.
        """
        held = [p for p in self.model.parameters() if p.requires_grad]
        held += [b for b in self.model.buffers() if b.is_floating_point()]
        mine = torch.cat([tensor.detach().flatten().float() for tensor in held])
        first = mine.clone()
        distributed.broadcast(first, 0)
        if not all_agree(torch.equal(mine, first), mine.device, None):
            raise SystemExit(f"{self.name}: the processes end with different parameters")


def measure(processes: int, **point: int) -> dict[str, Any]:
    """Times of all methods in the first of several processes, and what each sends, by method.

    Args:
        point: the other arguments of `in_process`.

    Raises:
        SystemExit: a method does not compute what it should, in any of them; or one has failed.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.start_processes(
                _work, (processes, Path(folder), point), processes, start_method="forkserver"
            )
        except multiprocessing.ProcessRaisedException as error:
            raise SystemExit(f"{processes} processes: {error}") from None
        results: dict[str, Any] = json.loads((Path(folder) / "results").read_text())
    return results


def _work(process: int, processes: int, folder: Path, point: dict[str, int]) -> None:
    hush()
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(process)
        backend = "nccl"
    distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=process, world_size=processes,
        timeout=PATIENCE,
    )  # fmt: skip
    try:
        results = in_process(process, **point)
    except SystemExit as failure:  # which the one that started this would not hear of
        raise RuntimeError(*failure.args) from None
    if process == 0:
        (folder / "results").write_text(json.dumps(results))
    distributed.barrier()
    os._exit(0)  # taking a gloo group down can wait for ever


def in_process(
    process: int,
    *,
    layers: int,
    width: int,
    batch: int,
    length: int,
    repeats: int,
    warmup: int,
    **options: int,
) -> dict[str, Any]:
    """What one of the processes measures; `batch` rows are its own, `options` of methods.build."""
    device, base = this_device(), roberta_base(layers=layers, width=width)
    model = base.build(device)
    running = {name: Parallel(name, model, base, device, **options) for name in METHODS}
    rows = batch_of(batch, length, device, process)
    results = timed(base, running, rows, repeats, warmup, show=process == 0)
    for name, method in running.items():
        results[name]["sent_bytes"] = method.sent_bytes(rows)
        method.check_alike()
    return results
