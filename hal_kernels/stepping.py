"""How optimizer steps are noticed: two hooks that torch calls around every optimizer's step().

They are installed with the first patched model. A step that GradScaler leaves out never reaches
them, gradient accumulation reaches them once per window, and HF Trainer and accelerate call the
same optimizers.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .nn.adapter import HyperAdapter
from .nn.instances import instances

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


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    held = _held(optimizer)
    stepped = []
    for adapter in list(_adapters):
        if any(id(parameter) in held for parameter in adapter.parameters()):
            stepped.append(adapter)
        elif _is_left_out(adapter, held):
            adapter.notices.left_out()

    def check() -> None:
        for adapter in stepped:
            adapter.before_optimizer_step(optimizer)

    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
    if not stepped or not callable(closure):
        check()
        return None
    inner = (v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer))
    if any(_held(other) & held for other in inner):
        return None  # SAM and its kin put parameters back, and the one inside steps: checked then
    wrapped = _checked(closure, check)
    if len(args) > 1:
        return (args[0], wrapped, *args[2:]), kwargs
    return args, kwargs | {"closure": wrapped}


def _checked(closure: Callable[[], Any], check: Callable[[], None]) -> Callable[[], Any]:
    """`closure`, whose backward pass makes the gradients of a step, with `check` after it."""

    def run() -> Any:
        loss = closure()
        check()
        return loss

    return run


def _is_left_out(adapter: HyperAdapter, held: set[int]) -> bool:
    """Whether an optimizer that holds other parameters (by id) of the model is all there is."""
    model = None if adapter.patched is None else adapter.patched()
    own = {id(parameter) for parameter in adapter.parameters() if parameter.grad is not None}
    if adapter.notices.optimized or model is None or not own:
        return False
    if not any(id(parameter) in held for parameter in model.parameters()):
        return False
    # One of several optimizers, perhaps: looked for once, as that takes a while.
    adapter.notices.optimized = any(own & _held(other) for other in torch_optimizers())
    return not adapter.notices.optimized


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for adapter in list(_adapters):
        if id(adapter.leading_parameter) in held:
            adapter.after_optimizer_step()


def torch_optimizers() -> list[torch.optim.Optimizer]:
    """Every torch optimizer there is: one that was just restored has not stepped yet."""
    return [o for o in instances(torch.optim.Optimizer) if hasattr(o, "state")]
