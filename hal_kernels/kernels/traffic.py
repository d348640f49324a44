"""What each kernel must at least move and multiply: bytes and flops as functions of the shapes.

T rows, widths d_in and d_out, rank r (not padded), `width` bytes an element of x, y, W, dy, dx and
`factor` bytes an element of P, Λ, Q. h, u and partial sums are float32. Reads are counted once an
element and kernel: what a second program reads again comes from the cache. Numbers of 8 bytes that
say where a matrix begins, and the keys of attention, are not counted. `Traffic.floor_us` is the
roofline: no kernel is faster than its bytes at the GPU's bandwidth, nor than its flops at its
matrix rate.
"""

import dataclasses
import functools

from .configs import Architecture, Tile
from .launch import padded

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


@dataclasses.dataclass(frozen=True)
class Hypernet:
    """Sizes of the hypernetwork layer: S sets of G matrices of r tokens, `width` bytes an element.

    Partial sums, of biases and affines, are one row of a block of rows, or of a block of matrices.
    """

    sets: int
    matrices: int
    rank: int
    hidden: int
    inner: int
    heads: int
    width: int = 4
    row_blocks: int = 1  # of kernels on whole rows
    column_blocks: int = 1  # blocks of rows of kernels on inner columns
    matrix_blocks: int = 1  # blocks of matrices, of attention
    norm_first: bool = False

    @property
    def tokens(self) -> int:
        """Of all sets."""
        return self.sets * self.matrices * self.rank

    def _traffic(self, read: int, written: int, flops: int, sums: int = 0) -> Traffic:
        """From numbers of elements; `sums` of them are float32."""
        return Traffic(read * self.width, written * self.width + sums * SUM, flops)

    def attention(self) -> Traffic:
        """qkv, attention weights and context. q, k and v are read back from memory."""
        t, H = self.tokens, self.hidden
        weights = self.sets * (3 * H * (H + 1) + 2 * H * self.norm_first)
        read, written = t * H + weights + 3 * t * H, 3 * t * H + t * self.heads * self.rank + t * H
        return self._traffic(read, written, 6 * t * H * H + 4 * t * self.rank * H)

    def linear_norm(self, columns: int, norm: bool = True) -> Traffic:
        """z = residual + xWᵀ + b, from x of so many columns, and LN(z)."""
        t, H = self.tokens, self.hidden
        read = t * (columns + H) + self.sets * H * (columns + 1 + 2 * norm)
        return self._traffic(read, (1 + norm) * t * H, 2 * t * columns * H)

    def linear_gelu(self) -> Traffic:
        """f = xWᵀ + b and GELU(f)."""
        t, H, D = self.tokens, self.hidden, self.inner
        return self._traffic(t * H + self.sets * D * (H + 1), 2 * t * D, 2 * t * H * D)

    def norm_backward(self, columns: int, out: bool) -> Traffic:
        """dz from dLN(z), with a product of dx of so many columns in it; and LN(z) if `out`."""
        t, H = self.tokens, self.hidden
        read = t * (columns + 2 * H) + self.sets * H * (columns + 1 + out)
        sums = self.sets * self.row_blocks * (3 + self.norm_first) * H
        return self._traffic(read, (1 + out) * t * H, 2 * t * columns * H, sums)

    def gelu_backward(self) -> Traffic:
        """df = dz·W ⊙ GELU′(f) and GELU(f)."""
        t, H, D = self.tokens, self.hidden, self.inner
        read = t * H + self.sets * H * D + t * D
        return self._traffic(read, 2 * t * D, 2 * t * H * D, self.sets * self.column_blocks * D)

    def attention_backward(self) -> Traffic:
        """dqkv from dz. dc is read back from memory."""
        t, H = self.tokens, self.hidden
        read = t * H + self.sets * H * H + 3 * t * H + t * self.heads * self.rank + 2 * t * H
        flops = 2 * t * H * H + 8 * t * self.rank * H
        return self._traffic(read, 3 * t * H, flops, self.sets * self.matrix_blocks * 3 * H)

    def reduce(self) -> Traffic:
        """Gradients of biases and affines."""
        H, D = self.hidden, self.inner
        rows = 6 * self.row_blocks * H + self.column_blocks * D + 3 * self.matrix_blocks * H
        return Traffic(self.sets * rows * SUM, self.sets * (9 * H + D) * self.width)

    def gemms(self) -> Traffic:
        """The vendor's: gradients of the weights and, unless `norm_first`, of the tokens."""
        t, H, D = self.tokens, self.hidden, self.inner
        pairs = [(H, D), (D, H), (H, H), (3 * H, H)]  # the sides of dW = dyᵀx
        weights = self._traffic(
            sum(t * (n + k) for n, k in pairs),
            sum(self.sets * n * k for n, k in pairs),
            sum(2 * t * n * k for n, k in pairs),
        )
        tokens = self._traffic(t * 4 * H + self.sets * 3 * H * H, t * H, 6 * t * H * H)
        return weights if self.norm_first else weights + tokens

    def norms_forward(self) -> tuple[Traffic, Traffic]:
        """The two kernels on whole rows."""
        last = self.linear_norm(self.inner, norm=not self.norm_first)
        return self.linear_norm(self.hidden), last

    def norms_backward(self) -> tuple[Traffic, Traffic]:
        """The same, as they follow each other."""
        inner = self.norm_backward(self.inner, out=not self.norm_first)
        if self.norm_first:
            return inner, self.norm_backward(3 * self.hidden, out=True)
        return self.norm_backward(0, out=False), inner

    def forward(self) -> Traffic:
        """All four kernels."""
        first, last = self.norms_forward()
        return self.attention() + first + self.linear_gelu() + last

    def backward(self) -> Traffic:
        """All five kernels, and the vendor's."""
        first, last = self.norms_backward()
        own = first + last + self.gelu_backward() + self.attention_backward() + self.reduce()
        return own + self.gemms()


@dataclasses.dataclass(frozen=True)
class Maps:
    """Sizes of the maps between packed factors and padded tokens, `width` bytes an element.

    `factors` are (rows, width) of each P and each Q; Λ has R `directions`. Only slots that hold a
    row are read, all `slots` (3·G·r) of a result are written.
    """

    factors: tuple[tuple[int, int], ...]
    directions: int
    slots: int
    hidden: int
    width: int = 4

    @property
    def _elements(self) -> int:
        """Of all factors."""
        return sum(n * d for n, d in self.factors) + self.directions

    def _traffic(self, read: int, written: int) -> Traffic:
        """From numbers of elements; one product of all factors with H columns."""
        flops = 2 * self.hidden * self._elements
        return Traffic(read * self.width, written * self.width, flops)

    @property
    def _tokens(self) -> int:
        """Elements of the tokens that hold a row."""
        return (sum(n for n, _ in self.factors) + self.directions) * self.hidden

    @property
    def _weights(self) -> int:
        """Elements of all weights, Λ's too."""
        return (sum(d for _, d in self.factors) + 1) * self.hidden

    def tokens(self) -> Traffic:
        """t = xWᵀ + b, for Λ with an embedding, and which directions the mask keeps."""
        biases, own = (len(self.factors) + 1) * self.hidden, self.directions * (self.hidden + 1)
        read = self._elements + self._weights + biases + own
        return self._traffic(read, self.slots * self.hidden)

    def tokens_backward(self) -> Traffic:
        """Gradients of weights, biases and the embedding."""
        biases, own = (len(self.factors) + 1) * self.hidden, self.directions * self.hidden
        return self._traffic(self._tokens + self._elements, self._weights + biases + own)

    def factors_of(self, base: bool = True) -> Traffic:
        """factor = base + tWᵀ + b."""
        biases = sum(d for _, d in self.factors) + 1
        read = self._tokens + self._weights + biases + base * self._elements
        return self._traffic(read, self._elements)

    def token_gradient(self) -> Traffic:
        """dt = dy·W."""
        return self._traffic(self._elements + self._weights, self.slots * self.hidden)

    def weight_gradient(self) -> Traffic:
        """Gradients of weights and biases."""
        biases = sum(d for _, d in self.factors) + 1
        return self._traffic(self._elements + self._tokens, self._weights + biases)


def importance(elements: int, *, state: int = 4, factor: int = 4) -> Traffic:
    """The moving averages of importance and uncertainty, of `state` bytes an element."""
    return Traffic(elements * 2 * (state + factor), elements * 2 * state)


def importance_scores(elements: int, directions: int, *, state: int = 4) -> Traffic:
    """A score per direction, from both averages of all P, Λ and Q, and the mask."""
    return Traffic((2 * elements + directions) * state, directions * state)


def prune(directions: int, *, width: int = 4) -> Traffic:
    """The mask of the global k smallest scores; comparing them is no matrix work."""
    return Traffic(directions * width, directions * width)


def fused_us(
    gpu: Architecture, tile: Tile, T: int, d_in: int, d_out: int, r: int, width: int = 2
) -> float:
    """Estimated time of the fused GEMM in tiles of `tile`.

    The longest of: the flops of whole tiles, xP once a tile included, on the multiprocessors that
    have a tile; the tiles' operands from the cache; the bytes from memory, which half of the
    multiprocessors saturate. A Triton GEMM takes `gpu.gemm_slowdown` times that.
    """
    columns, rate = tile.columns * 2 // width, gpu.matrix_rate * (1.0 if width == 2 else 0.125)
    tiles = -(-T // tile.rows) * -(-d_out // columns)
    busy = min(1.0, tiles / gpu.multiprocessors)
    flops = tiles * 2 * tile.rows * d_in * (columns + padded(r))
    operands = tiles * (tile.rows + columns) * d_in * width
    moved = fused(T, d_in, d_out, r, width=width, columns=columns).moved
    return gpu.gemm_slowdown * max(
        flops / (rate * busy),
        operands / (gpu.cache_bandwidth * busy),
        moved / (gpu.bandwidth * min(1.0, 2 * busy)),
    )


@functools.lru_cache(maxsize=4096)
def fused_tile(
    gpu: Architecture,
    tiles: tuple[Tile, ...],
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    width: int = 2,
    always: bool = False,
) -> Tile | None:
    """The one of `tiles` with which a fused launch costs the least; None where it does not pay.

    Apart cost: the vendor's GEMM, the bytes of shrink and expand, and two more launches. So the
    fused kernel serves small T, where launches count, and narrow outputs, where few tiles multiply
    x with P again: without launches and slowdown that is d_out < columns · width · matrix_rate /
    (2 · bandwidth · R), about 1500 for 128 columns and r = 16 on an H200.
    """
    times = [fused_us(gpu, tile, T, d_in, d_out, r, width) for tile in tiles]
    best = min(times)
    rate = gpu.matrix_rate * (1.0 if width == 2 else 0.125)
    base = gemm(T, d_in, d_out, width=width).floor_us(gpu.bandwidth, rate)
    adapter = shrink(T, d_in, r, width=width) + expand(T, d_out, r, width=width)
    apart = base + adapter.floor_us(gpu.bandwidth, rate) + 2 * gpu.launch_us
    return tiles[times.index(best)] if always or best < apart else None
