"""Adapter dropout: a mask that is regenerated from its seed, never stored.

The mask depends on the seed, the shape and the device only, so the backward pass asks for it again.
It is made in blocks of rows, so that no ``[T, d_in]`` temporary exists at any time. Backends have
streams of their own: equal seeds give equal masks within one backend.
"""

from collections.abc import Iterator

import torch

ROWS_PER_BLOCK = 1024


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed (int64 scalar on `device`) from torch's generator of that device.

    It follows `torch.manual_seed`, and the saved generator state of activation checkpointing.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def keep_blocks(
    x: torch.Tensor, dropout: float, seed: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield ``(rows, keep)`` blocks of the mask for x ``[T, d_in]``; keep is 0 or 1/(1 - dropout).

    x with dropout is ``x[rows] * keep``, block by block, always in the same order.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    for start in range(0, x.shape[0], ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, x.shape[0]))
        keep = torch.empty_like(x[rows], memory_format=torch.contiguous_format)
        yield rows, keep.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
