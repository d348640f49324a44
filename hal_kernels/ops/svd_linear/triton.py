# mypy: allow-untyped-defs
"""The SVD layers in Triton: what is launched for one layer or several that share x.

Three paths forward, of equal result up to rounding:

    prepare  shrink; expand writes s·(h ⊙ Λ)Q + b into y; the vendor's GEMM adds xWᵀ to it
             (beta = 1), so that y is read where matrix work hides the read. It adds in float32;
             what was prepared is rounded to y's dtype once.
    add      the vendor's GEMM; shrink; expand reads y, adds b and the adapter, and writes y.
    fused    one Triton GEMM with h as a second accumulator: x is read once, but multiplied with P
             in every column tile. For small T and narrow d_out: the rule is `configs.fused_tile`.

Without a `path` argument: fused where it pays for every layer, else what the architecture's config
says. Backward has the first two: prepare writes the adapters' part of dx, and dy·W is added to it.

Launches beyond the base GEMMs of n layers (of y forward, of dx backward): forward n + 1, fused none
(the one launch is the base GEMM); backward n + 2 (gradients of each dy, of x with dx, the
reduction), one less up to one block of rows, and 2n where the factors are frozen.
"""

from collections.abc import Sequence

import torch

from ...kernels.configs import HIGHEST_RANK, architecture_of
from ...kernels.launch import DTYPES, dot_precision, on_device_of, padded
from ...kernels.plan import kinds
from . import plans
from .default import Factors, Gradients, empty_gradients, empty_outputs, flat, joined, ranks_of
from .triton_kernels import (
    expand_kernel,
    fused_kernel,
    gradients_dy_apart_kernel,
    gradients_dy_kernel,
    gradients_x_kernel,
    shrink_kernel,
)
from .triton_sums import penalty_kernel, reduce_kernel

PATHS = ("prepare", "add", "fused")
PENALTY = {"BR": 16, "num_warps": 4}


def supported(x: torch.Tensor, p: Factors, q: Factors) -> bool:
    """Whether the kernels take these inputs.

    Not: float64 (tl.dot has no fast form of it), joined ranks above 128 (a tile of them does not
    fit shared memory) and sizes of zero (nothing to launch).
    """
    empty = 0 in [x.numel(), *(t.numel() for t in q)]
    return x.dtype in DTYPES and not empty and sum(ranks_of(p)) <= HIGHEST_RANK


def forward(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    base: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    *,
    path: str | None = None,
    grams: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `default.forward`, of what is `supported`. `path` is one of `PATHS`, to measure them.

    A single layer's partial Gram matrices of P and Q, for `penalty_of`, are appended to `grams`.
    """
    rows, ranks = _read(x), ranks_of(p)
    every, lam = dense(joined(p)), [t.contiguous() for t in lam]
    base = [
        b if b is None or w is None else b.contiguous() for b, w in zip(base, weight, strict=True)
    ]
    p, q = [every] if len(ranks) == 1 else [dense(t) for t in p], [dense(t) for t in q]
    path = "prepare" if grams is not None and path is None else path
    with on_device_of(x):
        launches = None
        if path not in ("prepare", "add") and weight[0] is not None:
            launches = plans.fused(
                architecture_of(x.device), kinds(rows, seed, *weight, *base, *p, *lam, *q),
                scaling, dropout, path == "fused", dot_precision(x.dtype),
            )  # fmt: skip
        if launches is None:
            rows = flat(rows)
            h = shrink(rows, every, dropout, seed, grams)
            gemm_first = _gemm_first(x, path)
            return _expanded(x, rows, h, weight, base, lam, q, scaling, gemm_first, grams)
        outputs, h = empty_outputs(x, p, q)
        layers = zip(
            launches, weight, base, p, lam, q, outputs, columns_of(h, ranks), strict=True
        )  # fmt: skip
        for launch, *layer in layers:
            launch(fused_kernel, rows, *layer, seed)
        return outputs, h


def _expanded(
    x: torch.Tensor,
    rows: torch.Tensor,
    parts: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    base: Sequence[torch.Tensor | None],
    lam: Factors,
    q: Factors,
    scaling: float,
    gemm_first: bool,
    grams: list[torch.Tensor] | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], t.shape[1]) for t in q]
    h, ranks = total_of(parts), ranks_of(q)
    columns = zip(columns_of(parts, ranks), columns_of(h, ranks), strict=True)
    layers = zip(outputs, weight, base, columns, lam, q, strict=True)
    for out, own_weight, own_base, (own_parts, own_h), own_lam, own_q in layers:
        y, bias, added = flat(out), own_base, None
        if own_weight is None:
            assert own_base is not None
            bias, added = None, rows_of(own_base)
        else:
            added = torch.mm(rows, own_weight.t(), out=y) if gemm_first else None
        expand_(
            y, own_parts, own_lam, own_q, scaling, h_sum=own_h, bias=bias, base=added, grams=grams
        )
        if own_weight is not None and not gemm_first:
            y.addmm_(rows, own_weight.t())
    return outputs, h


def backward(
    dy: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
    *,
    path: str | None = None,
) -> Gradients:
    """As `default.backward`, where at least one dy is given. `path` is "prepare" or "add"."""
    upstream = [None if g is None else rows_of(g) for g in dy]
    gradient = x.new_empty(x.shape if needs_dx else (0,))
    dx = flat(gradient) if needs_dx else None
    gemms = [
        (g, w)
        for g, w in zip(upstream, weight, strict=True)
        if needs_dx and g is not None and w is not None
    ]
    add = gemm_first = bool(gemms) and _gemm_first(x, path)
    with on_device_of(x):
        if gemm_first:
            _multiply_(dx, gemms, add=False)
        if needs_factors:
            factors = _factor_gradients(
                upstream, _read(x), h.contiguous(), p, lam, q, scaling, dropout, seed, tangent,
                dx, add,
            )  # fmt: skip
        else:
            factors = empty_gradients(x, p, lam, q, tangent, False, False)[1:]
            if dx is not None:
                for g, own_p, own_lam, own_q in zip(upstream, p, lam, q, strict=True):
                    if g is not None:
                        u, base = shrink(g, dense(own_q)), dx if add else None
                        lam_, p_ = own_lam.contiguous(), dense(own_p)
                        expand_(dx, u, lam_, p_, scaling, base=base, dropout=dropout, seed=seed)
                        add = True
        if not gemm_first:
            _multiply_(dx, gemms, add=True)
    return gradient, *factors


def _gemm_first(x: torch.Tensor, path: str | None) -> bool:
    return not architecture_of(x.device).prepare if path is None else path == "add"


def _multiply_(
    out: torch.Tensor | None, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, add: bool
) -> None:
    """out (+)= Σ a·b; without pairs there may be no `out`."""
    for a, b in pairs:
        assert out is not None
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        add = True


def _factor_gradients(
    dy: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    dx: torch.Tensor | None,
    add: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """dP and dΛ, joined, and each layer's dQ; the adapters' dx is written to `dx`, or added."""
    ranks, q, lam = ranks_of(p), [dense(t) for t in q], [t.contiguous() for t in lam]
    every_p, every_lam = dense(joined(p)), joined(lam).contiguous()
    plan = plans.backward(
        architecture_of(x.device), kinds(x, h, seed, dx, every_p, every_lam, *dy, *lam, *q),
        scaling, tangent, dropout, add, dot_precision(x.dtype),
    )  # fmt: skip
    u = (h.new_empty if None not in plan.of_dy else h.new_zeros)(plan.u)
    sums = []
    layers = zip(
        dy, columns_of(h, ranks), columns_of(u, ranks), lam, q, plan.of_dy, strict=True
    )  # fmt: skip
    for own_dy, own_h, own_u, own_lam, own_q, own in layers:
        if own_dy is None:
            sums.append(torch.zeros_like(own_q))
        else:
            factors = (own_lam, own_q)
            sums.append(gradients_dy(own_dy, own_h, own_u, *factors, scaling, tangent, plan=own))
    dp, dlam = gradients_x(
        x, h, u, every_p, every_lam, scaling,
        tangent=tangent, dropout=dropout, seed=seed, dx=dx, add=add, plan=plan.of_x,
    )  # fmt: skip
    dp, dlam, *dq = reduce([dp, dlam, *sums], [every_p, every_lam, *q])
    return dp, dlam, dq


def _read(x: torch.Tensor) -> torch.Tensor:
    """What only kernels read: as `rows_of`, or still ``[..., d]``, which spares a view."""
    return x if x.is_contiguous() else rows_of(x)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` as ``[T, d]`` with adjacent columns and rows apart; copied only if need be."""
    x = flat(x)
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def dense(p: torch.Tensor) -> torch.Tensor:
    """P or Q with adjacent columns: the packed factors' own rows are, and are not copied."""
    return p if p.stride(1) == 1 else p.contiguous()


def columns_of(t: torch.Tensor, ranks: list[int]) -> Sequence[torch.Tensor]:
    """Each layer's columns of h, u or partial sums of them."""
    return [t] if len(ranks) == 1 else t.split_with_sizes(ranks, -1)


def shrink(
    x: torch.Tensor,
    p: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    grams: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Partial sums ``[parts, T, r]`` of h = dropout(x)·P. One launch.

    Partial sums ``[splits, r, r]`` of PᵀP are appended to `grams`, if it is given.
    """
    plan = plans.shrink(
        architecture_of(x.device), kinds(x, p, seed), dropout, grams is not None,
        dot_precision(x.dtype), dot_precision(p.dtype),
    )  # fmt: skip
    h = x.new_empty(plan.h, dtype=torch.float32)
    plan.launch(shrink_kernel, x, p, h, seed, _gram(grams, h, plan.gram))
    return h


def total_of(h: torch.Tensor) -> torch.Tensor:
    """Where Σ_c h[c] ``[T, r]`` is to be found once `expand_` has summed: h itself if it can be."""
    return h[0] if h.shape[0] == 1 else h.new_empty(h.shape[1:])


def expand_(
    y: torch.Tensor,
    h: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    *,
    h_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    grams: list[torch.Tensor] | None = None,
) -> None:
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ)Q), written to ``[T, d]``. One launch.

    h is ``[parts, T, r]``, or columns of a wider one. `base` may be y itself. Where h has several
    parts, their sum is written to `h_sum` ``[T, r]``, which may be columns of a wider one too.
    Partial sums ``[splits, r, r]`` of QQᵀ are appended to `grams`, if it is given.
    """
    h_sum = h_sum if h.shape[0] > 1 else None
    plan = plans.expand(
        architecture_of(y.device), kinds(y, h, lam, q, bias, base, h_sum, seed), scaling, dropout,
        grams is not None, dot_precision(y.dtype), dot_precision(q.dtype),
    )  # fmt: skip
    gram = _gram(grams, h, plan.gram)
    plan.launch(expand_kernel, h, lam, q, bias, base, y, h_sum, seed, gram)


def _gram(
    grams: list[torch.Tensor] | None, h: torch.Tensor, shape: plans.Shape | None
) -> torch.Tensor | None:
    """A buffer for partial Gram matrices, if they are wanted."""
    if grams is None or shape is None:
        return None
    grams.append(h.new_empty(shape))
    return grams[-1]


def penalty_of(grams: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The penalty ‖R_P‖² + ‖R_Q‖² and [R_P, R_Q] ``[1, r, r]`` from partial Gram matrices."""
    r = grams[0].shape[-1]
    residuals = [t.new_empty(1, r, r) for t in grams]
    penalty = grams[0].new_empty(())
    with on_device_of(penalty):
        penalty_kernel[(1,)](
            *grams, *residuals, penalty, r, *map(len, grams), R=padded(r), **PENALTY
        )
    return penalty, residuals


def parts_of_u(dy: torch.Tensor, q: torch.Tensor) -> int:
    """In how many parts `gradients_dy` gives u best. It takes any number of them."""
    parts: int = plans.parts_of_u(architecture_of(dy.device), kinds(dy, q))
    return parts


def gradients_dy(
    dy: torch.Tensor,
    h: torch.Tensor,
    u: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    tangent: float = 0.0,
    plan: plans.OfDy | None = None,
) -> torch.Tensor:
    """Writes partial sums ``[parts, T, r]`` of dy·Qᵀ to `u`; returns dQ. One launch.

    dQ is ``[r, d]`` in Q's dtype, or partial sums of it ``[splits, r, d]``, which `reduce` takes.
    h ``[T, r]`` and u may be columns of wider ones; parts of u beyond dy's columns become zero.
    """
    plan = plan or plans.gradients_dy(
        architecture_of(dy.device), kinds(dy, q, h, lam, u), scaling, tangent,
        dot_precision(dy.dtype),
    )  # fmt: skip
    assert plan is not None
    dq = torch.empty_like(q) if plan.whole else h.new_empty(plan.dq)
    kernel = gradients_dy_apart_kernel if plan.apart else gradients_dy_kernel
    plan.launch(kernel, dy, q, h, lam, u, dq)
    return dq


def gradients_x(
    x: torch.Tensor,
    h: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    scaling: float,
    *,
    tangent: float = 0.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    add: bool = False,
    plan: plans.OfX | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dP and dΛ; the adapter's dx is written to `dx`, or with `add` added to it. One launch.

    dP is ``[r, d]`` in P's dtype and dΛ ``[r]`` in its own, or both are partial sums
    ``[splits, ...]``, which `reduce` takes. With `tangent` dΛ is empty. h ``[T, r]`` and u
    ``[parts, T, r]`` may be columns of wider ones. x may be contiguous with more dimensions.
    """
    base = dx if add else None
    plan = plan or plans.gradients_x(
        architecture_of(x.device), kinds(x, p, h, lam, u, dx, base, seed), scaling, tangent,
        dropout, dot_precision(x.dtype),
    )  # fmt: skip
    assert plan is not None
    dp = torch.empty_like(p) if plan.whole else h.new_empty(plan.dp)
    dlam = (lam if plan.whole or tangent else h).new_empty(plan.dlam)
    plan.launch(
        gradients_x_kernel, x, p, h, lam, u, dp, None if tangent else dlam, base, dx, seed
    )  # fmt: skip
    return dp, dlam


def reduce(sums: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each of `sums` that is partial, ``[splits, ...]``, summed to the shape and dtype of `like`.

    One launch for all of them, none where all are whole.
    """
    outputs = [
        t if t.dim() == of.dim() else of.new_empty(of.shape)
        for t, of in zip(sums, like, strict=True)
    ]
    partial = [(t, out) for t, out in zip(sums, outputs, strict=True) if t is not out]
    if partial:
        parts, totals = zip(*partial, strict=True)
        launch = plans.reduce(architecture_of(parts[0].device), kinds(*parts, *totals))
        launch(reduce_kernel, parts, totals)
    return outputs
