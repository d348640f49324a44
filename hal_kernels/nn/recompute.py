"""Gradients of layers that activation checkpointing runs again inside a backward pass.

The non-reentrant kind only wants the same values again. The reentrant kind runs the layers under
no_grad at first, and later a backward pass of its own, which must not reach the graph that
generated the factors: other blocks still need it. So recomputed layers get leaves; `Join`, a node
between the generated factors and all layers, adds what the leaves collected.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .layout import Layout
from .packed import LayerFactors, Packed

Gradients = Sequence[torch.Tensor | None]


class Recomputed:
    """Leaves for the layers that one backward pass runs again.

    Args:
        layout: of the packed factors.
        views: every layer's factors, with the values of the first run.
    """

    def __init__(self, layout: Layout, views: list[LayerFactors]) -> None:
        self.layout, self.views = layout, views
        self.leaves: dict[int, LayerFactors] = {}

    def factors(self, index: int) -> LayerFactors:
        """One layer's leaves: the same ones however often it is run."""
        if index not in self.leaves:
            p, lam, q = (t.detach().requires_grad_() for t in self.views[index])
            self.leaves[index] = (p, lam, q)
        return self.leaves[index]

    def hold_gradients(self) -> bool:
        """Whether a backward pass has left gradients in the leaves."""
        return any(leaf.grad is not None for leaves in self.leaves.values() for leaf in leaves)

    def added_to(self, gradients: Gradients) -> Gradients:
        """Packed gradients, in the order of `Packed.tensors`, with those of the leaves added."""
        if not self.hold_gradients():
            return gradients

        def packed(part: int, layers: Sequence[int]) -> torch.Tensor:
            own = (self.leaves.get(i, self.views[i])[part] for i in layers)
            return torch.cat([torch.zeros_like(t) if t.grad is None else t.grad for t in own])

        layout = self.layout
        extra = Packed(
            tuple(packed(0, group.layers) for group in layout.p.groups),
            packed(1, range(len(layout.layers))),
            tuple(packed(2, group.layers) for group in layout.q.groups),
        ).tensors()
        return [e if g is None else g + e for g, e in zip(gradients, extra, strict=True)]


class Join(torch.autograd.Function):
    """Identity on the packed factors; its backward runs after that of every layer.

    Also where layers are recomputed: autograd runs ready nodes latest-made first, and this one is
    made before the first layer. ``collect`` maps the packed gradients to the complete ones.
    """

    @staticmethod
    def forward(
        ctx: Any, collect: Callable[[Gradients], Gradients], *packed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.collect = collect
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in packed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.collect(gradients)


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


class Tie(torch.autograd.Function):
    """Identity on a model output that makes its graph reach the factors, adding no gradient.

    Under reentrant checkpointing nothing else might: the layers left no graph of their own.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def inside_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
