"""The fused layer alone, in a LoRA class of one's own: one operator in place of four.

python examples/fused_layer.py
"""

import torch
from torch import nn

from hal_kernels.ops import svd_linear


class FusedLoRA(nn.Module):
    """y = xWᵀ + b + scaling · (x Aᵀ) Bᵀ, base and adapter in one pass."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(rank, base.out_features))  # Bᵀ: a row a direction
        self.register_buffer("ones", torch.ones(rank))  # Λ: all directions count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, bias = self.base.weight, self.base.bias
        return svd_linear(x, w, bias, self.a, self.ones, self.b, scaling=self.scaling)


def main() -> None:
    torch.manual_seed(0)
    layer = FusedLoRA(nn.Linear(64, 48), rank=4)
    plain = nn.Linear(64, 48)
    optimizer = torch.optim.Adam([layer.a, layer.b], lr=1e-2)
    for step in range(101):
        x = torch.randn(32, 64)
        loss = (layer(x) - plain(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
