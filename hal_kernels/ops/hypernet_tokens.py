"""Factors to tokens: the projections in front of the hypernetworks' body [3.3].

One token per singular direction. With x the packed rows of one width (W, b: that width's pair), for
P and Q, and with e the embedding of each direction, for Λ:

    token = xWᵀ + b               token = λ·wᵀ + b + e          usable = mask > 0

put where `ragged.Slots` says, the tokens of all matrices padded to equal height: zeros, not usable.

    dW = dtᵀx     db = Σ dt     dw = dtᵀλ     de = dt           over the tokens of a width

The factors are the adapter's state: no gradient goes to them.

Backends: default (plain PyTorch, every device), cuda (`kernels.hypernet_tokens`, in Triton).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ._library import (
    define,
    expect_dtype,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensor,
)
from .ragged import Slots, expect_slots, pad_sides, unpad_sides


def hypernet_tokens(
    factors: Sequence[torch.Tensor],
    mask: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    embedding: torch.Tensor,
    slots: Slots,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All factors' tokens, padded, and which of them are kept directions.

    Args:
        factors: P by width ``[R_w, d_w]``, Λ ``[R]``, Q by width; all of one dtype.
        mask: ``[R]``, positive where a direction is kept; in the row order of Λ.
        weights: ``[H, d_w]`` for each of `factors`; ``[H, 1]`` for Λ.
        biases: ``[H]`` for each of `factors`.
        embedding: ``[R, H]``, added to the tokens of Λ.
        slots: where each row goes.

    Returns:
        tokens ``[3, G, r, H]`` of P, Λ and Q, and ``[3, G, r]`` bool, True for a kept direction.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also where a
            factor requires a gradient, which none would get.
    """
    expect_floating("embedding", embedding)
    expect_slots(slots, "embedding", embedding)
    heights, lam = slots.heights, len(slots.counts[0])
    expect_equally_many(len(heights), factors=factors, weights=weights, biases=biases)
    if embedding.dim() != 2 or embedding.shape[0] != heights[lam]:
        raise ValueError(
            f"embedding has shape {tuple(embedding.shape)}, expected [R, H] with R = {heights[lam]}"
            " (slots.rows[0] is [R])"
        )
    hidden = embedding.shape[1]
    expect_floating("mask", mask)
    expect_shape("mask", mask, (heights[lam],), "[R]")
    expect_same_device("embedding", embedding, mask=mask)
    for index, (factor, rows) in enumerate(zip(factors, heights, strict=True)):
        name = f"factors[{index}]"
        expect_tensor(name, factor)
        width = 1 if index == lam or factor.dim() < 2 else factor.shape[1]
        shape = (rows,) if index == lam else (rows, width)
        expect_shape(name, factor, shape, "Λ, [R]" if index == lam else "rows of one width")
        expect_dtype(name, factor, embedding.dtype, "the dtype of embedding")
        expect_same_device("embedding", embedding, **{name: factor})
        expect_state(name, factor)
        expect_map(index, weights[index], biases[index], (hidden, width), "embedding", embedding)
    with torch.autocast(embedding.device.type, enabled=False):
        return _hypernet_tokens(
            list(factors), mask, list(weights), list(biases), embedding,
            *slots[:2], *slots.counts, slots.max_rank,
        )  # fmt: skip


def expect_equally_many(count: int, **lists: Sequence[torch.Tensor]) -> None:
    """Raise unless each of `lists` has an entry for every factor that the slots speak of."""
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} is a {type(tensors).__name__}, expected a list of tensors")
        if len(tensors) != count:
            raise ValueError(
                f"{name} has {len(tensors)} entries, expected {count}"
                " (the widths of P in slots, Λ, the widths of Q)"
            )


def expect_state(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError where a gradient is wanted that the operator does not compute."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, expected state: pass {name}.detach()")


def expect_map(
    index: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: tuple[int, int],
    reference: str,
    like: torch.Tensor,
) -> None:
    """Raise unless `weight` and `bias` are a linear map's, of this shape and of like's dtype."""
    for name, tensor, expected, why in (
        (f"weights[{index}]", weight, shape, "[out, in]"),
        (f"biases[{index}]", bias, shape[:1], "[out]"),
    ):
        expect_shape(name, tensor, expected, why)
        expect_dtype(name, tensor, like.dtype, f"the dtype of {reference}")
        expect_same_device(reference, like, **{name: tensor})


def hypernet_tokens_reference(
    factors: Sequence[torch.Tensor],
    mask: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    embedding: torch.Tensor,
    slots: Slots,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, one matrix at a time."""
    lam = len(slots.counts[0])
    maps = list(zip(factors, weights, biases, strict=True))
    x, w, b = maps[lam]
    sides = (
        (torch.cat([x @ w.t() + b for x, w, b in maps[:lam]]), mask[slots.rows[0]]),
        (torch.outer(x, w[:, 0]) + b + embedding, mask),
        (torch.cat([x @ w.t() + b for x, w, b in maps[lam + 1 :]]), mask[slots.rows[1]]),
    )
    tokens, usable = [], []
    for (rows, kept), offsets in zip(sides, slots.offsets, strict=True):
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            below = slots.max_rank - (end - start)
            tokens.append(F.pad(rows[start:end], (0, 0, 0, below)))
            usable.append(F.pad(kept[start:end] > 0, (0, below)))
    shape = (3, slots.offsets[0].shape[0] - 1, slots.max_rank)
    return torch.stack(tokens).view(*shape, -1), torch.stack(usable).view(shape)


def _forward(
    factors: list[torch.Tensor],
    mask: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    embedding: torch.Tensor,
    rows: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    max_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    lam = len(counts_p)
    inputs = [*factors[:lam], factors[lam][:, None], *factors[lam + 1 :]]
    tokens = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    tokens[lam] = tokens[lam] + embedding
    kept = mask > 0
    usable = torch.cat([kept[rows[0]], kept, kept[rows[1]]])
    return pad_sides(torch.cat(tokens), offsets, max_rank), pad_sides(usable, offsets, max_rank)


def _forward_fake(
    factors: list[torch.Tensor],
    mask: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    embedding: torch.Tensor,
    rows: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    max_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (3, offsets[0].shape[0] - 1, max_rank)
    tokens = embedding.new_empty(*shape, embedding.shape[1])
    return tokens, tokens.new_empty(shape, dtype=torch.bool)


def _backward_default(
    dtokens: torch.Tensor,
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    lam = len(counts_p)
    rows = unpad_sides(dtokens, offsets, factors[lam].shape[0])
    each = rows.split([f.shape[0] for f in factors])
    inputs = [*factors[:lam], factors[lam][:, None], *factors[lam + 1 :]]
    dweights = [dt.t() @ x for dt, x in zip(each, inputs, strict=True)]
    return dweights, [dt.sum(0) for dt in each], each[lam].clone()


def _backward_fake(
    dtokens: torch.Tensor,
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    hidden, lam = dtokens.shape[-1], len(counts_p)
    widths = [1 if i == lam else f.shape[1] for i, f in enumerate(factors)]
    return (
        [dtokens.new_empty(hidden, width) for width in widths],
        [dtokens.new_empty(hidden) for _ in widths],
        dtokens.new_empty(factors[lam].shape[0], hidden),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    factors, _, _, _, _, _, offsets, ctx.counts_p, ctx.counts_q, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count = len(factors)
    ctx.save_for_backward(*factors, *offsets)


def _autograd_backward(ctx: Any, dtokens: torch.Tensor, _dusable: Any) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.count
    dweights, dbiases, dembedding = _hypernet_tokens_backward(
        dtokens, saved[:n], saved[n:], ctx.counts_p, ctx.counts_q
    )
    return (
        [None] * n, None, list(dweights), list(dbiases), dembedding,
        [None] * 2, [None] * 3, None, None, None,
    )  # fmt: skip


def _forward_cuda(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from ..kernels.hypernet_tokens import forward

    return forward(*args)


def _backward_cuda(*args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    from ..kernels.hypernet_tokens import backward

    return backward(*args)


_hypernet_tokens = define(
    "hypernet_tokens(Tensor[] factors, Tensor mask, Tensor[] weights, Tensor[] biases,"
    " Tensor embedding, Tensor[] rows, Tensor[] offsets, int[] counts_p, int[] counts_q,"
    " int max_rank) -> (Tensor, Tensor)",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    first_only=True,
)
_hypernet_tokens_backward = define(
    "hypernet_tokens_backward(Tensor dtokens, Tensor[] factors, Tensor[] offsets, int[] counts_p,"
    " int[] counts_q) -> (Tensor[], Tensor[], Tensor)",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
