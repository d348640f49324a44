"""What the public functions look at: each argument once; and what autocast makes of x."""

from collections.abc import Sequence

import torch

from .._library import (
    expect_dtype,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_shape,
)


def check_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    at: str = "",
) -> None:
    """Raise TypeError or ValueError, naming the argument, for tensors no backend accepts.

    Args:
        at: what follows the names of a layer's tensors, "[1]" in a list of layers.
    """
    expect_floating("x", x)
    expect_floating(f"weight{at}", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight{at} has shape {tuple(weight.shape)}, expected [d_out, d_in]")
    d_out, d_in = weight.shape
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [..., {d_in}] "
            f"(weight{at} is [{d_out}, {d_in}])"
        )
    if bias is not None:
        expect_shape(f"bias{at}", bias, (d_out,), "[d_out]")
    check_factors(x, p, lam, q, d_in=d_in, d_out=d_out, at=at)
    expect_same_device("x", x, **{f"weight{at}": weight, f"bias{at}": bias})
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"x has dtype {x.dtype}, weight{at} {weight.dtype}"
            + ("" if bias is None else f", bias{at} {bias.dtype}")
            + ": expected one dtype (cast x, or use torch.autocast)"
        )


def check_base(y: torch.Tensor, x: torch.Tensor) -> None:
    expect_floating("y", y)
    expect_floating("x", x)
    if y.dim() == 0:
        raise ValueError("y has shape (), expected [..., d_out]")
    if x.dim() == 0:
        raise ValueError("x has shape (), expected [..., d_in]")
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"y has leading dimensions {tuple(y.shape[:-1])}, expected {tuple(x.shape[:-1])} (x's)"
        )
    expect_same_device("x", x, y=y)


def check_factors(
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    *,
    d_in: int,
    d_out: int,
    at: str = "",
) -> None:
    expect_floating(f"p{at}", p)
    expect_floating(f"lam{at}", lam)
    expect_floating(f"q{at}", q)
    rank = p.shape[0] if p.dim() == 2 else -1
    expect_shape(f"p{at}", p, (rank, d_in), "[r, d_in]")
    expect_shape(f"lam{at}", lam, (rank,), "[r]")
    expect_shape(f"q{at}", q, (rank, d_out), "[r, d_out]")
    expect_same_device("x", x, **{f"p{at}": p, f"lam{at}": lam, f"q{at}": q})


def check_options(
    x: torch.Tensor,
    lam: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
) -> torch.Tensor:
    """Λ⊙mask."""
    expect_number("scaling", scaling)
    expect_number("dropout", dropout, least=0.0, below=1.0)
    expect_number("tangent", tangent, least=0.0)
    if seed is not None:
        expect_dtype("seed", seed, torch.int64, "a scalar")
        expect_shape("seed", seed, (), "a scalar")
        expect_same_device("x", x, seed=seed)
    if mask is None:
        return lam
    expect_shape("mask", mask, tuple(lam.shape), "[r]")
    expect_same_device("lam", lam, mask=mask)
    return lam * mask


def refuse(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    base: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """Raise what is wrong with an input."""
    if weight is not None:
        check_layer(x, weight, base, p, lam, q)
    elif base is not None:
        check_base(base, x)
        check_factors(x, p, lam, q, d_in=x.shape[-1], d_out=base.shape[-1])
    raise ValueError(f"x {tuple(x.shape)} does not fit its layer")


def casts(x: torch.Tensor) -> bool:
    """Whether autocast changes x's dtype."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def cast(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """x, weights and biases in autocast's dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return (
        x.to(dtype),
        [w.to(dtype) for w in weights],
        [None if b is None else b.to(dtype) for b in biases],
    )
