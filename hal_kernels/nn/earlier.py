"""Checkpoints of earlier versions: what adapters had then, in terms of what they have now.

Hypernetworks with update="anchor" had trainable offsets beside what they generate, and the first
optimizer steps of a run collected sketches of the weights' gradients to choose directions by.
"""

from collections.abc import Mapping

import torch

OPTIONS = ("init", "offsets")
"""Options of a configuration that say nothing any more."""


def without_offsets(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state in which the anchors have taken up the offsets: the same factors are generated.

    Args:
        state: tensors by name, packed ("anchor_p_64") or by layer ("….hal_anchor_p").
    """
    named = {key: key.rpartition(".")[2].removeprefix("hal_") for key in state}
    offsets = [key for key, name in named.items() if name.startswith("offset_")]
    # Λ's alone were learned faster than all factors' together.
    scale = 100.0 if all(named[key] == "offset_lam" for key in offsets) else 30.0
    result = {key: tensor for key, tensor in state.items() if key not in offsets}
    for key in offsets:
        anchor = key[: -len(named[key])] + named[key].replace("offset_", "anchor_", 1)
        if anchor not in state or state[anchor].shape != state[key].shape:
            raise ValueError(f"the checkpoint holds {key!r} without a fitting {anchor!r}")
        result[anchor] = state[anchor] + scale * state[key]
    return result


def without_sketches(state: torch.Tensor) -> torch.Tensor:
    """The step counter of an extra state, which sketches (float64) may follow."""
    sketches = state.dtype == torch.float64 and state.dim() == 1 and state.numel() > 1
    return state[:1].long() if sketches and state[0].isfinite() else state
