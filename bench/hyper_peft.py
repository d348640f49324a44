"""Hypernetworks that generate A and B of PEFT's LoRA, DoRA and DyLoRA [2510.02630, appendix B].

    A ← A₀ + H_A(A)     B ← H_B(B)        once a training step, all layers at once

That is the update rule "anchor": A₀ is what PEFT drew, B₀ is zero and so is each output projection
at the start, so the model starts as the identity. The body is the library's, with two sets of
weights in place of three. As Λ's tokens there, B's carry an embedding of their direction: all B
start equal, and without it they would stay so.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hal_kernels.nn import hypernet
from hal_kernels.nn.layout import LayerSpec, Layout


class Factors(nn.Module):
    """H_A and H_B of one model, whose LoRA layers lose A and B as parameters.

    Rows are packed as in `hal_kernels.nn.layout`: A and Bᵀ by width ``[R_w, d_w]``.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self._layers: list[tuple[nn.Linear, nn.Linear]] = [
            (layer.lora_A["default"], layer.lora_B["default"])
            for layer in model.modules()
            if isinstance(layer, LoraLayer)
        ]  # fmt: skip
        self.layout = Layout(
            [
                LayerSpec(
                    str(index), a.in_features, b.out_features, a.out_features, a.out_features, 1.0
                )
                for index, (a, b) in enumerate(self._layers)
            ]
        )
        rows = [a.weight for a, _ in self._layers], [b.weight.t() for _, b in self._layers]
        packed = [
            torch.cat([own[i] for i in group.layers]).detach()
            for side, own in zip((self.layout.p, self.layout.q), rows, strict=True)
            for group in side.groups
        ]
        for index, initial in enumerate(packed):
            self.register_buffer(f"initial_{index}", initial)
        self._state: list[torch.Tensor] | None = None  # A and B as generated last in training
        hidden = hypernet.HIDDEN
        self.inputs = nn.ModuleList(nn.Linear(x.shape[1], hidden) for x in packed)
        self.outputs = nn.ModuleList(nn.Linear(hidden, x.shape[1]) for x in packed)
        for linear in (*self.inputs, *self.outputs):
            nn.init.zeros_(linear.bias)
            nn.init.normal_(linear.weight, std=float(linear.out_features == hidden))
        self.embedding = nn.Parameter(torch.randn(self.layout.rows, hidden))
        self.body = hypernet.BertBody()
        for name, weight in list(self.body.named_parameters()):
            setattr(self.body, name, nn.Parameter(weight.detach()[:2].clone()))
        self.body.norm2_weight.detach().fill_(0.3)  # steps of the factors, not leaps
        for a, b in self._layers:
            del a.weight, b.weight

    def forward(self) -> list[torch.Tensor]:
        """A and Bᵀ of all layers, generated from those of the step before."""
        initial = [getattr(self, f"initial_{index}") for index in range(len(self.inputs))]
        state = initial if self._state is None else self._state
        rows = [linear(x) for linear, x in zip(self.inputs, state, strict=True)]
        sides = len(self.layout.p.groups)
        a, b = torch.cat(rows[:sides]), torch.cat(rows[sides:]) + self.embedding
        tokens = torch.stack([a, b]).unflatten(1, (-1, self.layout.max_rank))  # [2, G, r, H]
        keys = torch.ones(tokens.shape[:3], dtype=torch.bool, device=tokens.device)
        made = self.body(tokens, keys).flatten(0, 2).split([x.shape[0] for x in initial])
        return [x + out(t) for x, out, t in zip(initial, self.outputs, made, strict=True)]

    def install(self, module: nn.Module, args: Any) -> None:
        """Give every layer its A and B: a forward pre-hook of the model."""
        made = self()
        if self.training and torch.is_grad_enabled():
            self._state = [rows.detach() for rows in made]
        sides = len(self.layout.p.groups)
        of_a, of_b = self.layout.p.split(made[:sides]), self.layout.q.split(made[sides:])
        for (a, b), rows_a, rows_b in zip(self._layers, of_a, of_b, strict=True):
            a.weight, b.weight = rows_a, rows_b.t()


def generate_factors(model: PeftModel) -> PeftModel:
    """Make a LoRA of PEFT's train hypernetworks in place of its A and B; of DoRA what else it has.

    Each forward pass generates, and what a training pass made is what the next one begins with: no
    accumulation over several.
    """
    model.factors = Factors(model)
    # PEFT's generate() passes by the hook of the whole model.
    model.get_base_model().register_forward_pre_hook(model.factors.install)
    return model
