"""The length of the run that transformers' Trainer makes, which it tells its model nothing of.

Without it the allocation schedule is made for long runs, and a short one ends over its rank budget.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from .instances import instances

if TYPE_CHECKING:
    from .adapter import HyperAdapter


def take_run_length(adapter: "HyperAdapter") -> None:
    """Let a schedule that is not settled meet its budget within the run of the adapter's Trainer.

    Called once, before the first forward of a run. A run that goes on from a checkpoint of the same
    Trainer gets the schedule that it began with; one that trains an adapter further, whose steps
    were taken elsewhere, keeps the one that it has.
    """
    config = adapter.config
    if config.interval is not None or config.total_step is not None:
        return
    states = [trainer.state for trainer in _trainers() if _trains(trainer, adapter)]
    totals = [state.max_steps for state in states if state.global_step >= adapter.steps]
    if totals:
        adapter.config = dataclasses.replace(config, total_step=totals[0])


def _trainers() -> list[Any]:
    """Every Trainer (TRL's and AdapterTrainer among them) that is training now."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return []
    return [t for t in instances(module.Trainer) if getattr(t, "is_in_train", False)]


def _trains(trainer: Any, adapter: "HyperAdapter") -> bool:
    return any(module is adapter for module in trainer.model.modules())
