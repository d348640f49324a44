"""A pretrained encoder at another width that computes what it did: one task at every width.

Every hidden unit is there several times (Net2Net's function-preserving transform, Chen et al.,
arXiv:1511.05641): a linear layer's weight is repeated over both sides, and what reads a unit's
copies is divided by their number, so each copy of an output is the old output; heads multiply while
each keeps its width. LayerNorm's statistics are those of the old units where all have as many
copies, and near them where the new width is no multiple of the old one.
"""

from typing import Any

import torch
from torch import nn


def widened(model: Any, hidden_size: int) -> Any:
    """A BERT classifier whose hidden layers are wider, the outputs unchanged.

    Args:
        model: of transformers, BERT's architecture. Left as it is.
        hidden_size: the new width, at least the old one. Where it is no multiple of that, the
            outputs are near the old ones (LayerNorm sees units of unequal numbers of copies).

    Raises:
        ValueError: `hidden_size` is below the old one, or heads or intermediate units would not be
            whole numbers.
    """
    old_size = model.config.hidden_size
    if hidden_size == old_size:
        return model
    config = type(model.config).from_dict(model.config.to_dict())
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        size, rest = divmod(getattr(config, name) * hidden_size, old_size)
        if rest or hidden_size < old_size:
            raise ValueError(
                f"hidden_size is {hidden_size}; it must be at least the model's {old_size}, and "
                f"{name} ({getattr(config, name)}) times their ratio a whole number"
            )
        setattr(config, name, size)
    wide = type(model)(config).to(model.dtype)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            source = old[name]
            copied = [
                torch.arange(new) % was
                for new, was in zip(parameter.shape, source.shape, strict=True)
            ]
            for dim, units in enumerate(copied):
                source = source.index_select(dim, units)
            module = wide.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.Linear) and name.endswith("weight"):
                source = source / torch.bincount(copied[1])[copied[1]]
            parameter.copy_(source)
    return wide.train(model.training)
