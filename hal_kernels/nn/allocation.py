"""Which directions are pruned, and when [3.2, App. D; AdaLoRA eqs. 4, 8-12].

Schedules are functions of the step counter on the host; scores and selection stay on the device.
"""

import math

import torch

from ..config import HALConfig


def surplus(config: HALConfig, layers: int) -> int:
    """Directions to be pruned over the whole run: (init_rank − rank) × number of layers."""
    assert config.init_rank is not None  # settled by with_init_rank
    return (config.init_rank - config.rank) * layers


def last_allocation(config: HALConfig, layers: int) -> int:
    """The optimizer step after which the mask stays as it is."""
    extra = surplus(config, layers)
    if extra == 0:
        return 0
    if config.schedule == "cubic":
        assert config.total_step is not None
        return config.total_step - config.tfinal
    return config.interval * math.ceil(extra / _per_interval(config, extra))


def pruned_count(config: HALConfig, layers: int, step: int) -> int | None:
    """How many directions the mask prunes from this optimizer step on; None: no allocation now.

    Steps count from 1. "cubic" is AdaLoRA's b(t) (PEFT's RankAllocator.budget_schedule), "fixed"
    prunes the same number every interval.
    """
    extra, end = surplus(config, layers), last_allocation(config, layers)
    if extra == 0 or step > end or (step % config.interval and step != end):
        return None
    if config.schedule == "fixed":
        return min(extra, step // config.interval * _per_interval(config, extra))
    if step <= config.tinit:
        return None
    remaining = (1 - (step - config.tinit) / (end - config.tinit)) ** 3
    target = config.rank * layers
    return extra + target - int(extra * remaining + target)


def _per_interval(config: HALConfig, extra: int) -> int:
    return config.prune_per_interval or math.ceil(extra / 10)


def average_over_processes(scores: torch.Tensor) -> torch.Tensor:
    """Mean of the scores over all data-parallel processes, so that all select alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(scores)
        scores /= torch.distributed.get_world_size()
    return scores
