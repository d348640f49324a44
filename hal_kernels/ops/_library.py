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
) -> Callable[..., Any]:
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

    Returns:
        The operator, to be called with positional arguments.
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
        backward = _without_autocast(backward)
    elif fake is not None:
        backward, setup_context = _no_gradient(name), _nothing_saved
    operator = getattr(torch.ops.hal, name).default
    if backward is None or setup_context is None:
        return operator
    if "[]" in schema:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_LIBRARY
        )
        return operator
    return _register_autograd(operator, setup_context, backward)


def _nothing_saved(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _register_autograd(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`torch.library.register_autograd` for an operator without lists, at a fraction of its time.

    torch's own prepares every call for defaults, keywords and lists, and takes longer for that than
    a layer does for a token or two. Returns the operator as a function that, in eager mode, goes to
    its gradient without the dispatcher's way there and back.
    """
    below = torch._C._after_autograd_keyset

    class Gradient(torch.autograd.Function):
        # The last argument: the dispatch keys of the call, None for all.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs, keys = args[:-1], args[-1]
            output = run_below(keys, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None

    def run_below(keys: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args) if keys is None else operator.redispatch(keys & below, *args)

    def run(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Gradient.apply(*args, keys)
        return run_below(keys, *args)

    def call(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else run(None, *args)

    _LIBRARY.impl(operator._opname, run, "Autograd", with_keyset=True)
    return call


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
