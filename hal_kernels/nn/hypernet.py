"""Hypernetworks H_P, H_Λ, H_Q: they generate every layer's factors in one call [eqs. 4-6, 3.3].

A token stands for one singular direction. Rows of width d_w are projected to the hidden width and
back by one pair of linear maps per distinct width; the body in between is shared by all layers.
Λ's tokens carry an embedding of their direction: all Λ start equal, and without it they would stay
so (equal inputs, equal outputs, for ever).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.hypernet_factors import hypernet_factors
from ..ops.hypernet_layer import hypernet_layer
from ..ops.hypernet_tokens import hypernet_tokens
from ..ops.ragged import Slots
from .packed import Packed

HIDDEN = 312
HEADS = 12
INNER = 1200
SETS = 3  # P, Λ, Q
MLP_WIDTHS = (256,) * 8 + (512,) * 4 + (1024,) * 3
CNN_STAGES = ((64, 2), (128, 3), (256, 3))  # channels, residual blocks
CNN_KERNEL = 9  # as many taps as ResNet's 3 × 3


class BertBody(nn.Module):
    """One TinyBERT layer: hidden 312, 12 heads, FFN 1200, GELU, post-LayerNorm [4.1.4].

    With `norm_first` pre-LayerNorm, as torch.nn.TransformerEncoderLayer has it. A stack of such
    layers usually ends in one more LayerNorm, against what many sums add up to. This one layer has
    none: tokens enter at unit scale, two sums later they are still near it, and the output
    projections, which start at zero or as small, learn the scale they are given.
    """

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.norm_first = norm_first
        shapes = {
            "qkv": (3 * HIDDEN, HIDDEN),
            "out": (HIDDEN, HIDDEN),
            "up": (INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            weight = torch.empty(SETS, *shape).normal_(std=0.02)  # BERT's initializer_range
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(SETS, shape[0])))
        for name in ("norm1", "norm2"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(SETS, HIDDEN)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(SETS, HIDDEN)))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return hypernet_layer(
            tokens, keys, dict(self.named_parameters()), heads=HEADS, norm_first=self.norm_first
        )


class MLPBody(nn.Module):
    """15 hidden layers of widths 256, 512 and 1024, token by token [4.1.4, 4.6]."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = nn.ModuleList(self._stack() for _ in range(SETS))

    @staticmethod
    def _stack() -> nn.Sequential:
        layers: list[nn.Module] = []
        width = HIDDEN
        for hidden in MLP_WIDTHS:
            layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(t) for net, t in zip(self.sets, tokens, strict=True)])


class _ResidualBlock(nn.Module):
    """Two convolutions along the token and a shortcut. GroupNorm: no statistics across layers."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = CNN_KERNEL // 2
        self.conv1 = nn.Conv1d(inputs, outputs, CNN_KERNEL, stride, half, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, CNN_KERNEL, 1, half, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv1d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CNNBody(nn.Module):
    """ResNet-18's 18 layers with 64, 128 and 256 channels, along each token [4.1.4, 4.6]."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = nn.ModuleList(self._stack() for _ in range(SETS))

    @staticmethod
    def _stack() -> nn.Sequential:
        channels = CNN_STAGES[0][0]
        layers: list[nn.Module] = [
            nn.Conv1d(1, channels, CNN_KERNEL, 2, CNN_KERNEL // 2, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
        ]
        for stage, (outputs, blocks) in enumerate(CNN_STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_ResidualBlock(channels, outputs, stride))
                channels = outputs
        layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, HIDDEN)]
        return nn.Sequential(*layers, nn.LayerNorm(HIDDEN))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        flat = tokens.reshape(SETS, -1, 1, HIDDEN)
        outputs = [net(t) for net, t in zip(self.sets, flat, strict=True)]
        return torch.stack(outputs).view(tokens.shape)


BODIES: dict[str, type[nn.Module]] = {"bert": BertBody, "mlp": MLPBody, "cnn": CNNBody}


class Hypernetwork(nn.Module):
    """(P, Λ, Q) of all layers -> the same by the update rule: generated, or base + generated.

    Args:
        architecture: a key of `BODIES`.
        p_widths, q_widths: the distinct widths of either side, ascending.
        rows: R, singular directions over all layers.
        zero_output: start the output projections at zero (the output is zero at first); else at the
            scale of orthonormal rows, elements of about 1/√d_w.
        options: of the body: `norm_first` for "bert".
    """

    def __init__(
        self,
        architecture: str,
        p_widths: Sequence[int],
        q_widths: Sequence[int],
        rows: int,
        *,
        zero_output: bool,
        **options: bool,
    ) -> None:
        super().__init__()
        self.p_in = nn.ModuleList(_projection(w, HIDDEN, 1.0) for w in p_widths)
        self.q_in = nn.ModuleList(_projection(w, HIDDEN, 1.0) for w in q_widths)
        self.lam_in = _projection(1, HIDDEN, 1.0)
        self.lam_embedding = nn.Parameter(torch.randn(rows, HIDDEN))
        self.body = BODIES[architecture](**options)
        scale = 0.0 if zero_output else 1.0 / math.sqrt(HIDDEN)
        self.p_out = nn.ModuleList(_projection(HIDDEN, w, scale / math.sqrt(w)) for w in p_widths)
        self.q_out = nn.ModuleList(_projection(HIDDEN, w, scale / math.sqrt(w)) for w in q_widths)
        self.lam_out = _projection(HIDDEN, 1, scale * 0.05)  # near the identity, not on it

    def forward(
        self,
        factors: Packed,
        mask: torch.Tensor,
        slots: Slots,
        base: Packed | None = None,
    ) -> Packed:
        """One pass over every layer's factors.

        Args:
            factors: of all layers, packed.
            mask: ``[R]``, positive where a direction is kept; in the row order of Λ.
            slots: where all rows lie.
            base: what the output is added to, or None.
        """
        weights, biases = _parameters(*self.p_in, self.lam_in, *self.q_in)
        tokens, keys = hypernet_tokens(
            factors.tensors(), mask, weights, biases, self.lam_embedding, slots
        )
        weights, biases = _parameters(*self.p_out, self.lam_out, *self.q_out)
        added_to = None if base is None else base.tensors()
        return factors.like(
            hypernet_factors(self.body(tokens, keys), weights, biases, slots, added_to)
        )


def _parameters(*maps: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases of linear maps that one operator applies together."""
    return [m.weight for m in maps], [m.bias for m in maps]


def _projection(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
