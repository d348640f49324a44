"""Instruments of these tests: which kernels ran, and whether they kept to their outputs."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAND = 64  # elements before and after each output; keeps its alignment
CANARY = -12345.0  # exact in every dtype but bfloat16, where it is rounded alike each time

# A float32 product is exact under the interpreter and split into TF32 parts on a GPU, good to 2⁻²¹;
# the sums of a few hundred of them lose about as much again, and a few follow each other.
EXACT = 2**-18


class _Logged:
    """A kernel that notes its launches."""

    def __init__(self, name: str, kernel, log: list[str]) -> None:
        self.name, self.kernel, self.log = name, kernel, log

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.log.append(self.name)
            with _disable_current_modes():  # of what the interpreter does with torch
                return self.kernel[grid](*args, **options)

        return launch


@contextlib.contextmanager
def launches(module: ModuleType) -> Iterator[list[str]]:
    """The names of the kernels of `module` in the order they are launched."""
    log: list[str] = []
    kernels = {n: k for n, k in vars(module).items() if n.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Logged(name.strip("_").removesuffix("_kernel"), kernel, log))
        yield log
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


class Guarded(TorchDispatchMode):
    """New tensors come filled with NaN and between two bands, which are still the same at the end.

    `calls` counts torch's own operations that are neither views nor allocations.
    """

    FRESH = ("empty", "new_empty", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name not in self.FRESH:
            if not func.is_view and name not in ("clone", "detach", "set_"):
                self.calls.append(name)
            return out
        if not out.numel() or not out.is_contiguous() or not out.dtype.is_floating_point:
            return out
        buffer = torch.full((out.numel() + 2 * BAND,), CANARY, dtype=out.dtype, device=out.device)
        self.buffers.append(buffer)
        return buffer[BAND : BAND + out.numel()].fill_(float("nan")).view(out.shape)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if error[0] is None:
            for buffer in self.buffers:
                bands = torch.cat([buffer[:BAND], buffer[-BAND:]])
                assert (bands == torch.tensor(CANARY, dtype=buffer.dtype)).all(), "band written"
