"""Which directions are pruned, and when [3.2, App. D; AdaLoRA eqs. 4, 8-12].

Schedules are functions of the step counter on the host; scores and selection stay on the device.
"""

import logging
import math
from typing import TYPE_CHECKING

import torch

from ..config import HALConfig
from ..ops.rank_allocation import importance_scores, prune_smallest, update_importance_
from .processes import average_, is_first

if TYPE_CHECKING:
    from .adapter import HyperAdapter

logger = logging.getLogger("hal_kernels")
INTERVAL = 100  # optimizer steps between allocations where nothing asks for another number
ALLOCATIONS = 10  # how many meet the budget under "fixed"


def last_allocation(config: HALConfig, budget: int, initial: int) -> int:
    """The optimizer step after which the mask stays as it is.

    Args:
        budget: directions that all layers together keep in the end.
        initial: directions that they start with.
    """
    if initial == budget:
        return 0
    if config.schedule == "cubic":
        assert config.total_step is not None
        return config.total_step - config.tfinal
    return _interval(config, initial - budget) * _allocations(config, initial - budget)


def pruned_count(config: HALConfig, budget: int, initial: int, step: int) -> int | None:
    """How many directions the mask prunes from this optimizer step on; None: no allocation now.

    Steps count from 1. "cubic" is AdaLoRA's b(t) (PEFT's RankAllocator.budget_schedule), "fixed"
    prunes the same number every interval.
    """
    surplus, end = initial - budget, last_allocation(config, budget, initial)
    interval = _interval(config, surplus)
    if surplus == 0 or step > end or (step % interval and step != end):
        return None
    if config.schedule == "fixed":
        return min(surplus, step // interval * _per_interval(config, surplus))
    if step <= config.tinit:
        return None
    remaining = (1 - (step - config.tinit) / (end - config.tinit)) ** 3
    return surplus + budget - int(surplus * remaining + budget)


def _per_interval(config: HALConfig, surplus: int) -> int:
    """ "fixed": directions pruned at a time."""
    if config.prune_per_interval is not None:
        return config.prune_per_interval
    allocations = ALLOCATIONS
    if config.total_step is not None:
        room = 2 * config.total_step // (3 * (config.interval or 1))
        allocations = max(1, min(allocations, room))
    return math.ceil(surplus / allocations)


def _allocations(config: HALConfig, surplus: int) -> int:
    """ "fixed": how many allocations meet the budget."""
    return math.ceil(surplus / _per_interval(config, surplus))


def _interval(config: HALConfig, surplus: int) -> int:
    """Optimizer steps between two allocations."""
    if config.interval is not None:
        return config.interval
    if config.total_step is None or config.schedule == "cubic" or surplus == 0:
        return INTERVAL
    return max(1, min(INTERVAL, 2 * config.total_step // (3 * _allocations(config, surplus))))


def announce(adapter: "HyperAdapter") -> None:
    """Say at the first optimizer step when the rank budget will be met: a short run may not.

    Who gave an interval, and no length of the run, knows.
    """
    config, last = adapter.config, adapter.last_allocation
    unknown = config.total_step is None and config.interval is None
    too_late = config.total_step is not None and last > config.total_step
    if last > 0 and (unknown or too_late) and is_first(adapter.process_group):
        logger.warning(
            "hal_kernels: the layers start with %d directions and will keep %d (rank=%d) from "
            "optimizer step %d on; for a shorter run, give its length (option total_step)",
            adapter.layout.initial_rows, adapter.budget, config.rank, last,
        )  # fmt: skip


def allocate(adapter: "HyperAdapter") -> None:
    """Update importance, and prune where the schedule says so, after an optimizer step."""
    config = adapter.config
    # PEFT's last allocation, at `end`, uses the averages of the step before.
    if config.allocation == "ema" and adapter.steps < (
        adapter.last_allocation + (config.schedule == "fixed")
    ):
        _update_importance(adapter)
    count = pruned_count(config, adapter.budget, adapter.layout.initial_rows, adapter.steps)
    if count is not None:
        gone = adapter.layout.initial_rows - adapter.layout.rows  # dropped by compaction
        scores = _scores(adapter)
        adapter.mask.copy_(prune_smallest(scores, max(count - gone, 0)))
    if adapter.direct and (count is not None or adapter.holds_mask):
        adapter.lam.mul_(adapter.mask)


def _update_importance(adapter: "HyperAdapter") -> None:
    watched = adapter.watched().tensors()
    update_importance_(
        adapter.packed("importance_").tensors(),
        adapter.packed("uncertainty_").tensors(),
        adapter.packed().tensors(),
        [torch.zeros_like(t) if t.grad is None else t.grad for t in watched],
        beta1=adapter.config.beta1,
        beta2=adapter.config.beta2,
    )


def _scores(adapter: "HyperAdapter") -> torch.Tensor:
    """One score per direction, in Λ's order ``[R]``; "fixed": what is pruned stays pruned.

    The same in every process: σ·∇σ is averaged before its size counts, which gives the score of
    the joined batch; "ema" averages the scores that each process has gathered.
    """
    method = adapter.config.allocation
    if method == "ema":
        importance, uncertainty = adapter.packed("importance_"), adapter.packed("uncertainty_")
        scores = importance_scores(
            importance.tensors(),
            uncertainty.tensors(),
            adapter.positions_p,
            adapter.positions_q,
            count_p=len(importance.p),
        )
    elif method == "magnitude":
        scores = adapter.lam.abs()
    else:
        scores = adapter.lam * lam_gradient(adapter)
    average_(scores, adapter.process_group)
    if method == "sensitivity":
        scores.abs_()
    if adapter.config.schedule == "fixed":
        scores.masked_fill_(adapter.mask == 0, -math.inf)
    return scores


def lam_gradient(adapter: "HyperAdapter") -> torch.Tensor:
    """dΛ_eff of the optimizer step under way ``[R]``."""
    if adapter.taken is not None:
        return adapter.taken.lam_gradient(adapter)
    gradient = adapter.watched().lam.grad
    assert gradient is not None  # or there would be no step
    return gradient
