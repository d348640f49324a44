"""What data-parallel processes send each other: counted in a run, and computed for large models.

    python -m bench.communication

prints a table of bytes per process and optimizer step beyond the frozen model, for adapters on
every linear layer of a 70B Llama's blocks. An all-reduce of B bytes over N processes sends
2·B·(N − 1)/N bytes from each (ring algorithm).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hal_kernels.nn.hypernet import Hypernetwork

RANKS = (3, 16)  # adapters start at ⌈1.5 · rank⌉
INTERVAL = 100  # ΔT
BYTES = 4  # float32 gradients
LINK = 50e9  # bytes a second of one 400 Gb/s link a GPU
GPUS = (8, 64, 256, 1024)


class Shape(NamedTuple):
    """Linear layers of one kind: how many there are, and their widths."""

    count: int
    d_in: int
    d_out: int


# Llama-3.1-70B's config: hidden 8192, 80 blocks, 8 of 64 heads for keys and values, FFN 28672.
LLAMA_70B = (
    Shape(160, 8192, 8192),  # q, o
    Shape(160, 8192, 1024),  # k, v
    Shape(160, 8192, 28672),  # gate, up
    Shape(80, 28672, 8192),  # down
)


class Counter(TorchDispatchMode):
    """Counts the bytes of tensors given to collectives inside the block, by operation.

    `bytes` are those of the tensors themselves; what travels depends on the algorithm (`sent`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        space, name, *_ = str(func).split(".")
        if space == "c10d":
            self.bytes[name] = self.bytes.get(name, 0) + _size(args[0])
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def sent(size: float, gpus: int) -> float:
    """Bytes that each process sends in an all-reduce of `size` bytes (ring)."""
    return 2 * size * (gpus - 1) / gpus


def hypernetwork_parameters(shapes: Sequence[Shape], init_rank: int) -> int:
    """|Φ|: it depends on the distinct widths, and by Λ's embedding on R."""
    with torch.device("meta"):
        made = Hypernetwork(
            "bert",
            sorted({shape.d_in for shape in shapes}),
            sorted({shape.d_out for shape in shapes}),
            directions(shapes, init_rank),
            zero_output=False,
        )
    return sum(p.numel() for p in made.parameters())


def directions(shapes: Sequence[Shape], rank: int) -> int:
    """R = G · rank."""
    return rank * sum(shape.count for shape in shapes)


def factor_parameters(shapes: Sequence[Shape], rank: int) -> int:
    """P and Q of all layers: what LoRA of that rank trains, and AdaLoRA beside its Λ."""
    return rank * sum(shape.count * (shape.d_in + shape.d_out) for shape in shapes)


def rows() -> list[dict[str, Any]]:
    """One row a method: parameters, and bytes a step by number of GPUs."""
    found: list[dict[str, Any]] = []

    def add(method: str, parameters: int, directions: int) -> None:
        # R scores, every ΔT steps; one number that says whether a step counts, every step.
        size = BYTES * (parameters + directions / INTERVAL + 1)
        found.append({"method": method, "parameters": parameters, "bytes": size})

    for rank in RANKS:
        init_rank = math.ceil(1.5 * rank)
        r = directions(LLAMA_70B, init_rank)
        add(f"spectral steps, rank {rank}", factor_parameters(LLAMA_70B, init_rank), r)
        add(f"hypernetworks, rank {rank}", hypernetwork_parameters(LLAMA_70B, init_rank), r)
        add(f"AdaLoRA, rank {rank}", factor_parameters(LLAMA_70B, init_rank) + r, r)
        add(f"LoRA, rank {rank}", factor_parameters(LLAMA_70B, rank), 0)
    return found


def table() -> str:
    """Markdown."""
    head = [f"MB sent, {n} GPUs" for n in GPUS]
    lines = [
        "| method | trained parameters | " + " | ".join(head) + f" | ms at {LINK / 1e9:g} GB/s |",
        "| --- " * (len(GPUS) + 3) + "|",
    ]
    for row in rows():
        sizes = [sent(row["bytes"], n) for n in GPUS]
        cells = [f"{size / 1e6:.0f}" for size in sizes]
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {' | '.join(cells)} "
            f"| {1e3 * sizes[-1] / LINK:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
