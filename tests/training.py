"""Training loops, gradients and snapshots shared by the tests."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from models import batch, loss_of
from torch import nn

import hal_kernels


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=lr)


def batches(model: nn.Module, count: int, size: int = 4) -> list[dict[str, Any]]:
    return [batch(model, size, seed=index) for index in range(count)]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[dict[str, Any]],
    before_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """One optimizer step a batch, as a user would write it. Returns the losses."""
    losses = []
    for inputs in data:
        loss = loss_of(model(**inputs))
        loss.backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients there are, by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that training changes: the adapter whole, and the modules trained."""
    adapter = {f"hal.{k}": v for k, v in adapter_state(model).items()}
    return adapter | {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.hal.state_dict().items()}


def by_layer(model: nn.Module, packed: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """P rows, Λ and Q rows of every layer, copied from packed tensors."""
    layout = model.hal.layout
    sides = layout.p.split(packed.p), packed.lam.split(layout.ranks), layout.q.split(packed.q)
    names = [spec.name for spec in layout.layers]
    own = (tuple(t.detach().clone() for t in tensors) for tensors in zip(*sides, strict=True))
    return dict(zip(names, own, strict=True))


def kept(model: nn.Module) -> list[int]:
    """The mask of every layer, one after the other."""
    return model.hal.mask.int().tolist()


def budget_used(model: nn.Module) -> int:
    return sum(hal_kernels.rank_pattern(model).values())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit the same tensors."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs"


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float
) -> None:
    """Every tensor within `relative` of its norm (or of a thousandth of the largest norm of all,
    where it is smaller than that); integers exactly."""
    assert found.keys() == expected.keys()
    for name in [n for n, tensor in expected.items() if not tensor.is_floating_point()]:
        assert torch.equal(found[name], expected[name]), f"{name} differs"
    expected = {n: tensor for n, tensor in expected.items() if tensor.is_floating_point()}
    largest = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).norm())
        allowed = relative * max(float(tensor.norm()), 1e-3 * largest)
        assert difference <= allowed, f"{name} is off by {difference:.3g}, allowed {allowed:.3g}"
