"""Gradients of operators, as `torch.library.register_autograd` gives them but in less host time.

torch's own looks for defaults, keywords and nested lists in every call, and enters the dispatcher
twice. A layer with a token or two takes less time than that. Here lists are known from the schema,
and an eager call of plain tensors goes straight to the gradient and to the kernel below it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Subclasses of torch.Tensor may have a dispatch of their own.
_PLAIN = {torch.Tensor, torch.nn.Parameter, float, int, bool, type(None), list}
_DEVICES = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}

Kernel = Callable[..., Any]
Lengths = tuple[int | None, ...]
"""For each value the number of tensors in its list, None for what is no list."""


def attach_gradient(
    library: torch.library.Library,
    operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    *,
    first_only: bool,
) -> Callable[..., Any]:
    """Give `operator` its gradient under every autograd key.

    Args:
        library: that defined it.
        operator: an OpOverload with positional arguments.
        setup_context, backward: as for `torch.library.register_autograd`; lists stay lists.
        first_only: of several outputs only the first has a gradient. Autograd would fill zeros for
            each of the others, one launch a layer.

    Returns:
        The operator, to be called with positional arguments.
    """
    listed = _lists(operator._schema.arguments)
    make = _function if listed is None else _function_of_lists
    apply, apply_directly = make(operator._schema, setup_context, backward, first_only)
    redispatch = operator._handle.redispatch_boxed
    kernels = {
        device: functools.partial(redispatch, torch._C.DispatchKeySet(key))
        for device, key in _DEVICES.items()
    }

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        flat = args if listed is None else _flat(args, _lengths(args, listed))
        first = flat[0] if listed is None else _first_tensor(flat)
        kernel = kernels.get(first.device.type)
        if (
            kernel is None
            or first.is_neg()  # a view that is yet to be negated
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or not _PLAIN.issuperset(map(type, flat))
        ):
            return operator(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return apply_directly(kernel, args)
        return kernel(*args)

    def dispatched(keys: Any, *args: Any) -> Any:
        def kernel(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return redispatch(keys & torch._C._after_autograd_keyset, *args)

        flat = args if listed is None else _flat(args, _lengths(args, listed))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return apply(kernel, args)
        return kernel(*args)

    library.impl(operator._opname, dispatched, "Autograd", with_keyset=True)
    return call


def _function(
    schema: Any, setup_context: Callable[..., None], backward: Callable[..., Any], first_only: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How to call a kernel with a gradient: in any case, and without functorch."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, kernel = args
            output = kernel(*inputs)
            setup_context(ctx, inputs, output)
            if first_only:
                ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if first_only and gradients[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            return *backward(ctx, *gradients), None

    named = _named(Gradient, schema)
    directly = _without_functorch(named)
    return (
        lambda kernel, args: named.apply(*args, kernel),
        lambda kernel, args: directly(*args, kernel),
    )


def _function_of_lists(
    schema: Any, setup_context: Callable[..., None], backward: Callable[..., Any], first_only: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same for operators that take lists of tensors, which autograd does not look into."""
    listed, listed_outputs = _lists(schema.arguments), _lists(schema.returns)
    assert listed is not None

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *flat, lengths, kernel = args
            inputs = _nested(flat, lengths)
            output = kernel(*inputs)
            setup_context(ctx, inputs, output)
            if first_only:
                ctx.set_materialize_grads(False)
            ctx.lengths = lengths, None
            if listed_outputs is None:
                return output
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.lengths = lengths, _lengths(outputs, listed_outputs)
            return *_flat(outputs, ctx.lengths[1]), ctx.lengths[1]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            needs = ctx.needs_input_grad
            if first_only and gradients[0] is None:
                return (None,) * len(needs)
            inputs, outputs = ctx.lengths
            if outputs is not None:
                gradients = _nested(gradients[:-1], outputs)
            ctx.needs_input_grad = _nested(needs[:-2], inputs)
            try:
                return *_flat(backward(ctx, *gradients), inputs), None, None
            finally:
                ctx.needs_input_grad = needs  # there may be another backward pass

    def calling(apply: Callable[..., Any]) -> Callable[..., Any]:
        def call(kernel: Kernel, args: Sequence[Any]) -> Any:
            lengths = _lengths(args, listed)
            output = apply(*_flat(args, lengths), lengths, kernel)
            if listed_outputs is None:
                return output
            outputs = _nested(output[:-1], output[-1])
            return outputs if len(outputs) > 1 else outputs[0]

        return call

    named = _named(Gradient, schema)
    return calling(named.apply), calling(_without_functorch(named))


def _named(function: type[torch.autograd.Function], schema: Any) -> Any:
    """`function` under its operator's name, which profilers and grad_fn show."""
    return type(schema.name.replace("::", "_"), (function,), {})


def _without_functorch(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What `function`.apply calls itself, once it has seen to functorch's transforms."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _lists(values: Any) -> list[bool] | None:
    """Which of a schema's arguments or returns are Tensor[] or Tensor?[]; None if none is."""
    kinds = [isinstance(v.type, torch.ListType) and "Tensor" in str(v.type) for v in values]
    return kinds if any(kinds) else None


def _first_tensor(values: Sequence[Any]) -> torch.Tensor:
    return next(v for v in values if isinstance(v, torch.Tensor))


def _lengths(values: Sequence[Any], listed: Sequence[bool]) -> Lengths:
    return tuple(len(v) if is_list else None for v, is_list in zip(values, listed, strict=True))


def _flat(values: Sequence[Any], lengths: Lengths) -> list[Any]:
    """With the tensors of lists in their places; None for a list stands for a list of None."""
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat.extend([None] * length if value is None else value)
    return flat


def _nested(flat: Sequence[Any], lengths: Lengths) -> tuple[Any, ...]:
    """The inverse of `_flat`."""
    values: list[Any] = []
    begin = 0
    for length in lengths:
        if length is None:
            values.append(flat[begin])
            begin += 1
        else:
            values.append(list(flat[begin : begin + length]))
            begin += length
    return tuple(values)
