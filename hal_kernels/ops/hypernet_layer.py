"""The hypernetwork's transformer layer over all layers' tokens at once [3.3].

One BERT layer for S sets of weights (P, Λ, Q) on a batch axis. Tokens ``[S, G, r, H]``: one token
per singular direction; attention runs among the r tokens of one matrix.

    qkv = tW_qkvᵀ + b     c = softmax(q·kᵀ/√d_h + keys)·v     n = LN₁(t + cW_oᵀ + b)
    f = nW₁ᵀ + b          out = LN₂(n + GELU(f)·W₂ᵀ + b)

That is BERT's own order (post-LayerNorm). With ``norm_first``, as torch.nn.TransformerEncoderLayer
calls it, each half normalises what it reads, and no LayerNorm follows the sums:

    qkv = LN₁(t)W_qkvᵀ + b     z₁ = t + cW_oᵀ + b
    f = LN₂(z₁)W₁ᵀ + b         out = z₁ + GELU(f)·W₂ᵀ + b

Only directions that are kept serve as keys: a pruned token can be dropped for good (`compact`)
without changing any kept one. A matrix with no kept direction attends to all of its tokens.

The gradient is analytic; saved are qkv, the attention weights, c, z₁ = t + cW_oᵀ + b, f, and last
what LN₂ takes, or with ``norm_first`` what it gives.

Backends: default (plain PyTorch, every device), cuda (`kernels.hypernet_layer`, in Triton).
"""

import math
from typing import Any

import torch
from torch.nn import functional as F

from ._library import (
    define,
    expect_dtype,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_shape,
    expect_tensor,
    without_autocast,
)

PARAMETERS = (
    "qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm1_weight", "norm1_bias",
    "up_weight", "up_bias", "down_weight", "down_bias", "norm2_weight", "norm2_bias",
)  # fmt: skip


def hypernet_layer(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    *,
    heads: int,
    eps: float = 1e-12,
    norm_first: bool = False,
) -> torch.Tensor:
    """One transformer layer, for S sets of weights and G matrices of r tokens each.

    Args:
        tokens: ``[S, G, r, H]`` float32 or float64.
        keys: ``[S, G, r]`` bool, True where a token may be attended to.
        parameters: by the names in `PARAMETERS`; weights ``[S, out, in]``, the rest ``[S, out]``.
        heads: attention heads; divides H.
        eps: of both LayerNorms.
        norm_first: LayerNorm before attention and before the inner layer, instead of after each.

    Returns:
        ``[S, G, r, H]``, tokens' dtype.

    Raises:
        TypeError, ValueError, KeyError: naming the argument, what came and what was expected.
    """
    expect_floating("tokens", tokens)
    if tokens.dim() != 4:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected [S, G, r, H]")
    sets, _, _, hidden = tokens.shape
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads is {heads!r}, expected an int")
    expect_number("eps", eps, least=0.0)
    if heads <= 0 or hidden % heads:
        raise ValueError(f"heads is {heads}, expected a divisor of H = {hidden}")
    expect_dtype("keys", keys, torch.bool, "True where a token may be attended to")
    expect_shape("keys", keys, tuple(tokens.shape[:3]), "[S, G, r]")
    expect_same_device("tokens", tokens, keys=keys)
    missing = [name for name in PARAMETERS if name not in parameters]
    if missing:
        raise KeyError(f"parameters lacks {missing}, expected {list(PARAMETERS)}")
    expect_tensor("up_weight", parameters["up_weight"])
    inner = parameters["up_weight"].shape[1] if parameters["up_weight"].dim() > 1 else -1
    shapes = {
        "qkv_weight": (3 * hidden, hidden), "qkv_bias": (3 * hidden,),
        "out_weight": (hidden, hidden), "out_bias": (hidden,),
        "up_weight": (inner, hidden), "up_bias": (inner,),
        "down_weight": (hidden, inner), "down_bias": (hidden,),
    }  # fmt: skip
    for name in PARAMETERS:
        expect_shape(name, parameters[name], (sets, *shapes.get(name, (hidden,))), "[S, ...]")
        expect_dtype(name, parameters[name], tokens.dtype, "the dtype of tokens")
        expect_same_device("tokens", tokens, **{name: parameters[name]})
    with torch.autocast(tokens.device.type, enabled=False):
        return _hypernet_layer(
            tokens, keys, [parameters[name] for name in PARAMETERS], heads, eps, norm_first
        )[0]


def hypernet_layer_reference(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    heads: int,
    eps: float = 1e-12,
    norm_first: bool = False,
) -> torch.Tensor:
    """The layer for one set of weights at a time, with torch.nn.functional's own pieces."""
    outputs = []
    for s in range(tokens.shape[0]):
        w = {name: parameters[name][s] for name in PARAMETERS}
        usable = keys[s] | ~keys[s].any(-1, keepdim=True)
        if norm_first:
            t = tokens[s] + _attended(_normed(tokens[s], w, 1, eps), usable, w, heads)
            t = t + _transformed(_normed(t, w, 2, eps), w)
        else:
            t = _normed(tokens[s] + _attended(tokens[s], usable, w, heads), w, 1, eps)
            t = _normed(t + _transformed(t, w), w, 2, eps)
        outputs.append(t)
    return torch.stack(outputs)


def _attended(
    t: torch.Tensor, usable: torch.Tensor, w: dict[str, torch.Tensor], heads: int
) -> torch.Tensor:
    query, key, value = (
        part.unflatten(-1, (heads, t.shape[-1] // heads)).transpose(1, 2)
        for part in F.linear(t, w["qkv_weight"], w["qkv_bias"]).chunk(3, dim=-1)
    )
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=usable[:, None, None, :])
    return F.linear(context.transpose(1, 2).flatten(-2), w["out_weight"], w["out_bias"])


def _transformed(t: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    f = F.gelu(F.linear(t, w["up_weight"], w["up_bias"]))
    return F.linear(f, w["down_weight"], w["down_bias"])


def _normed(t: torch.Tensor, w: dict[str, torch.Tensor], number: int, eps: float) -> torch.Tensor:
    affine = w[f"norm{number}_weight"], w[f"norm{number}_bias"]
    return F.layer_norm(t, t.shape[-1:], *affine, eps)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.bmm(dy, weight), torch.bmm(dy.transpose(1, 2), x), dy.sum(1)


def _norm(
    z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm with one affine a set: (output, normalised z, mean, 1/std)."""
    normed, mean, rstd = torch.ops.aten.native_layer_norm(z, [z.shape[-1]], None, None, eps)
    return torch.addcmul(bias[:, None], normed, weight[:, None]), normed, mean, rstd


def _norm_backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    normed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dz, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy * weight[:, None], z, [z.shape[-1]], mean, rstd, None, None, [True, False, False]
    )
    return dz, (dy * normed).sum(1), dy.sum(1)


def _split_heads(x: torch.Tensor, matrices: int, rank: int, heads: int) -> torch.Tensor:
    """``[S, G·r, H]`` -> ``[S·G·heads, r, H/heads]``."""
    return (
        x.reshape(x.shape[0] * matrices, rank, heads, x.shape[-1] // heads)
        .transpose(1, 2)
        .flatten(0, 1)
        .contiguous()
    )


def _join_heads(x: torch.Tensor, sets: int, matrices: int, rank: int, heads: int) -> torch.Tensor:
    """The inverse of `_split_heads`."""
    width = x.shape[-1]
    x = x.view(sets * matrices, heads, rank, width).transpose(1, 2)
    return x.reshape(sets, matrices * rank, heads * width)


def _forward(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    parameters: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, ...]:
    w_qkv, b_qkv, w_o, b_o, g1, s1, w1, b1, w2, b2, g2, s2 = parameters
    sets, matrices, rank, hidden = tokens.shape
    t = tokens.reshape(sets, matrices * rank, hidden)
    qkv = _linear(_norm(t, g1, s1, eps)[0] if norm_first else t, w_qkv, b_qkv)
    query, key, value = (_split_heads(part, matrices, rank, heads) for part in qkv.chunk(3, dim=-1))
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(1.0 / math.sqrt(hidden // heads))
    usable = keys | ~keys.any(-1, keepdim=True)
    barred = usable.logical_not_().reshape(sets * matrices, 1, 1, rank)
    scores.view(sets * matrices, heads, rank, rank).masked_fill_(barred, -math.inf)
    attention = scores.softmax(-1)
    context = _join_heads(torch.bmm(attention, value), sets, matrices, rank, heads)
    z1 = t + _linear(context, w_o, b_o)
    n = _norm(z1, *((g2, s2) if norm_first else (g1, s1)), eps)[0]
    f = _linear(n, w1, b1)
    z2 = (z1 if norm_first else n) + _linear(F.gelu(f), w2, b2)
    if norm_first:
        return z2.view(tokens.shape), qkv, attention, context, z1, f, n
    out = _norm(z2, g2, s2, eps)[0]
    return out.view(tokens.shape), qkv, attention, context, z1, f, z2


def _forward_fake(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    parameters: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, ...]:
    sets, matrices, rank, hidden = tokens.shape
    count = matrices * rank
    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty(sets, count, 3 * hidden),
        tokens.new_empty(sets * matrices * heads, rank, rank),
        *(tokens.new_empty(sets, count, hidden) for _ in range(2)),
        tokens.new_empty(sets, count, parameters[6].shape[1]),
        tokens.new_empty(sets, count, hidden),
    )


def _backward_default(
    dout: torch.Tensor,
    tokens: torch.Tensor,
    parameters: list[torch.Tensor],
    saved: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    w_qkv, _, w_o, _, g1, s1, w1, _, w2, _, g2, s2 = parameters
    qkv, attention, context, z1, f, last = saved
    sets, matrices, rank, hidden = tokens.shape
    t = tokens.reshape(sets, matrices * rank, hidden)
    dout = dout.reshape(t.shape)
    if norm_first:
        dz2, n = dout, last
        norm1, norm2 = _norm(t, g1, s1, eps), _norm(z1, g2, s2, eps)
    else:
        norm1, norm2 = _norm(z1, g1, s1, eps), _norm(last, g2, s2, eps)
        dz2, dg2, ds2 = _norm_backward(dout, last, *norm2[1:], g2)
        n = norm1[0]

    df, dw2, db2 = _linear_backward(dz2, F.gelu(f), w2)
    df = torch.ops.aten.gelu_backward(df, f)
    dn, dw1, db1 = _linear_backward(df, n, w1)
    if norm_first:
        dz1, dg2, ds2 = _norm_backward(dn, z1, *norm2[1:], g2)
        dz1 = dz1 + dz2
    else:
        dz1, dg1, ds1 = _norm_backward(dn + dz2, z1, *norm1[1:], g1)
    dcontext, dw_o, db_o = _linear_backward(dz1, context, w_o)

    query, key, value = (_split_heads(part, matrices, rank, heads) for part in qkv.chunk(3, dim=-1))
    dcontext = _split_heads(dcontext, matrices, rank, heads)
    dvalue = torch.bmm(attention.transpose(1, 2), dcontext)
    dattention = torch.bmm(dcontext, value.transpose(1, 2))
    dscores = torch.ops.aten._softmax_backward_data(dattention, attention, -1, attention.dtype)
    dscores = dscores * (1.0 / math.sqrt(hidden // heads))
    dquery = torch.bmm(dscores, key)
    dkey = torch.bmm(dscores.transpose(1, 2), query)
    dqkv = torch.cat(
        [_join_heads(part, sets, matrices, rank, heads) for part in (dquery, dkey, dvalue)], -1
    )
    dt, dw_qkv, db_qkv = _linear_backward(dqkv, norm1[0] if norm_first else t, w_qkv)
    if norm_first:
        dt, dg1, ds1 = _norm_backward(dt, t, *norm1[1:], g1)
    gradients = [dw_qkv, db_qkv, dw_o, db_o, dg1, ds1, dw1, db1, dw2, db2, dg2, ds2]
    return (dt + dz1).view(tokens.shape), gradients


def _backward_fake(
    dout: torch.Tensor,
    tokens: torch.Tensor,
    parameters: list[torch.Tensor],
    saved: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return tokens.new_empty(tokens.shape), [w.new_empty(w.shape) for w in parameters]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tokens, _, parameters, *ctx.options = inputs  # heads, eps, norm_first
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(tokens, *parameters, *output[1:])


def _autograd_backward(ctx: Any, dout: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    tokens, *rest = ctx.saved_tensors
    count = len(PARAMETERS)
    dtokens, dparameters = _hypernet_layer_backward(
        dout, tokens, rest[:count], rest[count:], *ctx.options
    )
    return dtokens, None, list(dparameters), None, None, None


def _forward_cuda(*args: Any) -> tuple[torch.Tensor, ...]:
    from ..kernels.hypernet_layer import forward

    return forward(*args)


def _backward_cuda(*args: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from ..kernels.hypernet_layer import backward

    return backward(*args)


_hypernet_layer = define(
    "hypernet_layer(Tensor tokens, Tensor keys, Tensor[] parameters, int heads, float eps,"
    " bool norm_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_forward,
    cuda=without_autocast(_forward_cuda),
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    first_only=True,
)
_hypernet_layer_backward = define(
    "hypernet_layer_backward(Tensor dout, Tensor tokens, Tensor[] parameters, Tensor[] saved,"
    " int heads, float eps, bool norm_first) -> (Tensor, Tensor[])",
    default=_backward_default,
    cuda=without_autocast(_backward_cuda),
    fake=_backward_fake,
)
