"""A pretrained encoder at another width that computes what it did: one task at every width.

Every hidden unit is there `factor` times (Net2Net's function-preserving transform, Chen et al.,
arXiv:1511.05641): a linear layer's weight is tiled over both sides and divided by the number of
copies it sums over, so each copy of an output is the old output; LayerNorm's statistics are those
of the copies, and heads multiply while each keeps its width.
"""

from typing import Any

import torch
from torch import nn


def widened(model: Any, factor: int) -> Any:
    """A BERT classifier whose hidden layers are `factor` times as wide, the outputs unchanged.

    Args:
        model: of transformers, BERT's architecture. Left as it is.
        factor: how many copies of each unit, at least 1.
    """
    if factor == 1:
        return model
    config = type(model.config).from_dict(model.config.to_dict())
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        setattr(config, name, factor * getattr(config, name))
    wide = type(model)(config).to(model.dtype)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            repeats = [
                new // was for new, was in zip(parameter.shape, old[name].shape, strict=True)
            ]
            parameter.copy_(old[name].repeat(repeats))
            module = wide.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.Linear) and name.endswith("weight"):
                parameter.div_(repeats[1])
    return wide.train(model.training)
