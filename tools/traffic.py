"""What each kernel must at least move and multiply: bytes and flops as functions of the shapes.

T rows, widths d_in and d_out, rank r (not padded), `width` bytes an element of x, y, W, dy, dx and
`factor` bytes an element of P, Λ, Q. h, u and partial sums are float32. Reads are counted once an
element and kernel: what a second program reads again comes from the cache. Numbers of 8 bytes that
say where a matrix begins are not counted. `Traffic.floor_us` is the
roofline: no kernel is faster than its bytes at the GPU's bandwidth, nor than its flops at its
matrix rate.
"""

import dataclasses

SUM = 4  # bytes an element of h, u and partial sums


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read, bytes written and matrix flops of one or more kernels."""

    read: int
    written: int
    flops: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.read + other.read, self.written + other.written, self.flops + other.flops
        )

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def floor_us(self, bandwidth: float, matrix_rate: float) -> float:
        """Least time in µs, for bytes per µs (1 TB/s is 1e6) and flop per µs (1 TFLOP/s is 1e6)."""
        return max(self.moved / bandwidth, self.flops / matrix_rate)


def gemm(T: int, d_in: int, d_out: int, *, width: int = 2, beta: int = 0) -> Traffic:
    """y = xWᵀ (+ b); with beta = 1 it adds to y, which it then reads."""
    y = T * d_out * width
    return Traffic((T * d_in + d_in * d_out) * width + beta * y, y, 2 * T * d_in * d_out)


def shrink(T: int, d: int, r: int, *, width: int = 2, factor: int = 4, splits: int = 1) -> Traffic:
    """h = xP."""
    return Traffic(T * d * width + r * d * factor, splits * T * r * SUM, 2 * T * d * r)


def expand(
    T: int,
    d: int,
    r: int,
    *,
    width: int = 2,
    factor: int = 4,
    splits: int = 1,
    base: bool = False,
) -> Traffic:
    """y = s·(h ⊙ Λ)Q + b; with `base` it is added to a ``[T, d]`` matrix."""
    y, h = T * d * width, T * r * SUM
    read = splits * h + (d + 1) * r * factor + base * y
    return Traffic(read, y + (splits > 1) * h, 2 * T * d * r)


def gradients_dy(
    T: int,
    d: int,
    r: int,
    *,
    width: int = 2,
    factor: int = 4,
    splits: int = 1,
    parts: int = 1,
    blocks: int = 1,
    apart: bool = False,
) -> Traffic:
    """u = dy·Qᵀ and dQ: `splits` partial dQ, each summed in memory `blocks` times; `parts` of u.

    Where u and dQ are computed `apart`, dy is read twice and partial dQ are stored once.
    """
    h, dq = T * r * SUM, splits * r * d * SUM
    blocks = 1 if apart else blocks
    read = (1 + apart) * T * d * width + h + (d + 1) * r * factor + (blocks - 1) * dq
    return Traffic(read, parts * h + blocks * dq, 4 * T * d * r)


def gradients_x(
    T: int,
    d: int,
    r: int,
    *,
    width: int = 2,
    factor: int = 4,
    splits: int = 1,
    parts: int = 1,
    dx: bool = True,
    add: bool = False,
) -> Traffic:
    """dP, dΛ and the adapter's dx: `splits` partial dP and dΛ, from `parts` of u."""
    h, dp, x = T * r * SUM, splits * r * d * SUM, T * d * width
    read = x + (parts + 1) * h + (dx * d + 1) * r * factor + (dx and add) * x
    written = dp + splits * r * SUM + dx * x
    return Traffic(read, written, (2 + 2 * dx) * T * d * r)


def reduce(
    d_in: int, d_out: int, r: int, *, factor: int = 4, splits: int = 1, splits_q: int = 1
) -> Traffic:
    """dP and dΛ from `splits` partial sums, dQ from `splits_q`."""
    read = r * (splits * (d_in + 1) + splits_q * d_out) * SUM
    return Traffic(read, r * (d_in + d_out + 1) * factor)


def fused(
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    *,
    width: int = 2,
    factor: int = 4,
    columns: int = 128,
) -> Traffic:
    """y and h in one GEMM. Each tile of `columns` multiplies x with all of P again."""
    tiles = -(-d_out // columns)
    flops = 2 * T * r * (tiles * d_in + d_out)
    adapter = Traffic((d_in + d_out + 1) * r * factor, T * r * SUM, flops)
    return gemm(T, d_in, d_out, width=width) + adapter


def gram(d: int, r: int, *, splits: int = 1) -> Traffic:
    """What shrink and expand do beside where a layer gives its penalty: `splits` partial FFᵀ."""
    return Traffic(0, splits * r * r * SUM, 2 * r * r * d)


def finish(r: int, *, splits_p: int = 1, splits_q: int = 1) -> Traffic:
    """Residuals of P and Q and the penalty, from partial PᵀP and QQᵀ."""
    return Traffic((splits_p + splits_q) * r * r * SUM, (2 * r * r + 1) * SUM)


def penalty_residual(matrices: int, r: int, d: int, *, factor: int = 4) -> Traffic:
    """R = FFᵀ − I and its norm, of matrices of one width."""
    read = matrices * r * d * factor
    return Traffic(read, matrices * (r * r + 1) * SUM, 2 * matrices * r * r * d)


def penalty_sum(matrices: int) -> Traffic:
    """The penalty from the norms of all matrices."""
    return Traffic(matrices * SUM, SUM)


def penalty_gradient(matrices: int, r: int, d: int, *, factor: int = 4) -> Traffic:
    """dF ~ RF of matrices of one width."""
    f = matrices * r * d * factor
    return Traffic(f + matrices * r * r * SUM, f, 2 * matrices * r * r * d)


def spectral_gram(matrices: int, r: int, d: int, *, factor: int = 4) -> Traffic:
    """PPᵀ, vPᵀ and vvᵀ in float64 and two sums, of matrices of one width."""
    return Traffic(3 * matrices * r * d * factor, matrices * (3 * r * r + 2) * 8)


def spectral_solve(layers: int, r: int, *, factor: int = 4) -> Traffic:
    """Λ, the candidates and the transforms in float64, from Gram matrices and sums of P and Q."""
    square = 2 * 3 * r * r * 8
    read = square + (2 * 2 + 3) * 8 + r * factor
    return Traffic(layers * read, layers * (square + 3 * r * factor))


def spectral_write(matrices: int, r: int, d: int, *, factor: int = 4) -> Traffic:
    """P⁺ and m⁺ from P, m and L, of matrices of one width."""
    f = matrices * r * d * factor
    return Traffic(3 * f + matrices * 3 * r * r * 8, 2 * f)
