"""`compact`: drop pruned directions for good."""

import torch
from torch import nn

from .nn.adapter import HyperAdapter
from .nn.tensors import replace_data
from .patched import intact_adapter
from .stepping import torch_optimizers


def compact(model: nn.Module) -> nn.Module:
    """Remove pruned directions from factors, hypernetworks, scores and optimizer state, in place.

    The model computes the same function with smaller factors: a layer of which everything was
    pruned costs nothing beyond its base layer. Parameters stay the same objects, and the state of
    every torch optimizer that holds them is cut alike, so training goes on (wrap a model in
    DistributedDataParallel anew). Waits for the device once.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since;
            "direct" under the cubic schedule before its last allocation, while pruned directions
            may still come back.
    """
    compact_adapter(intact_adapter(model))
    return model


@torch.no_grad()
def compact_adapter(adapter: HyperAdapter) -> None:
    """`compact` for an adapter that is not in a patched model."""
    if adapter.config.schedule == "cubic" and adapter.steps < adapter.last_allocation:
        raise ValueError(
            f"compact: the cubic schedule is still allocating (step {adapter.steps} of "
            f"{adapter.last_allocation}), pruned directions may come back"
        )
    kept = adapter.mask > 0
    if bool(kept.all()):
        return
    layout, optimizers = adapter.layout, torch_optimizers()
    ranks = [int(mask.sum()) for mask in kept.cpu().split(layout.ranks)]
    if sum(ranks) == 0:
        raise ValueError("compact: every direction is pruned, nothing would be left")
    rows = {"lam": kept}
    for name, side in (("p", layout.p), ("q", layout.q)):
        parts = kept[getattr(adapter, f"rows_{name}")].split(side.sizes)
        rows |= {f"{name}_{g.width}": keep for g, keep in zip(side.groups, parts, strict=True)}
    for prefix in ("", "anchor_", "importance_", "uncertainty_", "momentum_"):
        for name, keep in rows.items():
            tensor = getattr(adapter, f"{prefix}{name}", None)
            if tensor is not None:
                _keep_rows(optimizers, tensor, keep)
    if adapter.hypernet is not None:
        _keep_rows(optimizers, adapter.hypernet.lam_embedding, kept)
    _keep_rows(optimizers, adapter.mask, kept)
    adapter.set_layout(layout.with_ranks(ranks))


def _keep_rows(
    optimizers: list[torch.optim.Optimizer], tensor: torch.Tensor, keep: torch.Tensor
) -> None:
    """Cut a parameter or buffer, its gradient and its state in optimizers to the rows in `keep`."""
    shape, gradient = tensor.shape, tensor.grad
    replace_data(tensor, tensor.data[keep])
    if gradient is not None:
        tensor.grad = gradient[keep]
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                optimizer.state[tensor][key] = value[keep]
