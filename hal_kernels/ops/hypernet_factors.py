"""Tokens to factors: the projections behind the hypernetworks' body, and the update rule [3.3].

With t the tokens of one width's rows (W, b: that width's pair; Λ has one of its own):

    factor = base + tWᵀ + b

base is the anchor or the state, or nothing ("replace"). `ragged.Slots` says where the tokens are.

    dt = dy·W     dW = dyᵀt     db = Σ dy

dt is zero where no row is. The base is the adapter's state: no gradient goes to it.

Backends: default (plain PyTorch, every device), cuda (`kernels.hypernet_factors`, in Triton).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ._library import define, expect_dtype, expect_floating, expect_same_device, expect_shape
from .hypernet_tokens import expect_equally_many, expect_map, expect_state
from .ragged import Slots, expect_slots, pad_sides, unpad_sides


def hypernet_factors(
    tokens: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    slots: Slots,
    base: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """All factors from their tokens: P by width ``[R_w, d_w]``, Λ ``[R]``, Q by width.

    Args:
        tokens: ``[3, G, r, H]`` of P, Λ and Q.
        weights: ``[d_w, H]`` for each factor; ``[1, H]`` for Λ.
        biases: ``[d_w]`` for each factor.
        slots: where each row's token is.
        base: what is added, of the factors' own shapes, or None.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also where the
            base requires a gradient, which it would not get.
    """
    expect_floating("tokens", tokens)
    expect_slots(slots, "tokens", tokens)
    heights, lam = slots.heights, len(slots.counts[0])
    if tokens.dim() != 4:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected [3, G, r, H]")
    hidden = tokens.shape[3]
    matrices = slots.offsets[0].shape[0] - 1
    expect_shape("tokens", tokens, (3, matrices, slots.max_rank, hidden), "[3, G, r, H] of slots")
    expect_equally_many(len(heights), weights=weights, biases=biases)
    if base is not None:
        expect_equally_many(len(heights), base=base)
    for index, rows in enumerate(heights):
        expect_floating(f"weights[{index}]", weights[index])
        width = 1 if index == lam or weights[index].dim() < 2 else weights[index].shape[0]
        expect_map(index, weights[index], biases[index], (width, hidden), "tokens", tokens)
        if base is not None:
            name = f"base[{index}]"
            shape = (rows,) if index == lam else (rows, width)
            expect_shape(name, base[index], shape, "the shape of the factor")
            expect_dtype(name, base[index], tokens.dtype, "the dtype of tokens")
            expect_same_device("tokens", tokens, **{name: base[index]})
            expect_state(name, base[index])
    with torch.autocast(tokens.device.type, enabled=False):
        factors: list[torch.Tensor] = _hypernet_factors(
            tokens, list(weights), list(biases), list(base or ()),
            slots.offsets, *slots.counts, *slots.sizes,
        )  # fmt: skip
    return factors


def hypernet_factors_reference(
    tokens: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    slots: Slots,
    base: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The formula, one matrix at a time."""

    def rows(side: int) -> torch.Tensor:
        ranks = slots.offsets[side].diff().tolist()
        return torch.cat([t[:rank] for t, rank in zip(tokens[side], ranks, strict=True)])

    parts = [*rows(0).split(slots.sizes[0]), rows(1), *rows(2).split(slots.sizes[1])]
    factors = [t @ w.t() + b for t, w, b in zip(parts, weights, biases, strict=True)]
    lam = len(slots.sizes[0])
    factors[lam] = factors[lam][:, 0]
    return factors if base is None else [b + f for b, f in zip(base, factors, strict=True)]


def _forward(
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    base: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    sizes_p: list[int],
    sizes_q: list[int],
) -> list[torch.Tensor]:
    total = sum(sizes_p)
    rows = unpad_sides(tokens, offsets, total).split([*sizes_p, total, *sizes_q])
    factors = [F.linear(t, w, b) for t, w, b in zip(rows, weights, biases, strict=True)]
    factors[len(sizes_p)] = factors[len(sizes_p)].flatten()
    return [b + f for b, f in zip(base, factors, strict=True)] if base else factors


def _forward_fake(
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    base: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    sizes_p: list[int],
    sizes_q: list[int],
) -> list[torch.Tensor]:
    heights = [*sizes_p, sum(sizes_p), *sizes_q]
    factors = [tokens.new_empty(n, w.shape[0]) for n, w in zip(heights, weights, strict=True)]
    factors[len(sizes_p)] = factors[len(sizes_p)].flatten()
    return factors


def _backward_default(
    dfactors: list[torch.Tensor],
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    lam = len(counts_p)
    rows = unpad_sides(tokens, offsets, dfactors[lam].shape[0])
    each = rows.split([dy.shape[0] for dy in dfactors])
    dys = [*dfactors[:lam], dfactors[lam][:, None], *dfactors[lam + 1 :]]
    dtokens = torch.cat([dy @ w for dy, w in zip(dys, weights, strict=True)])
    dweights = [dy.t() @ t for dy, t in zip(dys, each, strict=True)]
    return pad_sides(dtokens, offsets, tokens.shape[2]), dweights, [dy.sum(0) for dy in dys]


def _backward_fake(
    dfactors: list[torch.Tensor],
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    return (
        tokens.new_empty(tokens.shape),
        [w.new_empty(w.shape) for w in weights],
        [w.new_empty(w.shape[0]) for w in weights],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tokens, weights, _, base, offsets, ctx.counts_p, ctx.counts_q, _, _ = inputs
    ctx.count, ctx.base = len(weights), len(base)
    ctx.save_for_backward(tokens, *weights, *offsets)


def _autograd_backward(ctx: Any, dfactors: list[torch.Tensor]) -> tuple[Any, ...]:
    tokens, *rest = ctx.saved_tensors
    n = ctx.count
    dtokens, dweights, dbiases = _hypernet_factors_backward(
        dfactors, tokens, rest[:n], rest[n:], ctx.counts_p, ctx.counts_q
    )
    return (
        dtokens, list(dweights), list(dbiases), [None] * ctx.base, [None] * 3,
        None, None, None, None,
    )  # fmt: skip


def _forward_cuda(*args: Any) -> list[torch.Tensor]:
    from ..kernels.hypernet_factors import forward

    return forward(*args)


def _backward_cuda(*args: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    from ..kernels.hypernet_factors import backward

    return backward(*args)


_hypernet_factors = define(
    "hypernet_factors(Tensor tokens, Tensor[] weights, Tensor[] biases, Tensor[] base,"
    " Tensor[] offsets, int[] counts_p, int[] counts_q, int[] sizes_p, int[] sizes_q) -> Tensor[]",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)
_hypernet_factors_backward = define(
    "hypernet_factors_backward(Tensor[] dfactors, Tensor tokens, Tensor[] weights,"
    " Tensor[] offsets, int[] counts_p, int[] counts_q) -> (Tensor, Tensor[], Tensor[])",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
