"""What a training step takes at least, by prediction: its launches, or its matrix products.

Launches are those that bench.launches counted, taken to the model's depth (what a step adds with
each block is the same), at the GPU's time for one. Products are those of the adapted layers (the
outputs, and the gradients of the inputs), at its matrix rate. The longer of the two bounds a step;
attention, norms, heads and the optimizer come on top.
"""

import functools
import re
from collections.abc import Iterable

import torch
from torch import nn

from hal_kernels.kernels.configs import architecture_of
from tools.traffic import gemm

from .models import DECODER, Base
from .operators import rates
from .rows import rows as rows_of
from .training_step import this_device

TOTAL = "step, optimizer not counted"


@functools.cache
def adapted(base: Base) -> tuple[int, list[tuple[int, int]]]:
    """The number of blocks, and d_in and d_out of every adapted layer."""
    model = base.build(torch.device("meta"))
    widths = [
        (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(base.targets, name)
    ]
    blocks: int = base.config().num_hidden_layers
    return blocks, widths


def launches(base: Base, blocks: int) -> dict[str, float]:
    """Launches of a step by method, from the newest count of a model of that kind."""
    kind = {"roberta-base": "roberta"}.get(base.name, "llama" if base.targets == DECODER else "")
    counts = rows_of("launches", model=kind)
    if not counts:
        return {}
    (few, at_few), *_, (many, at_many) = counts[-1]["parts"].items()
    found = {}
    for method in at_many:
        fewer, more = (at[method][TOTAL] for at in (at_few, at_many))
        found[method] = fewer + (blocks - int(few)) * (more - fewer) / (int(many) - int(few))
    return found


def least_ms(base: Base, methods: Iterable[str], batch: int, length: int) -> dict[str, float]:
    """The predicted time of a step, by method; without a GPU, of its products alone."""
    device = this_device()
    blocks, widths = adapted(base)
    flops = sum(gemm(batch * length, *sides).flops for sides in widths)
    product_us = flops / rates(device, base.dtype)[1]
    launch_us = architecture_of(device).launch_us if device.type == "cuda" else 0.0
    counted = launches(base, blocks)
    found = {}
    for method in methods:
        passes = 1 if method == "frozen" else 2 + base.checkpointing  # y, dx, and y once more
        found[method] = max(counted.get(method, 0.0) * launch_us, passes * product_us) / 1e3
    return found
