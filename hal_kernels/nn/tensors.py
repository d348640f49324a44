"""What the adapter does to tensors of any kind."""

from collections.abc import Sequence

import torch
from torch import nn


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a parameter or buffer other data, of any shape; it stays the same object."""
    tensor.grad = None
    if tensor.shape != data.shape and tensor.requires_grad:
        # Graphs that are still alive keep autograd's accumulator, which remembers the old shape;
        # only a change of dtype makes `data` drop it.
        tensor.data = data.to(torch.float16 if data.dtype != torch.float16 else torch.float32)
    tensor.data = data


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no element is NaN or Inf: one host synchronisation.

    On the CPU, whose maximum norm is slow, whether all sums are finite: one of finite numbers that
    overflows counts as Inf.
    """
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return True
    if all(t.device.type == "cpu" for t in tensors):
        sums = [t.sum(dtype=torch.float32 if t.dtype.itemsize == 2 else None) for t in tensors]
        return bool(torch.stack([total.double() for total in sums]).isfinite().all())
    return finite_norm(tensors)


def finite_norm(tensors: Sequence[torch.Tensor]) -> bool:
    """`all_finite` in a few launches, however many tensors there are."""
    return bool(torch.nn.utils.get_total_norm(tensors, float("inf")).isfinite())


def unit_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Gaussian rows of unit norm: near-orthogonal, elements of about 1/√width."""
    return nn.functional.normalize(torch.randn(rows, width), dim=1).to(dtype)


def orthonormal_rows(ranks: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrices of orthonormal rows, in random directions, as one tensor ``[Σ ranks, width]``."""
    made = [torch.linalg.qr(torch.randn(width, rank))[0].t() for rank in ranks]
    return torch.cat(made).to(dtype)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, when the host cannot wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
