"""Peak memory of a few training steps, of one method at a time.

    python -m bench.memory --method lora --batch 8 [--model roberta-base] [--layers 12]

prints that of this process, as JSON. On a GPU no process of its own is needed: the allocator's peak
is reset before a method is built on the base model's weights, which are all that is there beside
it, and the method is thrown away before the next one.
"""

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .common import in_own_process, peak_memory_mb
from .methods import ALL_METHODS, WARMUP, Method, batch_of
from .models import BASES, Base
from .training_step import this_device


def model_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose a base model."""
    parser.add_argument("--model", choices=BASES, default="roberta-base")
    parser.add_argument("--layers", type=int, help="blocks (default: as many as the model has)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--gradient-checkpointing", action="store_true")


def base_of(arguments: argparse.Namespace) -> Base:
    depth = {} if arguments.layers is None else {"layers": arguments.layers}
    base = BASES[arguments.model](**depth)
    return dataclasses.replace(base, checkpointing=arguments.gradient_checkpointing)


def peak_of(
    name: str, model: nn.Module, base: Base, batch: int, length: int, **options: int
) -> dict[str, Any]:
    """MB at the peak of a few steps of a method on `model`, or that the memory did not suffice.

    On a GPU what its allocator gave out, and what it held ("reserved_mb"); else resident memory, of
    the whole process so far. `options` are those of methods.build.
    """
    device = this_device()
    gc.collect()  # the method before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        method = Method(name, model, base, device, **options)
        rows = batch_of(batch, length, device)
        for _ in range(WARMUP + 1):
            method.step(rows)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    found = {"peak_mb": peak_memory_mb()}
    if device.type == "cuda":
        found["reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def peaks(base: Base, methods: Sequence[str], batch: int, length: int) -> dict[str, dict[str, Any]]:
    """`peak_of` each method: on a GPU in this process, else each in one of its own."""
    if this_device().type == "cuda":
        model = base.build(this_device())
        return {name: peak_of(name, model, base, batch, length) for name in methods}
    gc.collect()  # models measured before, which would take those processes' memory
    arguments = ["--model", base.name, "--layers", str(base.config().num_hidden_layers)]
    arguments += ["--batch", str(batch), "--length", str(length)]
    arguments += ["--gradient-checkpointing"] if base.checkpointing else []
    return {name: in_own_process("bench.memory", "--method", name, *arguments) for name in methods}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    model_options(parser)
    parser.add_argument("--method", choices=ALL_METHODS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    base, device = base_of(arguments), this_device()
    base.require_memory(device)
    try:
        model = base.build(device)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}))
        return 0
    print(json.dumps(peak_of(arguments.method, model, base, arguments.batch, arguments.length)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
