"""The spectral step of many layers, as `bench.operators` and `bench.goals` measure it."""

from collections.abc import Sequence

import torch

from hal_kernels import ops
from hal_kernels.nn.layout import LayerSpec, Layout
from hal_kernels.ops.spectral_step import Layer, next_gain, spectral_step_reference
from tools import traffic

NAMES = ("p", "q", "momentum_p", "momentum_q", "gradient_p", "gradient_q")
ETA, RATE = 0.05, 0.5
Tensors = dict[str, torch.Tensor]


class SpectralLayers:
    """Layers of rank r, given as (d_in, d_out), and where their rows lie packed by width."""

    def __init__(self, widths: Sequence[tuple[int, int]], r: int, device: torch.device) -> None:
        self.r, self.device, self.count = r, device, len(widths)
        self.layout = Layout([LayerSpec(str(n), *d, r, r, 1.0) for n, d in enumerate(widths)])
        p, q = self.layout.p, self.layout.q

        def indices(*values: list[int]) -> tuple[torch.Tensor, ...]:
            return tuple(torch.tensor(v, device=device) for v in values)

        rows, offsets = indices(p.rows, q.rows), indices(p.offsets, self.layout.offsets, q.offsets)
        self.slots = ops.Slots(rows, offsets, (p.counts, q.counts), (p.sizes, q.sizes), r)  # type: ignore[arg-type]

    def inputs(self) -> Tensors:
        """Random tensors, packed: by name and width, Λ first.

        A layer's singular values lie apart, or their vectors would have no error to speak of.
        """
        apart = torch.arange(self.r, device=self.device) + 0.5 * torch.rand(
            self.count, self.r, device=self.device
        )
        found = {"lam": 1 + apart.flatten() / self.r, "log_gain": apart.new_zeros(())}
        for name in NAMES:
            for n, group in enumerate(self._side(name).groups):
                rows = torch.randn(len(group.layers), group.width, self.r, device=self.device)
                if len(name) == 1:
                    rows = torch.linalg.qr(rows)[0]
                found[f"{name}{n}"] = rows.mT.flatten(0, 1).contiguous()
        return found

    def _side(self, name: str):  # type: ignore[no-untyped-def]
        return self.layout.p if name.endswith("p") else self.layout.q

    def packed(self, inputs: Tensors, name: str) -> list[torch.Tensor]:
        return [inputs[f"{name}{n}"] for n in range(len(self._side(name).groups))]

    def step(self, inputs: Tensors) -> list[torch.Tensor]:
        """In place: the candidates, and all that the step has changed."""
        p, q, *rest = (self.packed(inputs, name) for name in NAMES)
        lam, gain = inputs["lam"], inputs["log_gain"]
        candidates = ops.spectral_step_(
            p, lam, q, *rest, self.slots, eta=ETA, log_gain=gain, gain_rate=RATE
        )
        return [candidates, lam, gain, *p, *q, *rest[0], *rest[1]]

    def formula(self, inputs: Tensors) -> list[torch.Tensor]:
        """The same, layer by layer on the CPU; nothing is changed."""
        given = {name: t.detach().cpu() for name, t in inputs.items()}
        own = {name: self._side(name).split(self.packed(given, name)) for name in NAMES}
        cosine = torch.nn.functional.cosine_similarity
        cosines = [
            cosine(m.flatten(), g.flatten(), dim=0)
            for side in "pq"
            for m, g in zip(own[f"momentum_{side}"], own[f"gradient_{side}"], strict=True)
        ]
        gain = next_gain(given["log_gain"], torch.stack(cosines), RATE)
        layers: list[Layer] = []
        candidates = []
        for n, lam in enumerate(given["lam"].split(self.r)):
            p, q, momentum_p, momentum_q, *gradients = (own[name][n] for name in NAMES)
            layer, found = spectral_step_reference(
                Layer(p, lam, q, momentum_p, momentum_q), *gradients, eta=ETA * float(gain.exp())
            )
            layers.append(layer)
            candidates.append(found)
        out = [torch.stack(candidates), torch.cat([layer.lam for layer in layers]), gain]
        for name in NAMES[:4]:
            for group in self._side(name).groups:
                out.append(torch.cat([getattr(layers[n], name) for n in group.layers]))
        return [t.to(self.device) for t in out]

    def traffic(self) -> dict[str, traffic.Traffic]:
        """By kernel."""
        groups = [*self.layout.p.groups, *self.layout.q.groups]
        sizes = [(len(group.layers), self.r, group.width) for group in groups]
        nothing = traffic.Traffic(0, 0)
        return {
            "gram": sum((traffic.spectral_gram(*size) for size in sizes), nothing),
            "solve": traffic.spectral_solve(self.count, self.r),
            "write": sum((traffic.spectral_write(*size) for size in sizes), nothing),
        }
