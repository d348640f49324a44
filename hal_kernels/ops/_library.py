"""How every operator of this package is registered with torch.library.

The default implementation, in plain PyTorch, sits under CompositeExplicitAutograd and so serves
every device; a faster backend registers the same operator under its own dispatch key (``CPU`` for
csrc, ``CUDA`` for Triton), which the dispatcher prefers. Nothing else has to change for it.
"""

import functools
import importlib.util
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

NAMESPACE = "hal"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TRITON: dict[str, Callable[..., Any]] = {}
"""Operator -> its Triton implementation, where there is one (also without triton and a GPU)."""


def register(
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """Register one operator that is called below autograd: schema, backends and shape function.

    Args:
        schema: what ``Library.define`` takes, e.g. ``"name(Tensor x) -> Tensor"``.
        default: implementation for every device.
        cuda: implementation in Triton, for CUDA and ROCm devices, with the default's signature. It
            imports its kernels when it is first called; where triton is missing the default serves.
        fake: returns empty outputs from input shapes; None for operators that return nothing.

    Returns:
        The operator, to be called with positional arguments, in an `autograd.Function` or where
        no gradient is wanted. Autograd passes it by.
    """
    operator = _registered(schema, default, fake, cuda)
    # Without a kernel there, torch looks for gradients at every call.
    _LIBRARY.impl(operator._opname, torch.library.fallthrough_kernel, "Autograd")
    return operator


def define(
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    first_only: bool = False,
) -> Any:
    """Register an operator, as `register` does, with its gradient.

    Args:
        setup_context, backward: as for `torch.library.register_autograd`. Operators that *are* a
            gradient pass none: differentiating through them raises. Those that update state in
            place have no gradient either.
        first_only: of several outputs only the first has a gradient. Autograd would fill zeros for
            each of the others, one launch a layer.
    """
    operator = _registered(schema, default, fake, cuda)

    name: str = operator._opname
    differentiate = without_autocast(backward or _no_gradient(name))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        if first_only:
            ctx.set_materialize_grads(False)
            lists = [isinstance(i, list) and all(map(torch.is_tensor, i)) for i in inputs]
            ctx.no_gradients = tuple(
                [None] * len(i) if is_list else None
                for i, is_list in zip(inputs, lists, strict=True)
            )

    def gradients(ctx: Any, *upstream: Any) -> Any:
        if first_only and upstream[0] is None:
            return ctx.no_gradients
        return differentiate(ctx, *upstream)

    if not operator._schema.is_mutable:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", gradients, setup_context=setup, lib=_LIBRARY
        )
    return operator


def _registered(
    schema: str,
    default: Callable[..., Any],
    fake: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None,
) -> Any:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, without_autocast(default), "CompositeExplicitAutograd")
    if cuda is not None:
        TRITON[name] = cuda
        if importlib.util.find_spec("triton") is not None:
            _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *args: None), lib=_LIBRARY)
    return getattr(torch.ops.hal, name).default


def gradient(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of an `autograd.Function`: for once, and in its inputs' own dtypes.

    A gradient of dx refuses even if dy needs none: dx depends on the factors, too.
    """
    careful = without_autocast(backward)
    once = once_differentiable(careful)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            # torch refuses only if one of them needs a gradient.
            return once(ctx, *(g if g is None else g.detach().requires_grad_() for g in gradients))
        return careful(ctx, *gradients)

    return run


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in its inputs' own dtypes, also where autocast surrounds a backward pass."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
        first = next((a for a in flat if isinstance(a, torch.Tensor)), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return function(*args)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args)

    return run


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
    """Raise TypeError naming the argument unless it is a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected a dense tensor")


def expect_tensors(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise TypeError or ValueError naming the argument unless it is a list of some tensors."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name} is a {type(tensors).__name__}, expected a list of tensors")
    if not tensors:
        raise ValueError(f"{name} is empty, expected at least one tensor")
    for index, tensor in enumerate(tensors):
        expect_tensor(f"{name}[{index}]", tensor)


def expect_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """`value` as a float; raise TypeError or ValueError naming it unless it is in the range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer too large for a float") from None
    if number >= least and above < number < below:
        return number
    bounds = [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"more than {above:g}"] if above > -math.inf else []
    bounds += [f"less than {below:g}"] if below < math.inf else []
    raise ValueError(f"{name} is {value}, expected {' and '.join(bounds) or 'a finite number'}")


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
