"""What every launch function needs: padded ranks, the precision of a dot, the right device."""

import contextlib

import torch

_HERE = contextlib.nullcontext()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def padded(rank: int) -> int:
    """`rank` as a side of a tl.dot: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's `input_precision`: for float32 what torch.matmul is set to, full by default.

    On NVIDIA GPUs full precision is three TF32 products of split operands (about 2⁻²¹ relative).
    """
    # What torch.backends.cuda.matmul.fp32_precision calls, in a fifth of its time.
    if dtype != torch.float32 or torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32":
        return "tf32" if torch.version.hip is None else "ieee"
    return "tf32x3" if torch.version.hip is None else "ieee"


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
