"""The hypernetworks in plain steps, one matrix and one head at a time: what the module is tested
against."""

import torch
from torch import nn
from torch.nn import functional as F

from hal_kernels.nn.packed import Packed


def encoder_layer(body, which, tokens, kept):
    """The transformer layer of set `which` (P, Λ, Q) on the tokens ``[r, H]`` of one matrix."""
    w = {name: parameter[which] for name, parameter in body.named_parameters()}

    def linear(name, t):
        return t @ w[f"{name}_weight"].t() + w[f"{name}_bias"]

    def norm(number, t):
        centred = t - t.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return centred / deviation * w[f"norm{number}_weight"] + w[f"norm{number}_bias"]

    def attended(t):
        context = []
        for query, key, value in zip(
            *(part.chunk(body.heads, -1) for part in linear("qkv", t).chunk(3, -1)), strict=True
        ):
            scores = query @ key.t() / query.shape[-1] ** 0.5
            if kept.any():
                scores = scores.masked_fill(~kept, -torch.inf)
            context.append(scores.softmax(-1) @ value)
        return linear("out", torch.cat(context, -1))

    def transformed(t):
        f = linear("up", t)
        return linear("down", f * (1 + torch.erf(f / 2**0.5)) / 2)

    if body.norm_first:
        t = tokens + attended(norm(1, tokens))
        return t + transformed(norm(2, t))
    t = norm(1, tokens + attended(tokens))
    return norm(2, t + transformed(t))


def body_of(body, which, tokens, kept, below):
    """One of the three bodies (0: P, 1: Λ, 2: Q) on the tokens ``[r, H]`` of one matrix."""
    if hasattr(body, "qkv_weight"):
        tokens, kept = F.pad(tokens, (0, 0, 0, below)), F.pad(kept, (0, below))
        return encoder_layer(body, which, tokens, kept)
    net = body.sets[which]
    return net(tokens) if isinstance(net[0], nn.Linear) else net(tokens[:, None])


def generated(hypernet, layout, factors, mask, base=None):
    """What it makes of all layers' factors."""
    sides = layout.p.split(factors.p), layout.q.split(factors.q)
    lam, kept = factors.lam.split(layout.ranks), (mask > 0).split(layout.ranks)
    embeddings = hypernet.lam_embedding.split(layout.ranks)
    widths = [[group.width for group in side.groups] for side in (layout.p, layout.q)]
    made = [[], [], []]
    for i, spec in enumerate(layout.layers):
        p, q = widths[0].index(spec.d_in), widths[1].index(spec.d_out)
        tokens = (
            hypernet.p_in[p](sides[0][i]),
            hypernet.lam_in(lam[i][:, None]) + embeddings[i],
            hypernet.q_in[q](sides[1][i]),
        )
        outputs = hypernet.p_out[p], hypernet.lam_out, hypernet.q_out[q]
        rank, own = layout.ranks[i], kept[i]
        # Where no direction is kept, the zeros that fill a matrix up are attended to as well.
        below = 0 if own.any() else layout.max_rank - rank
        for which, (t, out) in enumerate(zip(tokens, outputs, strict=True)):
            made[which].append(out(body_of(hypernet.body, which, t, own, below)[:rank]))
    p, q = (
        tuple(torch.cat([rows[i] for i in group.layers]) for group in side.groups)
        for side, rows in ((layout.p, made[0]), (layout.q, made[2]))
    )
    result = Packed(p, torch.cat(made[1])[:, 0], q)
    return (
        result
        if base is None
        else result.like([b + t for b, t in zip(base.tensors(), result.tensors(), strict=True)])
    )
