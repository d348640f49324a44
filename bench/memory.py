"""Peak memory of a few training steps of one method, as JSON: run it in a process of its own.

python -m bench.memory --method lora --batch 8 [--model roberta-base] [--layers 12]
"""

import argparse
import dataclasses
import json
import sys

import torch

from .common import peak_memory_mb
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    model_options(parser)
    parser.add_argument("--method", choices=ALL_METHODS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    base, device = base_of(arguments), this_device()
    base.require_memory(device)
    try:
        method = Method(arguments.method, base.build(device), base, device)
        rows = batch_of(arguments.batch, arguments.length, device)
        for _ in range(WARMUP + 1):
            method.step(rows)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}))
        return 0
    found = {"peak_mb": peak_memory_mb()}
    if device.type == "cuda":
        found["reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
