"""Adapters trained as in bench.convergence, looked into afterwards: what bench.gamma and
bench.similarity share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import hal_kernels

from . import convergence
from .common import append_row, parser, stored


class Directions(NamedTuple):
    """One layer's factors in torch's layout: p [r, d_in], lam [r], q [r, d_out]."""

    p: Tensor
    lam: Tensor
    q: Tensor


def directions(model: Any) -> dict[str, Directions]:
    """The factors of a model patched by this library or adapted by PEFT's AdaLoRA, by layer.

    Layers are named as in the base model. P and Q have one row per singular direction.
    """
    if hasattr(model, "hal"):
        return {
            name: Directions(f.p.t().cpu(), (f.lam * f.mask).cpu(), f.q.cpu())
            for name, f in hal_kernels.factors(model).items()
        }
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_E"):
            a, e, b = (
                t["default"].detach().cpu() for t in (layer.lora_A, layer.lora_E, layer.lora_B)
            )
            found[name] = Directions(a, e[:, 0], b.t())
    return found


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of a suite that trains a classifier on a local task."""
    options = parser(description)
    options.add_argument(
        "--data", type=Path, required=True, help="folder of the tasks' JSONL files"
    )
    options.add_argument("--task", default="sst2")
    options.add_argument("--model", default="", help="default: the packaged MiniLM")
    options.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=160)
    return options


class Runs:
    """Trains what has no row yet, and appends one as soon as a run is done."""

    def __init__(self, suite: str, arguments: argparse.Namespace) -> None:
        from examples.demo.task import packaged_model

        self.suite, self.arguments = suite, arguments
        self.source = arguments.model or packaged_model()
        self.model = Path(arguments.model).name or "MiniLM-L6"  # not where it lies
        self.console = Console()

    def key(self, **own: Any) -> dict[str, Any]:
        options = self.arguments
        return {
            "task": options.task,
            "steps": options.steps,
            "init_rank": 3,
            "model": self.model,
        } | own

    def stored(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next(iter(stored(self.suite, self.arguments.out, key)), None)

    def train(
        self, key: dict[str, Any], look: Callable[[Any], dict[str, Any]] = lambda model: {}
    ) -> dict[str, Any]:
        """One run.

        Raises:
            SystemExit: the loss is not finite; no row is to be written then.
        """
        words = " ".join(f"{name} {value}" for name, value in key.items())
        with self.console.status(words):
            result = convergence.run(key, self.source, self.arguments.data, look)
        if not torch.tensor(result["losses"]).isfinite().all():
            raise SystemExit(f"{words}: the loss is not finite")
        return result

    def save(self, row: dict[str, Any]) -> None:
        if not self.arguments.no_save:
            append_row(self.suite, row, self.arguments.out)
