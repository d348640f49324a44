"""What tensors of a checkpoint must be before anything is done with them."""

import re
from collections.abc import Mapping

import torch

INVALID = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, re.error,
)  # fmt: skip
"""What JSON that is not ours makes the code raise that reads it."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def expect_tensors(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], what: str
) -> None:
    """Raise ValueError unless `found` has the names and shapes of `expected`, and its dtypes or
    other floating-point ones in place of floating-point ones."""
    if expected.keys() != found.keys():
        raise ValueError(
            f"the checkpoint's tensors for {what} don't fit; "
            f"missing {sorted(expected.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - expected.keys())}"
        )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise ValueError(
                f"the checkpoint's tensor {key!r} for {what} has shape {tuple(found[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        allowed = FLOATS if tensor.dtype in FLOATS else (tensor.dtype,)
        if found[key].dtype not in allowed:
            raise ValueError(
                f"the checkpoint's tensor {key!r} for {what} has dtype {found[key].dtype}, "
                f"expected {' or '.join(map(str, allowed))}"
            )


def expect_finite(tensors: Mapping[str, torch.Tensor], what: str, *, or_inf: bool = False) -> None:
    """Raise ValueError if a floating-point tensor holds NaN or, unless `or_inf`, Inf."""
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            continue
        if tensor.isnan().any() or (not or_inf and tensor.isinf().any()):
            raise ValueError(f"the tensor {key!r} for {what} holds NaN or Inf")


def expect_mask(mask: torch.Tensor, name: str) -> None:
    """Raise ValueError unless a mask is made of zeros and ones."""
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"the tensor {name!r} for the adapter holds other values than 0 and 1")
