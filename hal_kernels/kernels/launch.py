"""What every launch function needs: padded ranks, the precision of a dot, the right device."""

import contextlib

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def padded(rank: int) -> int:
    """`rank` as a side of a tl.dot: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether rows of all these matrices start on 16 bytes and have 16·n elements.

    Then Triton loads 16 bytes at a time and asynchronously; else one element, through registers.
    """
    return all(
        t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's `input_precision`: for float32 what torch.matmul is set to, full by default.

    On NVIDIA GPUs full precision is three TF32 products of split operands (about 2⁻²¹ relative).
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32" if torch.version.hip is None else "ieee"
    return "tf32x3" if torch.version.hip is None else "ieee"


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
