"""Where a patched model can't work: refused at its forward, before anything goes wrong."""

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .adapter import HyperAdapter


def expect_supported(model: nn.Module, adapter: HyperAdapter) -> None:
    """Raise unless `model` can be called where it is.

    Raises:
        RuntimeError: parts of it on other devices, wrapped so that the adapter's gradients would
            not be averaged, or processes that may end at different times.
    """
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel can't train an adapter on several devices: use DistributedDataParallel"
        )
    if not adapter.placed:
        _expect_one_device(model, adapter)
        adapter.placed = True
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        _expect_averaged(model, adapter)


def _expect_one_device(model: nn.Module, adapter: HyperAdapter) -> None:
    # parameters() and buffers() are slow, and this is done in every step.
    held = [t for m in adapter.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    own = {t.device for t in held if t is not None}
    slots = ((m, m.__dict__.get("_hal")) for m in model.modules())
    weights = (m.weight for m, slot in slots if slot is not None and slot.adapter is adapter)
    # Offloaded weights are on the meta device until their layer is called.
    layers = {w.device for w in weights if isinstance(w, torch.Tensor) and not w.is_meta}
    if len(own | layers) > 1:
        raise RuntimeError(
            f"the adapter is on {_names(own)}, the layers it adapts on {_names(layers)}, expected "
            "one device: move the whole model with model.to(device)"
        )


def _names(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))


def _expect_averaged(model: nn.Module, adapter: HyperAdapter) -> None:
    around = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if around is not None and around._join_config.enable:
        raise RuntimeError(
            "an adapter can't train under torch.distributed.algorithms.join.Join (accelerate's "
            "join_uneven_inputs): give every process the same number of batches, as "
            "DistributedSampler does"
        )
    sharded = any("_is_fsdp_managed_module" in module.__dict__ for module in model.modules())
    if sharded and adapter.replicated != {id(p) for p in adapter.parameters()}:
        raise RuntimeError(
            "FSDP can neither shard an adapter nor leave its gradients unaveraged: wrap the model "
            "in DistributedDataParallel, or call hal_kernels.replicate(model) before FSDP and let "
            "it ignore the parameters that this returns (docs/distributed.md)"
        )
