"""What data-parallel processes have to agree on: initial factors, scores, and steps left out.

Gradients are averaged by whoever wraps the model (DistributedDataParallel, or `replicate`). All of
this is communicated in an adapter's `process_group`; None is the default group.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from .adapter import HyperAdapter


def world_size(group: Any) -> int:
    """How many processes train together with this one, itself included."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def first_rank(group: Any) -> int:
    """Global rank of the process that settles what all begin with."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def is_first(group: Any) -> bool:
    """Whether this process is the one that speaks for all that train together."""
    return world_size(group) == 1 or dist.get_rank() == first_rank(group)


def average_(tensor: torch.Tensor, group: Any) -> None:
    """Mean over all processes, in place; every process gets the same bits."""
    processes = world_size(group)
    if processes == 1:
        return
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    tensor.copy_(total.div_(processes))


def all_agree(flag: bool, device: torch.device, group: Any) -> bool:
    """Whether `flag` holds in every process. Costs four bytes, where there are several."""
    if world_size(group) == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
    return bool(votes.item() > 0)


def share_state(adapter: "HyperAdapter") -> None:
    """Give every process the first one's factors, anchors, masks, scores and step counter, once.

    They are buffers, drawn by each process itself; `patch_model` keeps DistributedDataParallel from
    sending them with every step.
    """
    group = adapter.process_group
    if adapter.shared or world_size(group) == 1:
        return
    steps = torch.tensor([adapter.steps], device=adapter.mask.device)
    for tensor in [*_state(adapter), steps]:
        dist.broadcast(tensor, first_rank(group), group=group)
    adapter.steps = int(steps)
    adapter.shared = True


def expect_shared(adapter: "HyperAdapter") -> None:
    """Raise in every process unless all hold the same state, where nothing could share it.

    Raises:
        RuntimeError: a compiled model whose processes drew different factors.
    """
    group = adapter.process_group
    if adapter.shared or world_size(group) == 1:
        return
    sums = torch.stack([t.double().sum() for t in _state(adapter)])
    mean = sums.clone()
    average_(mean, group)
    # the mean of equal numbers may round
    if not all_agree(torch.allclose(sums, mean, rtol=1e-12, atol=0), sums.device, group):
        raise RuntimeError(
            "the processes hold different adapters: patch with the same seed in all of them "
            "(patch_model's option `seed`), or train one step before compiling"
        )
    adapter.shared = True


def _state(adapter: "HyperAdapter") -> list[torch.Tensor]:
    """The buffers that training changes or that a seed drew: all but indices."""
    return [buffer for buffer in adapter.buffers() if buffer.is_floating_point()]
