"""A plain PyTorch loop: nothing is called but the model and its optimizer.

python examples/plain_loop.py --steps 200
"""

import argparse

import torch
from torch import nn

import hal_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--out", default="plain_loop_out")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    )
    target = nn.Linear(32, 8)

    hal_kernels.patch_model(model, rank=options.rank, interval=max(1, options.steps // 20))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(1, options.steps + 1):
        x = torch.randn(64, 32)
        loss = (model(x) - target(x).detach()).square().mean()
        # The model returns no loss of its own, so the penalty is added here.
        (loss + hal_kernels.penalty(model)).backward()
        optimizer.step()  # factors advance and ranks are allocated
        optimizer.zero_grad()
        if step % max(1, options.steps // 10) == 0:
            kept = sum(hal_kernels.rank_pattern(model).values())
            print(f"step {step}: loss {loss.item():.4f}, {kept} directions kept")
    hal_kernels.save_adapter(model, options.out)
    print(f"saved to {options.out}: {hal_kernels.rank_pattern(model)}")


if __name__ == "__main__":
    main()
