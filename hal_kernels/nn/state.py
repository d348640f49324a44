"""The tensors of an adapter: what is trained, generated and saved."""

import math
from typing import Any

import torch
from torch import nn

from ..config import HALConfig
from .allocation import last_allocation
from .hypernet import Hypernetwork
from .layout import Group, Layout
from .packed import Packed
from .tensors import orthonormal_rows, unit_rows

LATER = ("never_called", "log_gain")
"""Tensors that older checkpoints lack: zeros then."""


class State(nn.Module):
    """Factors of all layers with what belongs to them, hypernetworks and mask.

    Factors are parameters ("direct") or buffers beside the hypernetworks that generate them.
    """

    lam: torch.Tensor
    mask: torch.Tensor
    hypernet: Hypernetwork | None
    layout: Layout
    never_called: torch.Tensor  # layers, by index, that the model is known not to call
    budget: int  # directions that all layers together keep in the end
    steps: int  # optimizer steps taken

    def __init__(self, config: HALConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def direct(self) -> bool:
        """Whether P, Λ, Q are the parameters themselves (no hypernetwork)."""
        return self.config.hypernet == "direct"

    def make_tensors(self, layout: Layout) -> None:
        """Register everything, with initial values of torch's generator."""
        config, dtype = self.config, self.config.dtype
        rows = self._rows_of
        p, q = ([rows(group) for group in side.groups] for side in (layout.p, layout.q))
        lam = torch.zeros(layout.rows, dtype=dtype)
        if not self.direct and config.update == "replace":
            lam.normal_(std=0.05)
        initial = Packed(tuple(p), lam, tuple(q))
        self._names = [f"p_{group.width}" for group in layout.p.groups]
        self._names += ["lam", *(f"q_{group.width}" for group in layout.q.groups)]
        self._count_p = len(p)
        for name, value in zip(self._names, initial.tensors(), strict=True):
            if self.direct and not (config.spectral and name == "lam"):
                self.register_parameter(name, nn.Parameter(value))
                if config.spectral:
                    self.register_buffer(f"momentum_{name}", torch.zeros_like(value))
            else:
                self.register_buffer(name, value)
                if config.anchored:
                    self.register_buffer(f"anchor_{name}", value.clone())
            if config.allocation == "ema":
                self.register_buffer(f"importance_{name}", torch.zeros_like(value))
                self.register_buffer(f"uncertainty_{name}", torch.zeros_like(value))
        if config.spectral:
            self.register_buffer("log_gain", torch.zeros((), dtype=dtype))
        self.register_buffer("mask", torch.ones(layout.rows, dtype=dtype))
        never_called = torch.zeros(len(layout.layers), dtype=torch.bool)
        self.register_buffer("never_called", never_called)
        self.hypernet = None
        if config.hypernet is not None and not self.direct:
            self.hypernet = Hypernetwork(
                config.hypernet,
                [g.width for g in layout.p.groups],
                [g.width for g in layout.q.groups],
                layout.rows,
                zero_output=config.update != "replace",
                **self.body_options,
            ).to(dtype)

    def _rows_of(self, group: Group) -> torch.Tensor:
        """Initial P or Q of one width."""
        if self.config.spectral:
            return orthonormal_rows(group.ranks, group.width, self.config.dtype)
        return unit_rows(group.rows, group.width, self.config.dtype)

    @property
    def leading_parameter(self) -> nn.Parameter:
        """The parameter whose optimizer sets the pace.

        Where several optimizers share the adapter's parameters, it advances once a step. "direct"
        must do so after Λ has moved: pruned singular values are set back to zero.
        """
        return self.lam if isinstance(self.lam, nn.Parameter) else next(self.parameters())

    def _has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters())

    @property
    def body_options(self) -> dict[str, Any]:
        """What the configuration says of the hypernetwork's body; only "bert" has a choice."""
        config = self.config
        if config.hypernet != "bert":
            return {}
        return {"norm_first": config.norm_first, "hidden": config.hidden}

    def packed(self, prefix: str = "") -> Packed:
        """The stored factors, or what belongs to them: "anchor_", "importance_", …"""
        return Packed.of([getattr(self, f"{prefix}{n}") for n in self._names], self._count_p)

    def momenta(self) -> Packed:
        """update="spectral": momenta of P's and Q's gradients, like `packed`, without Λ's."""
        names = ("lam" if name == "lam" else f"momentum_{name}" for name in self._names)
        return Packed.of([self.get_buffer(name) for name in names], self._count_p)

    @property
    def holds_mask(self) -> bool:
        """Whether pruned directions stay at zero between allocations.

        As in AdaLoRA, "direct" under the cubic schedule zeroes them at each allocation and lets
        them train on until the last one, so that they may come back.
        """
        cubic = self.direct and not self.config.spectral and self.config.schedule == "cubic"
        return not cubic or self.steps >= self.last_allocation

    @property
    def last_allocation(self) -> int:
        """The optimizer step after which the mask stays as it is."""
        return last_allocation(self.config, self.budget, self.layout.initial_rows)

    @property
    def effective_mask(self) -> torch.Tensor:
        """The mask that the model's function shows now ``[R]``."""
        mask = self.mask if self.holds_mask else torch.ones_like(self.mask)
        ranks = torch.tensor(self.layout.ranks, device=mask.device)
        return mask.masked_fill(self.never_called.repeat_interleave(ranks), 0.0)


def saved_steps(state: torch.Tensor) -> int:
    """The optimizer steps that an adapter's extra state says.

    Raises:
        ValueError: it is not what an adapter has.
    """
    first = float(state[0]) if state.shape == (1,) and not state.is_complex() else math.nan
    if not (first >= 0 and first.is_integer()):
        raise ValueError(
            f"_extra_state begins with {first} and has shape {tuple(state.shape)}, expected one "
            "number of steps"
        )
    return int(first)
