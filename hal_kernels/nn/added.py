"""Sums of many tensors whose summands learn at rates of their own."""

from typing import Any

import torch


def adder(scale: float, *, copies: bool) -> type[torch.autograd.Function]:
    """``apply(*tensors, *others)``: each tensor plus `scale` times its other.

    Others get the gradient of the sum itself, not `scale` times it. As parameters they so learn at
    `scale` times the optimizer's rate, and weigh no more than others where gradients are clipped by
    their norm.

    Args:
        copies: give others copies of the gradients, in one launch. Without, those are the tensors'
            own: right if nothing else keeps these, as what is accumulated in place must be no one
            else's. Autograd would copy one by one.
    """

    class Added(torch.autograd.Function):
        # For torch.compile the scale is no argument, of which it would make a tensor, and the first
        # tensor one of its own: two alone after ctx it takes for a function without ctx.
        @staticmethod
        def forward(
            ctx: Any, first: torch.Tensor, *others: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            tensors = (first, *others)
            count = len(tensors) // 2
            return tuple(torch._foreach_add(tensors[:count], tensors[count:], alpha=scale))

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if copies:
                return *gradients, *torch._foreach_mul(gradients, 1.0)
            return *gradients, *(gradient.detach() for gradient in gradients)

    return Added
