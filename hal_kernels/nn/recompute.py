"""Layers that run again, and factors that are generated again, inside a backward pass.

Activation checkpointing of the non-reentrant kind runs layers again for the values they saved, and
throws the graph of this second run away: the factors of the last pass are all that it needs. The
reentrant kind runs them without a graph at first, and a backward pass of its own through each
checkpoint, for which the graph that generated all layers' factors would be needed every time. It is
refused.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction


class Regenerate(torch.autograd.Function):
    """Generated tensors through which any number of backward passes may run.

    ``generate()`` makes them from `inputs`, the leaves they depend on; each backward makes them
    again. Two losses may so share one generation, which a plain graph would free after the first.
    """

    @staticmethod
    def forward(
        ctx: Any, generate: Callable[[], list[torch.Tensor]], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.generate, ctx.inputs = generate, inputs
        ctx.set_materialize_grads(False)
        return tuple(generate())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        with torch.enable_grad():
            pairs = zip(ctx.generate(), gradients, strict=True)
            reached = [(out, g) for out, g in pairs if g is not None]
        outputs, known = [out for out, _ in reached], [g for _, g in reached]
        return None, *torch.autograd.grad(outputs, ctx.inputs, known, allow_unused=True)


def inside_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_reentrant() -> None:
    """For layers that run without a graph in a training pass, or again in a backward pass.

    Raises:
        RuntimeError: reentrant activation checkpointing runs them.
    """
    if torch.compiler.is_compiling():
        return
    reentrant = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in reentrant:
            raise RuntimeError(
                "an adapter can't train under reentrant activation checkpointing: pass "
                "use_reentrant=False to torch.utils.checkpoint, or in transformers "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        frame = frame.f_back
