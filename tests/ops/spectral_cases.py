"""Layers for `spectral_step_`, packed and one by one."""

import dataclasses

import torch

from hal_kernels.nn.layout import LayerSpec, Layout
from hal_kernels.ops import Slots, spectral_step_
from hal_kernels.ops.spectral_step import Layer, next_gain, spectral_step_reference

from .slot_cases import slots_of
from .util import DEVICE

# Layers as (d_in, d_out, rank). The last ones' ranks are above half of a width, or all of it.
EQUAL = [(24, 16, 3), (16, 16, 3), (24, 40, 3), (16, 24, 3)]
RAGGED = [(24, 16, 3), (16, 16, 1), (9, 8, 5), (24, 40, 0), (16, 24, 8), (6, 16, 6)]
NAMES = ("p", "q", "momentum_p", "momentum_q", "gradient_p", "gradient_q")


def orthonormal(rows: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, rows, dtype=torch.float64))[0].t().contiguous()


@dataclasses.dataclass
class Case:
    """All layers' tensors: by layer as they were, and packed, which steps change."""

    layers: list[tuple[int, int, int]]
    layout: Layout
    slots: Slots
    before: dict[str, list[torch.Tensor]]  # by layer
    packed: dict[str, list[torch.Tensor]]  # by width
    lam: torch.Tensor
    mask: torch.Tensor | None = None

    def step(self, **options) -> torch.Tensor:
        """One step of all layers in place."""
        p, q, *rest = (self.packed[name] for name in NAMES)
        return spectral_step_(p, self.lam, q, *rest, self.slots, mask=self.mask, **options)

    def layer(self, index: int) -> Layer:
        """One layer as it is now."""
        own = {n: self.side(n).split(self.packed[n])[index] for n in NAMES[:4]}
        lam = self.lam.split(self.layout.ranks)[index]
        return Layer(own["p"], lam, own["q"], own["momentum_p"], own["momentum_q"])

    def side(self, name: str):
        return self.layout.p if name.endswith("p") else self.layout.q

    def own_mask(self, index: int) -> torch.Tensor | None:
        return None if self.mask is None else self.mask.split(self.layout.ranks)[index]

    def expected(self, index: int, dtype=torch.float64, **options) -> tuple[Layer, torch.Tensor]:
        """The reference's step of one layer from where it was."""
        options = {n: v if isinstance(v, float) else v[index].item() for n, v in options.items()}
        own = {n: t[index].to(dtype) for n, t in self.before.items()}
        gradients = own.pop("gradient_p"), own.pop("gradient_q")
        return spectral_step_reference(
            Layer(**own), *gradients, mask=self.own_mask(index), **options
        )

    def expected_gain(self, log_gain: float, rate: float) -> torch.Tensor:
        """From the tensors as they were before the step, in float64."""
        cosines = []
        for side in ("p", "q"):
            pairs = zip(
                self.before[f"momentum_{side}"], self.before[f"gradient_{side}"], strict=True
            )
            cosines += [cosine_of(m.double(), g.double()) for m, g in pairs if g.numel() > 0]
        return next_gain(torch.tensor(log_gain, dtype=torch.float64), torch.stack(cosines), rate)

    def tensors(self) -> list[torch.Tensor]:
        """What a step may change."""
        return [self.lam, *(t for name in NAMES[:4] for t in self.packed[name])]

    def give(self, gradients: dict[str, list[torch.Tensor]]) -> None:
        """Gradients by layer for the next step."""
        for name, own in gradients.items():
            for to, new in zip(self.packed[name], self.pack(name, own), strict=True):
                to.copy_(new)

    def pack(self, name: str, own: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([own[i] for i in group.layers]) for group in self.side(name).groups]


def make(layers=EQUAL, dtype=torch.float32, lam="random", mask=None, momentum=True) -> Case:
    layout = Layout([LayerSpec(f"l{i}", *layer, layer[2], 1.0) for i, layer in enumerate(layers)])
    factors = {
        "p": [orthonormal(r, d_in) for d_in, _, r in layers],
        "q": [orthonormal(r, d_out) for _, d_out, r in layers],
    }
    before = dict(factors)
    before["lam"] = [torch.randn(r, dtype=torch.float64) * (lam != "zeros") for _, _, r in layers]
    if lam == "equal":
        before["lam"] = [torch.ones_like(t) for t in before["lam"]]
    for kind, scale in (("momentum", float(momentum)), ("gradient", 1.0)):
        for name, of in factors.items():
            before[f"{kind}_{name}"] = [scale * torch.randn_like(t) for t in of]
    before = {n: [t.to(DEVICE, dtype) for t in own] for n, own in before.items()}
    case = Case(layers, layout, slots_of(layers), before, {}, torch.cat(before["lam"]), mask)
    case.packed = {name: case.pack(name, before[name]) for name in NAMES}
    return case


def cosine_of(momentum: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if not (gradient.isfinite().all() and gradient.any()):
        return torch.tensor(torch.nan, dtype=torch.float64)
    return torch.nn.functional.cosine_similarity(momentum.flatten(), gradient.flatten(), dim=0)


def update(layer: Layer, scaling: float = 1.0) -> torch.Tensor:
    """ΔW in float64."""
    p, lam, q = (t.double() for t in layer[:3])
    return scaling * q.t() @ (lam[:, None] * p)


def moments(layer: Layer) -> dict[str, torch.Tensor]:
    """The momenta without the freedom of signs, orders and equal values: seen from their frames."""
    p, _, q, momentum_p, momentum_q = (t.double() for t in layer)
    return {"momentum_p": q.t() @ momentum_p, "momentum_q": p.t() @ momentum_q}


def off_orthonormal(rows: torch.Tensor) -> float:
    """The largest element of PPᵀ − I."""
    gram = rows.double() @ rows.double().t()
    return (
        (gram - torch.eye(len(rows), device=rows.device)).abs().max().item() if len(rows) else 0.0
    )
