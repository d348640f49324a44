"""Error measures, gradient runs and instruments shared by the operators' tests."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = os.environ.get("HAL_TEST_DEVICE", "cpu")

# Rounding errors of a sum of n like-signed terms add up to about sqrt(n)·u, u = 2⁻²⁴ (2⁻⁵³), and
# sums here have up to a few hundred terms. Twice that in float64, where the reference errs as well.
EXACT = {torch.float32: 16 * 2**-24, torch.float64: 32 * 2**-53}


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖; where ref is zero, 0 if out is and infinity if not."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    difference, norm = (out - ref).norm().item(), ref.norm().item()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def assert_same(out: dict, ref: dict, bound: float | dict) -> None:
    """Every entry of `out` within `bound` (one for all, or one each) of `ref`. NaN never passes."""
    assert out.keys() == ref.keys()
    for name, tensor in out.items():
        limit = bound[name] if isinstance(bound, dict) else bound
        error = relative_error(tensor, ref[name])
        assert error <= limit, f"{name}: relative error {error:.3g}, allowed {limit:.3g}"


def bounds(dtype: torch.dtype, plain: dict | None, ref: dict) -> float | dict:
    """What `assert_same` may allow: `EXACT`, or for 16 bits twice the error of plain PyTorch.

    The floor of eps/4 is what rounding the exact result to `dtype` costs (the RMS of a uniform
    error of ±eps/2 at the binade's low end is eps/3.5): plain PyTorch may hit values exactly.
    """
    if dtype in EXACT:
        return EXACT[dtype]
    floor = torch.finfo(dtype).eps / 4
    return {name: 2 * relative_error(plain[name], ref[name]) + floor for name in ref}


def results(
    function: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor | None],
    upstream: torch.Tensor | None = None,
    wanted: Sequence[str] | None = None,
    cast: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """``function(**inputs)`` as "out", and the gradient of every input (or of those `wanted`).

    `upstream` is the gradient of the output, cast to its dtype by a view where that is possible;
    None stands for ``.sum()``, whose gradient has stride 0.
    """
    leaves = {
        name: t if t is None or not t.is_floating_point() else t.detach().to(cast or t.dtype)
        for name, t in inputs.items()
    }
    if wanted is None:
        wanted = [n for n, t in leaves.items() if t is not None and t.is_floating_point()]
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(**leaves)
    if upstream is not None:
        upstream = upstream.to(out.dtype)
    gradients = torch.autograd.grad(
        out if upstream is not None else out.sum(), [leaves[n] for n in wanted], upstream
    )
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient.dtype == leaves[name].dtype, f"d{name} has dtype {gradient.dtype}"
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def autocast(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., Any]:
    """`function` under autocast to `dtype`."""

    def run(**leaves: Any) -> torch.Tensor:
        with torch.autocast(DEVICE.partition(":")[0], dtype):
            return function(**leaves)

    return run


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers of mean and deviation 1: their long sums do not cancel to zero by chance."""
    return (torch.randn(*shape, dtype=torch.float64) + 1).to(DEVICE, dtype)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (its own first row everywhere, for "expanded") under other strides."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
        wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2] = tensor
        return wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    if layout == "rows_sliced":
        wide = tensor.new_full((*tensor.shape[:-2], 3 * tensor.shape[-2], tensor.shape[-1]), 9e9)
        wide[..., 1::3, :] = tensor
        return wide[..., 1::3, :]
    if layout == "permuted":
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "expanded":
        return tensor[(0,) * (tensor.dim() - 1)].expand(tensor.shape)
    if layout == "all_expanded":
        return tensor.flatten()[0].expand(tensor.shape)
    raise ValueError(layout)


class CountCalls(TorchDispatchMode):
    """Counts aten calls, looking inside the default backend of this package's operators.

    `operators` keeps the arguments of each ``hal::`` call by the operator's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.operators: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hal":
            self.operators[func._opname] = args
            with self:
                return func._op_dk(
                    torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {})
                )
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count_calls(function: Callable[[], object]) -> int:
    """How many torch calls `function` makes, those inside of operators included."""
    with CountCalls() as counter:
        function()
    return counter.calls


def allocations(function: Callable[[], object]) -> list[int]:
    """Bytes of every block that `function` takes from the allocator, whichever code asks for it."""
    cuda = DEVICE.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CUDA if cuda else activity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    del kept
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return [size for size in sizes if size > 0]


def packed_offsets(ranks: Sequence[int]) -> torch.Tensor:
    """First row of each matrix in packed rows, and their number."""
    ends = [sum(ranks[:g]) for g in range(len(ranks) + 1)]
    return torch.tensor(ends, dtype=torch.int64, device=DEVICE)
