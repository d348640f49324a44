"""Weights that bitsandbytes and torchao hold quantized: read as floats, and quantized anew.

Types are known by name, since neither library needs to be there.
"""

import copy
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn


def is_quantized(layer: Any) -> bool:
    """Whether `requantize` knows the layer's weight."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        return weight.dtype == torch.int8
    if kind == "Params4bit":
        return weight.quant_state is not None
    return kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def dequantize(layer: Any) -> torch.Tensor:
    """The weight ``[d_out, d_in]`` as floats, of a layer that `is_quantized`; changes nothing."""
    weight: Any = layer.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # What bitsandbytes' forward on a CPU with AVX512-BF16 packs in place, state_dict unpacks.
        layer = copy.deepcopy(layer)
        layer.state_dict()
    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))


def requantize(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Give a layer that `is_quantized` another weight, quantized as its own is.

    Args:
        weight: floats ``[d_out, d_in]``, on the layer's device.

    Returns:
        The weight it had, on the CPU, for `restore`.
    """
    old: Any = layer.weight
    kind: Any = type(old)
    if kind.__name__ == "Int8Params":
        old.SCB = layer.state.SCB if old.SCB is None else old.SCB
        new = kind(weight.cpu(), requires_grad=False)  # quantized on its way from the CPU
    elif kind.__name__ == "Params4bit":
        names = "blocksize", "compress_statistics", "quant_type", "quant_storage"
        new = kind(weight, requires_grad=False, **{name: getattr(old, name) for name in names})
    else:
        new = _torchao_weight(old, weight)
    new, kept = new.to(old.device), old.to("cpu")
    restore(layer, new)
    return kept


def restore(layer: Any, weight: torch.Tensor) -> None:
    """Put a quantized weight in the place of the layer's: what `requantize` returned, say."""
    device = layer.weight.device
    moved: Any = weight.to(device)
    layer.weight = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, False)
    if type(moved).__name__ == "Int8Params":
        layer.state.reset_grads()
    elif type(moved).__name__ == "Params4bit":
        layer.quant_state = moved.quant_state


def _torchao_weight(old: Any, weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import MappingType, PerBlock

    if type(old).__name__ == "Int8Tensor":
        names = "act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"
        carried = {name: getattr(old, name) for name in (*names, "reduce_range")}
        return type(old).from_hp(weight, PerBlock(tuple(old.block_size)), **carried)
    symmetric = not old.zero_point.any()
    return type(old).from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        activation_quantization=old.activation_quantization,
    )
