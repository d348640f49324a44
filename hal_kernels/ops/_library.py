"""How every operator of this package is registered with torch.library.

An operator's file calls `define` once with its schema and its three device-independent parts. The
default implementation, in plain PyTorch, sits under CompositeExplicitAutograd and so serves every
device; a faster backend registers the same operator under its own dispatch key (``CPU`` for csrc,
``CUDA`` for Triton), which the dispatcher prefers. Nothing else has to change for it.
"""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hal"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TRITON: dict[str, Callable[..., Any]] = {}
"""Operator -> its Triton implementation, where there is one (also without triton and a GPU)."""


def define(
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    first_only: bool = False,
) -> None:
    """Register one operator: schema, default backend, shape function and gradient.

    Args:
        schema: what ``Library.define`` takes, e.g. ``"name(Tensor x) -> Tensor"``.
        default: implementation for every device, run below autograd.
        cuda: implementation in Triton, for CUDA and ROCm devices, with the default's signature. It
            imports its kernels when it is first called; where triton is missing the default serves.
        fake: returns empty outputs from input shapes; None for operators that return nothing.
        setup_context, backward: as for `torch.library.register_autograd`. Operators that *are* a
            gradient, or that only update state, pass none: differentiating through them raises.
        first_only: of several outputs only the first has a gradient. Autograd would fill zeros for
            each of the others, one launch a layer.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _without_autocast(default), "CompositeExplicitAutograd")
    if cuda is not None:
        TRITON[name] = cuda
    if cuda is not None and importlib.util.find_spec("triton") is not None:
        _LIBRARY.impl(name, _without_autocast(cuda), "CUDA")
    torch.library.register_fake(qualified, fake or (lambda *args: None), lib=_LIBRARY)
    if backward is not None and setup_context is not None:
        if first_only:
            setup_context, backward = _without_zeros(setup_context, backward)
        torch.library.register_autograd(
            qualified, _without_autocast(backward), setup_context=setup_context, lib=_LIBRARY
        )
    elif fake is not None:
        torch.library.register_autograd(qualified, _no_gradient(name), lib=_LIBRARY)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in its inputs' own dtypes, also where autocast surrounds a backward pass."""

    def run(*args: Any) -> Any:
        flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
        first = next((a for a in flat if isinstance(a, torch.Tensor)), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return function(*args)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args)

    return run


def _without_zeros(
    setup_context: Callable[..., None], backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Both, where gradients that autograd has not computed stay None."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    def run(ctx: Any, first: torch.Tensor | None, *others: Any) -> Any:
        if first is not None:
            return backward(ctx, first, *others)
        needs = ctx.needs_input_grad
        return tuple([None] * len(n) if isinstance(n, tuple | list) else None for n in needs)

    return setup, run


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative: double backward is not supported here"
        )

    return backward


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 for storage types of 16 bits, else `dtype` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def expect_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError naming the argument unless it is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")


def expect_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, why: str) -> None:
    """Raise TypeError naming the argument unless it is a tensor of `dtype`."""
    expect_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype} ({why})")


def expect_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raise ValueError naming the argument unless ``tensor.shape == expected``."""
    expect_tensor(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} ({why})")


def expect_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError naming the argument unless it is a real floating-point tensor."""
    expect_tensor(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")


def expect_same_device(reference: str, like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not on ``like``'s device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {like.device} (the device of {reference})"
            )
