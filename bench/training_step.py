"""Training steps of several methods on one base model: timed in turn, checked, and their memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from hal_kernels.nn.processes import average_

from .common import interleaved, summary
from .methods import Method, batch_of
from .models import Base

PHASES = ("forward", "penalty", "backward", "optimizer", "allocation")
# Relative difference of first losses: sums in another order, rounded to what the layers return.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(
    base: Base,
    methods: Sequence[str],
    batch: int,
    length: int,
    repeats: int,
    warmup: int,
    **options: int,
) -> dict[str, Any]:
    """Times of the methods at one batch size, by method; `options` are those of methods.build.

    Raises:
        SystemExit: a method does not compute what it should; nothing is returned then.
    """
    device = this_device()
    model = base.build(device)
    running = {name: Method(name, model, base, device, **options) for name in methods}
    return timed(base, running, batch_of(batch, length, device), repeats, warmup)


def timed(
    base: Base,
    running: Mapping[str, Method],
    rows: dict[str, torch.Tensor],
    repeats: int,
    warmup: int,
    *,
    show: bool = True,
) -> dict[str, Any]:
    """`measure` of methods that are there, on a batch; `show` says how far it is."""
    steps = {name: (lambda m=method: m.step(rows)) for name, method in running.items()}
    first: dict[str, float] = {}
    samples: dict[str, list[dict[str, float]]] = {}
    with Progress(transient=True, disable=not show) as progress:
        batch = len(rows["labels"])
        task = progress.add_task(f"{base.name}, batch {batch}", total=repeats + warmup)
        for measured in interleaved(steps, repeats, warmup):
            samples = measured
            if not first:
                first = losses(running, rows)
                check_start(first, TOLERANCE[base.dtype])
            progress.advance(task)
    last = losses(running, rows)
    check_end(first, last, TOLERANCE[base.dtype])
    return {
        name: {
            "step": summary([s["step"] for s in samples[name]]),
            "phases": {
                phase: summary([s[phase] for s in samples[name]])
                for phase in PHASES
                if phase in samples[name][0]
            },
            "first_loss": first[name],
            "last_loss": last[name],
            "trained_parameters": method.trained_parameters,
        }
        for name, method in running.items()
    }


def losses(methods: Mapping[str, Method], rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """The task's loss in the step just taken, without any penalty; of all processes the mean."""
    logits = [method.logits.float() for method in methods.values()]
    found = torch.stack([cross_entropy(one, rows["labels"]) for one in logits])
    average_(found, None)
    return dict(zip(methods, found.tolist(), strict=True))


def check_start(first: dict[str, float], tolerance: float) -> None:
    """All methods start as the identity, so their first losses agree."""
    reference = next(iter(first.values()))
    for name, loss in first.items():
        if not abs(loss - reference) <= tolerance * abs(reference):
            raise SystemExit(f"{name} starts at loss {loss}, {next(iter(first))} at {reference}")


def check_end(first: dict[str, float], last: dict[str, float], tolerance: float) -> None:
    """Steps on one and the same batch, without dropout, bring its loss down."""
    for name, loss in last.items():
        if not loss <= first[name] * (1 + tolerance):
            raise SystemExit(f"{name}: the loss of the batch went from {first[name]} to {loss}")
