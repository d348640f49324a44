"""Leaves that a backward pass leaves the gradients of generated factors in."""

from typing import Any

import torch


class Probed(torch.autograd.Function):
    """``apply(*tensors, *probes)``: the tensors, whose gradients the probes (zeros) get copies of.

    Copies, made in one launch, since autograd accumulates into them in place.
    """

    # The first tensor is an argument of its own for torch.compile, which takes a function of
    # `*tensors` alone for one without ctx.
    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = (first, *others)
        count = len(tensors) // 2
        return tuple(torch._foreach_add(tensors[:count], tensors[count:]))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *gradients, *torch._foreach_mul(gradients, 1.0)
