# mypy: allow-untyped-defs
"""The small problems of a spectral step in Triton, one program a layer: `ops.spectral_step.solve`.

All is in float64 and in registers, for ranks up to 32. A matrix of 2R × 2R is four blocks of R × R,
whose columns come in two halves, left and right; [R, R] blocks of the two sides are the diagonal of
one. There is one decomposition, `jacobi`, in which a column of zeros stays one: coordinates that
nothing leads to never mix with others.
"""

import triton
import triton.language as tl

# As ops.spectral_step has them: what counts as no direction of a momentum, as inside of the span of
# P, and as a candidate of zero.
LOWEST = tl.constexpr(1e-10)  # of squares
INSIDE = tl.constexpr(1e-10)
ZERO = tl.constexpr(1e-11)
CLOSE = tl.constexpr(1e-14)  # cosine of two columns that are turned no more
SWEEPS = tl.constexpr(30)
HIGHEST_GAIN = tl.constexpr(2.5)


@triton.jit
def product(a, b):
    """a·b of two blocks; of large ones column by row, or all registers go to the summands."""
    R: tl.constexpr = a.shape[0]
    if R < 16:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        o = tl.arange(0, R)
        out = tl.zeros([R, R], tl.float64)
        for k in range(R):
            column = tl.sum(tl.where((o == k)[None, :], a, 0.0), 1)
            row = tl.sum(tl.where((o == k)[:, None], b, 0.0), 0)
            out += column[:, None] * row[None, :]
        return out


@triton.jit
def identity(R: tl.constexpr):
    o = tl.arange(0, R)
    return (o[:, None] == o[None, :]).to(tl.float64)


@triton.jit
def next_pairs(left, right, R: tl.constexpr):
    """Columns as in a tournament: all but the first of the left move on by one place."""
    o = tl.arange(0, R)[None, :] + tl.zeros([R, R], tl.int32)
    from_left = tl.gather(left, tl.maximum(o - 1, 0), 1)
    from_right = tl.gather(right, tl.minimum(o + 1, R - 1), 1)
    first_right = tl.gather(right, o * 0, 1)
    new_left = tl.where(o == 0, left, tl.where(o == 1, first_right, from_left))
    return new_left, tl.where(o == R - 1, left, from_right)


@triton.jit
def jacobi(a00, a01, a10, a11, R: tl.constexpr):
    """X = A·V with orthogonal columns and V orthogonal: A = U Σ Vᵀ, where X = U Σ.

    One-sided Jacobi rotations of R pairs of columns at a time, until a sweep has none left to turn.
    """
    v00, v01 = identity(R), tl.zeros([R, R], tl.float64)
    v10, v11 = tl.zeros([R, R], tl.float64), identity(R)
    size = tl.sum(a00 * a00 + a01 * a01 + a10 * a10 + a11 * a11)
    sweep = 0
    turned = 1
    while (sweep < SWEEPS) & (turned > 0):
        turned = 0
        for _ in range(2 * R - 1):
            alpha = tl.sum(a00 * a00 + a10 * a10, 0)[None, :]
            beta = tl.sum(a01 * a01 + a11 * a11, 0)[None, :]
            gamma = tl.sum(a00 * a01 + a10 * a11, 0)[None, :]
            wanted = tl.abs(gamma) > tl.sqrt(alpha * beta) * CLOSE
            wanted = wanted & (tl.minimum(alpha, beta) > 1e-30 * size)
            zeta = (beta - alpha) / tl.where(wanted, 2.0 * gamma, 1.0)
            t = tl.where(zeta < 0.0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            t = tl.where(wanted, t, 0.0)
            c = 1.0 / tl.sqrt(1.0 + t * t)
            s = c * t
            a00, a01 = c * a00 - s * a01, s * a00 + c * a01
            a10, a11 = c * a10 - s * a11, s * a10 + c * a11
            v00, v01 = c * v00 - s * v01, s * v00 + c * v01
            v10, v11 = c * v10 - s * v11, s * v10 + c * v11
            turned += tl.sum(wanted.to(tl.int32))
            if R > 1:
                a00, a01 = next_pairs(a00, a01, R)
                a10, a11 = next_pairs(a10, a11, R)
                v00, v01 = next_pairs(v00, v01, R)
                v10, v11 = next_pairs(v10, v11, R)
        sweep += 1
    return a00, a01, a10, a11, v00, v01, v10, v11


@triton.jit
def eigen(a_p, a_q, R: tl.constexpr):
    """Eigenvectors (columns) and eigenvalues [1, R] of two positive semidefinite blocks."""
    none = tl.zeros([R, R], tl.float64)
    x_p, _, _, x_q, v_p, _, _, v_q = jacobi(a_p, none, none, a_q, R)
    e_p, e_q = tl.sqrt(tl.sum(x_p * x_p, 0)), tl.sqrt(tl.sum(x_q * x_q, 0))
    return v_p, e_p[None, :], v_q, e_q[None, :]


@triton.jit
def scaled(values, there, exponent: tl.constexpr):
    """values^exponent where they are `there`, else 0."""
    root = tl.sqrt(tl.where(there, values, 1.0))
    if exponent < 0:
        root = 1.0 / root
    if exponent == 0:
        root = tl.zeros_like(root) + 1.0
    return tl.where(there, root, 0.0)


@triton.jit
def power(vectors, values, there, exponent: tl.constexpr):
    """V·diag(values^exponent)·Vᵀ over the values that are `there`; exponents ½, 0 and −½."""
    return product(vectors * scaled(values, there, exponent), tl.trans(vectors))


@triton.jit
def basis_of(root_vectors, root_values, vectors, values, of_mp):
    """(root, its inverse, direction, inside, what is left) of one side: see `solve.Basis`."""
    everywhere = root_values > 0.0
    root = power(root_vectors, root_values, everywhere, 1)
    inverse = power(root_vectors, root_values, everywhere, -1)
    there = values > tl.max(values) * LOWEST
    direction = power(vectors, values, there, -1)
    inside = product(direction, product(of_mp, inverse))
    rest = power(vectors, values, there, 0) - product(inside, tl.trans(inside))
    return root, inverse, direction, inside, rest


@triton.jit
def completed(on_p, on_o, found, real, R: tl.constexpr):
    """Rows not found become orthonormal ones in the span of P: Gram-Schmidt with pivots.

    The coordinate of P̂ that the rows so far hold least of has 1/R of it outside of them at least.
    """
    o = tl.arange(0, R)
    on_p = tl.where(found[:, None], on_p, 0.0)
    on_o = tl.where(found[:, None], on_o, 0.0)
    for i in range(R):
        missing = tl.sum(((o == i) & real & (found == 0)).to(tl.int32))
        if missing > 0:
            outside = tl.where(real, 1.0 - tl.sum(on_p * on_p, 0), -1.0)
            pivot = tl.argmax(outside, 0)
            new_p = (o == pivot).to(tl.float64)
            new_o = new_p * 0.0
            for _ in range(2):  # once more takes what rounding left
                along = tl.sum(on_p * new_p[None, :] + on_o * new_o[None, :], 1)[:, None]
                new_p -= tl.sum(along * on_p, 0)
                new_o -= tl.sum(along * on_o, 0)
            norm = tl.sqrt(tl.sum(new_p * new_p + new_o * new_o))
            on_p = tl.where((o == i)[:, None], (new_p / norm)[None, :], on_p)
            on_o = tl.where((o == i)[:, None], (new_o / norm)[None, :], on_o)
    return on_p, on_o


@triton.jit
def signs_of(on_p, on_o, R: tl.constexpr):
    """The sign of each row's largest coordinate, [R, 1]."""
    o = tl.arange(0, R)[None, :]
    of_p = tl.sum(tl.where(o == tl.argmax(tl.abs(on_p), 1)[:, None], on_p, 0.0), 1)
    of_o = tl.sum(tl.where(o == tl.argmax(tl.abs(on_o), 1)[:, None], on_o, 0.0), 1)
    largest = tl.where(tl.abs(of_p) >= tl.abs(of_o), of_p, of_o)
    return tl.where(largest < 0.0, -1.0, 1.0)[:, None]


@triton.jit
def finite(x):
    """1 if all of x is, else 0."""
    return tl.min((x - x == 0.0).to(tl.int32))


@triton.jit
def matrix_of(row, offsets, rows, n, BM: tl.constexpr):
    """The matrix of one side whose first row belongs to this row of Λ."""
    found = 0
    for first in range(0, n, BM):
        o = first + tl.arange(0, BM)
        start = tl.load(offsets + o, mask=o < n, other=0)
        end = tl.load(offsets + o + 1, mask=o < n, other=0)
        m = (o < n) & (end > start)
        found += tl.sum(tl.where(m & (tl.load(rows + start, mask=m, other=-1) == row), o, 0))
    return found


@triton.jit
def before(values, others, o, o_others):
    """How many of `others` come before each of `values` in descending order, [R]."""
    equal = (others[None, :] == values[:, None]) & (o_others[None, :] < o[:, None])
    return tl.sum(((others[None, :] > values[:, None]) | equal).to(tl.int32), 1)


@triton.jit
def store_some(pointer, places, values, count):
    """Store the values that have one of the first `count` places."""
    values = values.to(tl.float32).to(pointer.dtype.element_ty)
    tl.store(pointer + places, values, mask=places < count)


@triton.jit
def learned(log_gain, totals, cosines, rate, count, BM: tl.constexpr):
    """The gain's logarithm after this step: `ops.spectral_step.next_gain`."""
    found, known = tl.zeros([BM], tl.float64), tl.zeros([BM], tl.float64)
    for start in range(0, count, BM):
        o = start + tl.arange(0, BM)
        total = tl.load(totals + o, mask=o < count, other=0.0)
        cosine = tl.load(cosines + o, mask=o < count, other=0.0)
        used = (total > 0.0) & (total - total == 0.0) & (cosine == cosine)
        found += tl.where(used, cosine, 0.0)
        known += used.to(tl.float64)
    mean = tl.sum(found) / tl.maximum(tl.sum(known), 1.0)
    gain = tl.load(log_gain).to(tl.float32).to(tl.float64) + rate * mean
    return tl.minimum(tl.maximum(gain, -HIGHEST_GAIN), HIGHEST_GAIN)


@triton.jit(do_not_specialize=["n", "max_rank"])
def solve_kernel(
    grams, totals, cosines, log_gain, next_gain, gain_rate, lam, mask, eta, scaling, decay, rows_p,
    rows_q, offsets, transforms, moves, candidates, n, max_rank, R: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One layer: Λ⁺, its candidates, and for each side T and whether it moves.

    grams: [2, n, 3, R, R] (PPᵀ, vPᵀ, vvᵀ), totals, cosines: [2, n], by side in its matrices' order;
    transforms: [2, n, 3, R, R] (P⁺ of P and of v, m⁺ of m), moves: [2, n] likewise.
    """
    layer = tl.program_id(0)
    o = tl.arange(0, R)
    first = tl.load(offsets[1] + layer)
    rank = (tl.load(offsets[1] + layer + 1) - first).to(tl.int32)
    real = o < rank
    i_p = matrix_of(first, offsets[0], rows_p, n, BM)
    i_q = matrix_of(first, offsets[2], rows_q, n, BM) + n
    block = o[:, None] * R + o[None, :]
    at_p, at_q = i_p * 3 * R * R + block, i_q * 3 * R * R + block
    g_p, g_q = grams + at_p, grams + at_q
    s = tl.load(scaling + layer).to(tl.float64)
    kept = real
    if mask is not None:
        kept = kept & (tl.load(mask + first + o, mask=real, other=0.0).to(tl.float32) > 0.0)
    b_lam = tl.load(lam + first + o, mask=kept, other=0.0).to(tl.float32).to(tl.float64) * s
    half = tl.load(eta + layer).to(tl.float64) * -0.5
    if log_gain is not None:
        gain = learned(log_gain, totals, cosines, gain_rate, 2 * n, BM)
        half *= tl.exp(gain)
        if layer == 0:  # the others read the old one
            tl.store(next_gain, gain)
    values = b_lam * tl.load(decay + layer).to(tl.float64)
    of_p, of_q = tl.load(g_p), tl.load(g_q)
    mp_p, mp_q = tl.load(g_p + R * R), tl.load(g_q + R * R)
    mm_p, mm_q = tl.load(g_p + 2 * R * R), tl.load(g_q + 2 * R * R)
    total = tl.load(totals + i_p) + tl.load(totals + i_q)
    active = finite(of_p) & finite(of_q) & finite(mp_p) & finite(mp_q) & finite(mm_p) & finite(mm_q)
    wanted = (half - half == 0.0) & (total - total == 0.0) & (total > 0.0) & (rank > 0)
    active = active & finite(values) & wanted.to(tl.int32)
    p_candidates = candidates + layer.to(tl.int64) * 2 * max_rank
    if active == 0:
        size = tl.where(real, tl.abs(b_lam), 0.0)
        order = tl.where(size == size, size, float("inf"))  # NaN, too, has a place
        place = before(order, order, o, o)
        store_some(p_candidates, place, size, max_rank)
        store_some(p_candidates + max_rank, o, tl.zeros_like(size), max_rank)
        if rank > 0:
            tl.store(moves + i_p, 0)
            tl.store(moves + i_q, 0)
    else:
        unused = tl.where((o[:, None] == o[None, :]) & (o[:, None] >= rank), 1.0, 0.0)
        v_p, e_p, v_q, e_q = eigen(of_p + unused, of_q + unused, R)
        w_p, n_p, w_q, n_q = eigen(mm_p, mm_q, R)
        root_p, inverse_p, direction_p, inside_p, rest_p = basis_of(v_p, e_p, w_p, n_p, mp_p)
        root_q, inverse_q, direction_q, inside_q, rest_q = basis_of(v_q, e_q, w_q, n_q, mp_q)
        # Only the end needs these: until then they lie where the results will be, out of registers.
        t_p, t_q = transforms + at_p, transforms + at_q
        tl.store(t_p, inverse_p)
        tl.store(t_q, inverse_q)
        tl.store(t_p + R * R, direction_p)
        tl.store(t_q + R * R, direction_q)
        v_p, e_p, v_q, e_q = eigen(rest_p, rest_q, R)
        outside_p = v_p * scaled(e_p, e_p > INSIDE, 1)
        outside_q = v_q * scaled(e_q, e_q > INSIDE, 1)
        back_p = tl.trans(v_p * scaled(e_p, e_p > INSIDE, -1))
        back_q = tl.trans(v_q * scaled(e_q, e_q > INSIDE, -1))

        # R_Qᵀ [[s·Λ, −η/2], [−η/2, 0]] R_P with R = [[root, 0], [inside, outside]]
        up, down = values[:, None] * root_p + half * inside_p, half * root_p
        c00 = product(root_q, up) + product(tl.trans(inside_q), down)
        c01 = half * product(root_q, outside_p)
        c10 = product(tl.trans(outside_q), down)
        x00, x01, x10, x11, v00, v01, v10, v11 = jacobi(c00, c01, c10, c00 * 0.0, R)
        left = tl.sqrt(tl.sum(x00 * x00 + x10 * x10, 0))
        right = tl.sqrt(tl.sum(x01 * x01 + x11 * x11, 0))
        highest = tl.maximum(tl.max(left), tl.max(right))
        left = tl.where(left > highest * ZERO, left, 0.0)
        right = tl.where(right > highest * ZERO, right, 0.0)
        found = tl.sum((left > 0.0).to(tl.int32)) + tl.sum((right > 0.0).to(tl.int32))
        at_left = before(left, left, o, o) + before(left, right, o, o + R)
        at_right = before(right, left, o + R, o) + before(right, right, o + R, o + R)
        store_some(p_candidates, at_left, left, 2 * max_rank)
        store_some(p_candidates, at_right, right, 2 * max_rank)

        # The largest go to the rows that are kept, in their order; the next to the pruned rows.
        k = kept.to(tl.int32)
        place = tl.where(kept, tl.cumsum(k, 0), tl.sum(k) + tl.cumsum(1 - k, 0)) - 1
        chosen = real & (place < found)
        to_left = (chosen[:, None] & (at_left[None, :] == place[:, None])).to(tl.float64)
        to_right = (chosen[:, None] & (at_right[None, :] == place[:, None])).to(tl.float64)
        taken = tl.sum(to_left * left[None, :] + to_right * right[None, :], 1)
        p_on_p = product(to_left, tl.trans(v00)) + product(to_right, tl.trans(v01))
        p_on_o = product(to_left, tl.trans(v10)) + product(to_right, tl.trans(v11))
        scale = (1.0 / tl.where(chosen, taken, 1.0))[:, None]
        q_on_p = (product(to_left, tl.trans(x00)) + product(to_right, tl.trans(x01))) * scale
        q_on_o = (product(to_left, tl.trans(x10)) + product(to_right, tl.trans(x11))) * scale
        p_on_p, p_on_o = completed(p_on_p, p_on_o, chosen, real, R)
        q_on_p, q_on_o = completed(q_on_p, q_on_o, chosen, real, R)
        sign = signs_of(p_on_p, p_on_o, R)
        p_on_p, p_on_o, q_on_p, q_on_o = sign * p_on_p, sign * p_on_o, sign * q_on_p, sign * q_on_o

        store_some(lam + first, o, tl.where(kept, taken / s, 0.0), rank)
        p_on_o, q_on_o = product(p_on_o, back_p), product(q_on_o, back_q)
        tl.debug_barrier()
        inverse_p, inverse_q = tl.load(t_p), tl.load(t_q)
        direction_p, direction_q = tl.load(t_p + R * R), tl.load(t_q + R * R)
        tl.debug_barrier()  # all is read before it is written over
        tl.store(t_p, product(p_on_p - product(p_on_o, inside_p), inverse_p))
        tl.store(t_q, product(q_on_p - product(q_on_o, inside_q), inverse_q))
        tl.store(t_p + R * R, product(p_on_o, direction_p))
        tl.store(t_q + R * R, product(q_on_o, direction_q))
        # P⁺Pᵀ moves the momentum of Q, and Q⁺Qᵀ that of P.
        tl.store(t_p + 2 * R * R, product(q_on_p, root_q))
        tl.store(t_q + 2 * R * R, product(p_on_p, root_p))
        tl.store(moves + i_p, 1)
        tl.store(moves + i_q, 1)
