# mypy: allow-untyped-defs
"""Launches that cost next to no host time.

Triton's own way, ``kernel[grid](...)``, looks at every argument of every launch again. But sizes,
grids and numbers follow from the kinds of the tensors, and so does what Triton compiles. Functions
of `kinds` therefore compute them once (`kept`) and return a `Launch`. From the second time on a
launch is a look-up and a call of what Triton compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# CompiledKernel.run and what it takes are no public interface: these versions agree on them.
DIRECT = (3, 5) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7)
"""Whether launches pass Triton by where they can; in other versions it does all of them."""


class Kind(NamedTuple):
    """All of a tensor that a launch depends on but its address, which is an argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    at_16: bool  # its address is divisible by 16, which Triton compiles for

    def rows(self) -> "Kind":
        """A matrix's own, or that of a contiguous ``[..., d]`` seen as ``[T, d]``."""
        *lead, d = self.shape
        return self if len(lead) == 1 else self._replace(shape=(math.prod(lead), d), stride=(d, 1))

    def columns(self, first: int, count: int) -> "Kind":
        """Of some columns, of float32."""
        at_16 = self.at_16 and first % 4 == 0
        return self._replace(shape=(*self.shape[:-1], count), at_16=at_16)


def kinds(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The kind of each tensor, as a plain tuple: these are made for every launch."""
    return tuple([
        t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors
    ])  # fmt: skip


def aligned(*tensors: Kind) -> bool:
    """Whether rows of all these matrices start on 16 bytes and have 16·n elements.

    Then Triton loads 16 bytes at a time and asynchronously; else one element, through registers.
    """
    return all(t.shape[1] % 16 == 0 and t.stride[0] % 16 == 0 and t.at_16 for t in tensors)


def kept(function: Callable[..., Any]) -> Any:
    """``function(gpu, *kinds, *options)``, to be called as ``function(gpu, kinds(...), *options)``.

    It is computed once for equal arguments, unless thousands of others came in between (batches of
    many lengths), and gets each kind as a `Kind`, or None. ``function.__wrapped__`` is itself.
    """

    @functools.lru_cache(maxsize=4096)
    def plan(gpu: Any, found: tuple[Any, ...], *options: Any) -> Any:
        return function(gpu, *(k if k is None else Kind(*k) for k in found), *options)

    return functools.wraps(function)(plan)


class Launch:
    """A kernel's launch but for its tensors, which come first among its parameters.

    Args:
        grid: programs, a number a dimension.
        numbers: the parameters after the tensors, in their order.
        constants: the constexpr parameters, which come last, and options of the compiler.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "ready")

    def __init__(self, *grid: int, numbers: tuple[Any, ...], **constants: Any) -> None:
        self.grid, self.numbers, self.constants = grid, numbers, constants
        self.kernel: Any = None
        self.ready: dict[int, tuple[Any, ...]] = {}  # by device

    def __call__(self, kernel: Any, *tensors: Any) -> None:
        """Launch `kernel` on the current device and in its current stream.

        Args:
            tensors: tensors, tuples of them, or None; of the same kinds each time.
        """
        hooks = knobs.runtime
        # A profiler's hooks are told of a launch by Triton.
        hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        if self.kernel is kernel and not hooked:
            gpu = driver.active
            device = gpu.get_current_device()
            found = self.ready.get(device)
            if found is not None:
                run, grid, function, metadata, rest = found
                stream = gpu.get_current_stream(device)
                run(*grid, stream, function, metadata, None, None, None, *tensors, *rest)
                return
        compiled = kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if DIRECT and isinstance(compiled, CompiledKernel) and isinstance(kernel, JITFunction):
            self._keep(kernel, compiled)

    def _keep(self, kernel: JITFunction[Any], compiled: CompiledKernel) -> None:
        if self.kernel is not kernel:
            self.kernel, self.ready = kernel, {}
        constants = (self.constants[n] for n in kernel.arg_names if n in self.constants)
        grid, rest = (*self.grid, 1, 1)[:3], (*self.numbers, *constants)
        self.ready[driver.active.get_current_device()] = (
            compiled.run, grid, compiled.function, compiled.packed_metadata, rest,
        )  # fmt: skip
