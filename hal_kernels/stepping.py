"""How optimizer steps are noticed: two hooks that torch calls around every optimizer's step().

They are installed with the first patched model. A step that GradScaler leaves out never reaches
them, gradient accumulation reaches them once per window, and HF Trainer and accelerate call the
same optimizers.
"""

import gc
import weakref
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .nn.adapter import HyperAdapter

_adapters: weakref.WeakSet[HyperAdapter] = weakref.WeakSet()
_hooks: list[Any] = []


def watch(adapter: HyperAdapter) -> None:
    """From now on, let `adapter` know of the steps of the optimizer that holds its parameters."""
    _adapters.add(adapter)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for adapter in list(_adapters):
        if any(id(parameter) in held for parameter in adapter.parameters()):
            adapter.before_optimizer_step(optimizer)


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for adapter in list(_adapters):
        if id(adapter.leading_parameter) in held:
            adapter.after_optimizer_step()


def torch_optimizers() -> list[torch.optim.Optimizer]:
    """Every torch optimizer there is: one that was just restored has not stepped yet, and torch
    keeps no list of them."""
    found = (o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer))
    return [optimizer for optimizer in found if hasattr(optimizer, "state")]
