"""Rows of many matrices in one tensor, and the same matrices padded to equal height.

A packed tensor ``[R, d]`` holds matrix g in rows ``offsets[g]:offsets[g + 1]``. Batched products
want ``[G, max_rank, d]``. While all matrices have the same rank (before compaction) that is a view;
afterwards rows are gathered on the device, without a host synchronisation.
"""

import torch


def pad(rows: torch.Tensor, offsets: torch.Tensor, max_rank: int) -> torch.Tensor:
    """``[R, ...]`` -> ``[G, max_rank, ...]``, zeros below each matrix's own rows."""
    count = offsets.shape[0] - 1
    if rows.shape[0] == count * max_rank:
        return rows.view(count, max_rank, *rows.shape[1:])
    index = offsets[:-1, None] + torch.arange(max_rank, device=rows.device)
    filled = index < offsets[1:, None]
    index = index.clamp_(max=rows.shape[0] - 1)
    filled = filled.view(count, max_rank, *[1] * (rows.dim() - 1))
    return torch.where(filled, rows[index], rows.new_zeros(()))


def unpad(padded: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
    """``[G, max_rank, ...]`` -> ``[R, ...]``, the inverse of `pad`; `total` is R."""
    count, max_rank = padded.shape[:2]
    if total == count * max_rank:
        return padded.reshape(total, *padded.shape[2:])
    row = torch.arange(total, device=padded.device)
    matrix = torch.searchsorted(offsets, row, right=True) - 1
    return padded[matrix, row - offsets[matrix]]
