"""Several processes: an adapter held whole by each, beside a base model that is sharded.

DistributedDataParallel needs nothing of this: it averages the adapter's gradients like any others.
"""

from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from .nn.processes import average_, first_rank
from .patched import find_adapter


def replicate(model: nn.Module, *, process_group: Any = None) -> set[nn.Parameter]:
    """Let every process hold everything that trains, and average its gradients over all of them.

    For FSDP, which then shards the frozen base alone (FSDP1: ``ignored_states=list(whole)``)::

        hal_kernels.patch_model(model, rank=3)
        whole = hal_kernels.replicate(model)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model, ignored_params=whole)

    The first process's parameters are sent to all. Each backward pass ends with equal gradients in
    all processes; what is sent is the size of the gradients.

    Args:
        model: a patched model that is not wrapped or sharded yet, on its device.
        process_group: of the processes that hold it; None: the default group. It becomes
            the adapter's.

    Returns:
        The parameters: of hypernetworks, or P, Λ, Q, and of modules trained in full.

    Raises:
        TypeError, ValueError: `model` is no module, or not patched. RuntimeError: torch.distributed
            is not initialised.
    """
    adapter = find_adapter(model)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("replicate: torch.distributed is not initialised, so nothing to share")
    adapter.process_group = process_group
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = first_rank(process_group)
    for parameter in parameters:
        dist.broadcast(parameter.data, first, group=process_group)
        parameter.register_post_accumulate_grad_hook(_Average(adapter))
    adapter.replicated = {id(parameter) for parameter in adapter.parameters()}
    return set(parameters)


class _Average:
    """Averages a gradient over all processes, once autograd has summed it up.

    Under gradient accumulation that happens after each micro-batch, and the mean of what is alike
    already is itself.
    """

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter

    @torch.no_grad()
    def __call__(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        average_(parameter.grad, self.adapter.process_group)
