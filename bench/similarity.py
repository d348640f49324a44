"""Table 8: cosine similarity of P, Λ, Q between HyperAdaLoRA and PEFT's AdaLoRA after training.

    python -m bench.similarity --data FOLDER [--seed 0 1 2] [--lr-hyper 3e-4] [--lr-adalora 1e-2]

Both are trained with each seed on the same batches from the same base model and head, at rank 3,
and compared layer by layer; what is reported is the mean over layers.

A layer's update is a sum of r terms λ·q pᵀ in no order, and p, q and λ change sign in pairs. The
paper does not say how it pairs them. Here directions are matched one to one so that the sum of
|cos(p, p')|·|cos(q, q')| is largest (scipy's linear_sum_assignment), each direction's sign is that
which makes cos(p, p') and cos(q, q') positive, and λ' takes the product of both signs. Then

    P, Q    mean of the cosines of matched directions
    Λ       cosine of the vectors of matched singular values
    as they stand    the cosine of whole P, Λ, Q, neither matched nor signed
    ΔW      cosine of the updates Σ λ·q pᵀ themselves, which no order or sign touches
    chance  P, Λ, Q and ΔW of the same AdaLoRA against Gaussian factors of the same shape

--peer takes AdaLoRA on this library's kernels in place of PEFT's: from random directions
("direct"), or from those of the first gradients ("direct-gradient"), where HyperAdaLoRA starts too.
Each seed appends a row. Before that a layer is compared with itself in another order and with other
signs, which must give 1.
"""

import statistics
import sys
from typing import Any

import torch
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .trained import Directions, Runs, directions, run_parser

PEERS = ("adalora", "direct", "direct-gradient")  # of bench.convergence
PARTS = ("P", "Λ", "Q", "ΔW")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def matched(one: Directions, other: Directions) -> dict[str, float]:
    """Similarities of one layer's factors, directions matched one to one."""
    p, q = (
        cosine_similarity(a.double()[:, None], b.double()[None], dim=2)  # [r, r']
        for a, b in ((one.p, other.p), (one.q, other.q))
    )
    rows, columns = linear_sum_assignment((p * q).abs().numpy(), maximize=True)
    signs = p[rows, columns].sign() * q[rows, columns].sign()
    return {
        "P": float(p[rows, columns].abs().mean()),
        "Λ": cosine(one.lam[rows], signs * other.lam[columns]),
        "Q": float(q[rows, columns].abs().mean()),
        "ΔW": cosine(update(one), update(other)),
    }


def as_they_stand(one: Directions, other: Directions) -> dict[str, float]:
    names = ("P", "Λ", "Q")
    return {name: cosine(a, b) for name, a, b in zip(names, one, other, strict=True)}


def update(layer: Directions) -> Tensor:
    """ΔW without its scaling: [d_out, d_in]."""
    return (layer.q.t() * layer.lam) @ layer.p


def gaussian_like(layer: Directions) -> Directions:
    return Directions(*(torch.randn_like(t) for t in layer))


def shuffled(layer: Directions) -> Directions:
    """The same update, its directions in another order and with other signs."""
    order = torch.arange(len(layer.lam)).flip(0)
    signs = torch.where(order % 2 == 0, -1.0, 1.0)
    p, lam, q = (t[order] for t in layer)
    return Directions(p * signs[:, None], -lam * signs, -q)


def compare(
    ours: dict[str, Directions], theirs: dict[str, Directions]
) -> dict[str, dict[str, float]]:
    """Means over the layers that both have.

    Raises:
        SystemExit: they adapt different layers, or the measure does not see a layer as itself.
    """
    if ours.keys() != theirs.keys():
        raise SystemExit(f"different layers: {sorted(ours.keys() ^ theirs.keys())}")
    for name, layer in theirs.items():
        for part, value in matched(layer, shuffled(layer)).items():
            if abs(value - 1) > 1e-5:  # fp32 factors
                raise SystemExit(f"{name}: {part} is {value} like itself in another order")
    torch.manual_seed(0)
    kinds = {
        "matched": [matched(ours[n], theirs[n]) for n in ours],
        "as they stand": [as_they_stand(ours[n], theirs[n]) for n in ours],
        "chance": [matched(gaussian_like(layer), layer) for layer in theirs.values()],
    }
    return {
        kind: {part: statistics.fmean(layer[part] for layer in found) for part in found[0]}
        for kind, found in kinds.items()
    }


def main() -> int:
    options = run_parser(__doc__)
    options.add_argument("--peer", choices=PEERS, default=PEERS[0])
    options.add_argument("--lr-hyper", type=float, default=3e-4)
    options.add_argument("--lr-adalora", type=float, default=1e-2)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.seed, arguments.steps = [0], 10
    runs, rows = Runs("similarity", arguments), []
    for seed in arguments.seed:
        lrs = {"generated": arguments.lr_hyper, arguments.peer: arguments.lr_adalora}
        key = runs.key(seed=seed, peer=arguments.peer, lr=lrs)
        row = runs.stored(key)
        if row is None:
            trained: dict[str, Any] = {}
            accuracy = {}
            for method, lr in lrs.items():
                own = runs.key(method=method, lr=lr, seed=seed)
                result = runs.train(own, lambda model: {"directions": directions(model)})
                trained[method], accuracy[method] = result["directions"], result["accuracy"]
            row = key | {
                "layers": len(trained["generated"]),
                "similarity": compare(trained["generated"], trained[arguments.peer]),
                "accuracy": accuracy,
            }
            runs.save(row)
        rows.append(row)
    title = f"{arguments.task}, {runs.model}, {arguments.steps} steps: mean of {len(rows)} seeds"
    view = Table(f"similarity to {arguments.peer}", *PARTS, title=title)
    for kind in rows[0]["similarity"]:
        found = [row["similarity"][kind] for row in rows]
        cells = (
            f"{statistics.fmean(f[part] for f in found):.4f}" if part in found[0] else "–"
            for part in PARTS
        )
        view.add_row(kind, *cells)
    runs.console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
