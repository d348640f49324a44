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
from torch.nn import functional as F

from ..ops.ragged import Slots, pad_sides, padded_places, unpad_sides
from .packed import Packed

HIDDEN = 312
HEADS = 12
INNER = 1200
SETS = 3  # P, Λ, Q
EPS = 1e-12  # of the LayerNorms, as BERT's
MLP_WIDTHS = (256,) * 8 + (512,) * 4 + (1024,) * 3
CNN_STAGES = ((64, 2), (128, 3), (256, 3))  # channels, residual blocks
CNN_KERNEL = 9  # as many taps as ResNet's 3 × 3


class BertBody(nn.Module):
    """One TinyBERT layer: hidden 312, 12 heads, FFN 1200, GELU, post-LayerNorm [4.1.4].

    The sets of weights are a batch axis; attention runs among the tokens of one matrix:

        qkv = tW_qkvᵀ + b     z = t + softmax(q·kᵀ/√d_h + keys)·v·W_oᵀ + b     n = LN₁(z)
        out = LN₂(n + GELU(nW₁ᵀ + b)·W₂ᵀ + b)

    With `norm_first` pre-LayerNorm, as torch.nn.TransformerEncoderLayer has it: each half
    normalises what it reads, and no LayerNorm follows the sums. A stack of such layers usually ends
    in one more LayerNorm, against what many sums add up to. This one layer has none: tokens enter
    at unit scale, two sums later they are still near it, and the output projections, which start at
    zero or as small, learn the scale they are given.

    Only directions that are kept serve as keys: a pruned token can be dropped for good (`compact`)
    without changing any kept one. A matrix with no kept direction attends to all of its tokens.

    Args:
        hidden: width of the tokens, a multiple of the 4 heads that there are then. None: the
            paper's sizes.
    """

    def __init__(self, norm_first: bool = False, hidden: int | None = None) -> None:
        super().__init__()
        self.norm_first = norm_first
        width, self.heads, inner = HIDDEN, HEADS, INNER
        if hidden is not None:
            width, self.heads, inner = hidden, 4, 4 * hidden
        shapes = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (inner, width),
            "down": (width, inner),
        }
        for name, shape in shapes.items():
            weight = torch.empty(SETS, *shape).normal_(std=0.02)  # BERT's initializer_range
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(SETS, shape[0])))
        for name in ("norm1", "norm2"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(SETS, width)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(SETS, width)))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Tokens ``[S, G, r, H]`` -> the same.

        Args:
            keys: ``[S, G, r]`` bool, True where a token may be attended to.
        """
        t = tokens.flatten(1, 2)
        if self.norm_first:
            t = t + self._attended(self._normed("norm1", t), keys)
            t = t + self._transformed(self._normed("norm2", t))
        else:
            t = self._normed("norm1", t + self._attended(t, keys))
            t = self._normed("norm2", t + self._transformed(t))
        return t.view(tokens.shape)

    def _attended(self, t: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        usable = keys | ~keys.any(-1, keepdim=True)
        qkv = self._linear("qkv", t).view(
            -1, keys.shape[-1], 3, self.heads, t.shape[-1] // self.heads
        )
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [S·G, heads, r, H/heads]
        # For the few tokens of a matrix this takes less time than scaled_dot_product_attention.
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        barred = ~usable.flatten(0, 1)[:, None, None]
        context = scores.masked_fill(barred, -math.inf).softmax(-1) @ value
        return self._linear("out", context.transpose(1, 2).reshape(t.shape))

    def _transformed(self, t: torch.Tensor) -> torch.Tensor:
        return self._linear("down", F.gelu(self._linear("up", t)))

    def _linear(self, name: str, t: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return torch.baddbmm(bias[:, None], t, weight.mT)

    def _normed(self, name: str, t: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        normed = F.layer_norm(t, t.shape[-1:], eps=EPS)
        return torch.addcmul(bias[:, None], normed, weight[:, None])


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
        options: of the body: `norm_first` and `hidden` for "bert".
    """

    def __init__(
        self,
        architecture: str,
        p_widths: Sequence[int],
        q_widths: Sequence[int],
        rows: int,
        *,
        zero_output: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = options.get("hidden") or HIDDEN
        self.p_in = nn.ModuleList(_projection(w, hidden, 1.0) for w in p_widths)
        self.q_in = nn.ModuleList(_projection(w, hidden, 1.0) for w in q_widths)
        self.lam_in = _projection(1, hidden, 1.0)
        self.lam_embedding = nn.Parameter(torch.randn(rows, hidden))
        self.body = BODIES[architecture](**options)
        scale = 0.0 if zero_output else 1.0 / math.sqrt(hidden)
        self.p_out = nn.ModuleList(_projection(hidden, w, scale / math.sqrt(w)) for w in p_widths)
        self.q_out = nn.ModuleList(_projection(hidden, w, scale / math.sqrt(w)) for w in q_widths)
        self.lam_out = _projection(hidden, 1, scale * 0.05)  # near the identity, not on it

    def forward(
        self,
        factors: Packed,
        mask: torch.Tensor,
        slots: Slots,
        base: Packed | None = None,
    ) -> Packed:
        """One pass over every layer's factors.

        Args:
            factors: of all layers, packed; state, to which no gradient goes.
            mask: ``[R]``, positive where a direction is kept; in the row order of Λ.
            slots: where all rows lie.
            base: what the output is added to, or None.
        """
        lam, places = len(factors.p), padded_places(slots)
        inputs = zip(
            (*self.p_in, self.lam_in, *self.q_in),
            (*factors.p, factors.lam[:, None], *factors.q),
            strict=True,
        )
        rows = [project(x) for project, x in inputs]
        rows[lam] = rows[lam] + self.lam_embedding
        kept = mask > 0
        keys = torch.cat([kept[slots.rows[0]], kept, kept[slots.rows[1]]])
        tokens = self.body(
            pad_sides(torch.cat(rows), places, slots), pad_sides(keys, places, slots)
        )

        outputs = zip(
            (*self.p_out, self.lam_out, *self.q_out),
            unpad_sides(tokens, places).split(slots.heights),
            strict=True,
        )
        made = [project(t) for project, t in outputs]
        made[lam] = made[lam][:, 0].clone()  # torch.compile fails where a view of it is an output
        if base is not None:
            made = list(torch._foreach_add(base.tensors(), made))
        return factors.like(made)


def _projection(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
