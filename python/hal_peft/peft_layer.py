"""`HyperAdaLoraLinear`: PEFT's wrapper around a linear layer, on hal_kernels' operators."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle

from hal_kernels.nn.adapter import HyperAdapter
from hal_kernels.nn.linear import LayerSlot, is_conv1d, is_foreign, linear_widths
from hal_kernels.nn.packed import LayerFactors
from hal_kernels.ops.svd_linear import layer_output

from .quantized import dequantize, is_quantized, requantize, restore

Arguments = tuple[LayerFactors, dict[str, Any]]


class AdapterUsers:
    """The layers of one adapter: they decide if it takes part in passes, and how long it lives.

    PEFT activates, disables, merges and deletes adapters layer by layer, not always through the
    tuner.
    """

    def __init__(self, owner: nn.ModuleDict, name: str, handles: Iterable[RemovableHandle]) -> None:
        self.owner, self.name, self.handles = owner, name, list(handles)
        self._members: set[int] = set()
        self._working: set[int] = set()

    def settle(self, slot: "PeftSlot", works: bool) -> None:
        """A layer says whether its output has this adapter's part now."""
        self._members.add(slot.index)
        (self._working.add if works else self._working.discard)(slot.index)
        slot.adapter.disabled = not self._working

    def leave(self, slot: "PeftSlot") -> None:
        """A layer gives the adapter up; with the last one it is gone."""
        self.settle(slot, works=False)
        self._members.remove(slot.index)
        if not self._members:
            for handle in self.handles:
                handle.remove()
            del self.owner[self.name]


@dataclasses.dataclass(frozen=True)
class PeftSlot(LayerSlot):
    """A layer's place in an adapter that other layers share."""

    users: AdapterUsers = dataclasses.field(kw_only=True)


class HyperAdaLoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D, quantized) with any number of adapters.

    It holds no parameters of its own: an adapter's are in one `HyperAdapter` for all layers, which
    the tuner owns, and this layer knows its place in each.

    Args:
        base_layer: what `hal_kernels.nn.linear.adapted_class` accepts.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``, in the base layer's output dtype.
    """

    adapter_layer_names = ("hal_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.training = base_layer, base_layer.training
        self.in_features, self.out_features = linear_widths(base_layer)
        self.fan_in_fan_out, self._foreign = is_conv1d(base_layer), is_foreign(base_layer)
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._slots: dict[str, PeftSlot] = {}
        self._unmerged_weight: torch.Tensor | None = None  # on the CPU

    @property
    def hal_adapters(self) -> nn.ModuleDict:
        """This layer's adapters by name. Made anew each time: the tuner is their one owner."""
        return nn.ModuleDict({name: slot.adapter for name, slot in self._slots.items()})

    # -- adapters --------------------------------------------------------------------------------

    def add_slot(self, name: str, slot: PeftSlot) -> None:
        """Give this layer its place in the adapter of this name."""
        self._slots[name] = slot
        self._settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._settle()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:  # as PEFT's layers do at their next forward
            self.unmerge()
        super().enable_adapters(enabled)
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        self._leave(adapter_name)
        super().delete_adapter(adapter_name)

    def leave_adapters(self) -> None:
        """Give up this layer's place in all its adapters, once it is no part of a model."""
        for name in list(self._slots):
            self._leave(name)

    def _leave(self, name: str) -> None:
        slot = self._slots.pop(name, None)
        if slot is not None:
            slot.users.leave(slot)

    def _settle(self) -> None:
        working = self._working_slots()
        for slot in self._slots.values():
            slot.users.settle(slot, works=slot in working)

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        slots = self._working_slots()
        for slot in slots:
            slot.adapter.note_call(slot.index)
        found = [a for a in (slot.arguments(self.training) for slot in slots) if a is not None]
        if not found:
            return self.base_layer(x, *args, **kwargs)
        if self._is_plain():
            y, found = self._fused(x, slots, found), found[1:]
        else:
            y = self.base_layer(x, *args, **kwargs)
        for factors, options in found:
            y = layer_output(x, None, y, *_beside(x, factors), **options)
        return y

    def _fused(
        self, x: torch.Tensor, slots: list[PeftSlot], found: list[Arguments]
    ) -> torch.Tensor:
        """Base layer and first adapter in one operator, with its siblings' where they may."""
        factors, options = found[0]
        shared = slots[0].shared_input
        if len(found) == 1 and shared is not None and slots[0].adapter.in_pass:
            y = shared.output(self, x, factors, **options)
            if y is not None:
                return y
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return layer_output(x, weight, self.bias, *_beside(x, factors), **options)

    def adapter_arguments(self) -> Arguments | None:
        """What the operators need for this layer's one adapter; None where it is not so simple."""
        slots = self._working_slots()
        if len(slots) != 1 or not self._is_plain():
            return None
        return slots[0].arguments(self.training)

    def _working_slots(self) -> list[PeftSlot]:
        if self.disable_adapters or self.merged:
            return []
        return [self._slots[name] for name in self.active_adapters if name in self._slots]

    def _is_plain(self) -> bool:
        """Whether the base layer is nothing but its GEMM: no quantization, no hooks of others."""
        base = self.base_layer
        if self._foreign or not (self.fan_in_fan_out or type(base) is nn.Linear):
            return False
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        return not hooked and not base._backward_pre_hooks and "forward" not in base.__dict__

    # -- merge -----------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter, in the layout of the base weight and the factors' dtype."""
        slot = self._slots[adapter]
        p, lam, q = slot.adapter.present_factors(slot.index)
        lam = lam * ~slot.adapter.never_called[slot.index]
        delta = (q.t() * (slot.adapter.scalings[slot.index] * lam)) @ p
        return delta.t() if self.fan_in_fan_out else delta

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Which of the named adapters (None: the active ones) this layer has yet to merge."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self._slots and n not in self.merged_adapters]

    def mergeable_weight(self) -> torch.Tensor:
        """The base layer's weight.

        Raises:
            ValueError: it is quantized in a way that `quantized` does not know, or computed anew in
                each forward, and can't take ΔW.
        """
        base = self.get_base_layer()
        if (is_foreign(base) and not is_quantized(base)) or "weight" not in base._parameters:
            raise ValueError(
                f"merge: the weight of a {type(base).__name__} can't take ΔW; export_lora writes "
                "the adapter as LoRA instead"
            )
        assert isinstance(base.weight, torch.Tensor)
        return base.weight

    def merged_weight(self, adapter_names: list[str], *, safe: bool) -> torch.Tensor:
        """The base weight, as floats if it is quantized, with these adapters' ΔW added.

        Raises:
            ValueError: the base weight can't take it, or (if `safe`) it would hold NaN or Inf.
        """
        base, layer = self.mergeable_weight().data, self.get_base_layer()
        weight = base = dequantize(layer) if is_quantized(layer) else base
        for name in adapter_names:
            delta = self.get_delta_weight(name).to(base.device)
            weight = (weight.to(delta.dtype) + delta).to(base.dtype)
            if safe and not weight.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of adapters to the base weight; a copy on the CPU lets `unmerge` be exact.

        A quantized weight is quantized anew, as it was.

        Args:
            safe_merge: raise ValueError, changing nothing, if the weight would hold NaN or Inf.
            adapter_names: which ones; None means the active ones.
        """
        names = self.to_merge(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        weight = self.merged_weight(names, safe=safe_merge)
        layer: Any = self.get_base_layer()
        if is_quantized(layer):
            old = requantize(layer, weight)
        else:
            old = layer.weight.data.to("cpu", copy=True)
            layer.weight.data.copy_(weight)
        if self._unmerged_weight is None:
            self._unmerged_weight = old
        self.merged_adapters += names
        self._settle()

    def unmerge(self) -> None:
        """Give the base layer back the weight it had, bit for bit."""
        layer: Any = self.get_base_layer()
        weight = self._unmerged_weight
        if weight is not None and is_quantized(layer):
            restore(layer, weight)
        elif weight is not None:
            layer.weight.data.copy_(weight)
        self._unmerged_weight, self.merged_adapters = None, []
        self._settle()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # -- device ----------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's call after loading onto the meta device. The adapter keeps its own dtype."""
        adapter = self._slots[adapter_name].adapter if adapter_name in self._slots else None
        target = device or self.weight.device
        if adapter is not None and not holds_meta(adapter) and target.type != "meta":
            adapter.to(target)

    def extra_repr(self) -> str:
        ranks = {n: s.adapter.layout.ranks[s.index] for n, s in self._slots.items()}
        return ", ".join(f"{name}: rank={rank}" for name, rank in ranks.items())


def holds_meta(adapter: HyperAdapter) -> bool:
    """Whether the adapter has parameters whose values are still to be loaded."""
    return any(parameter.is_meta for parameter in adapter.parameters())


def _beside(x: torch.Tensor, factors: LayerFactors) -> LayerFactors:
    """The factors on x's device: a model spread over several has its adapter on one."""
    p, lam, q = factors
    if p.device == x.device:
        return factors
    return p.to(x.device), lam.to(x.device), q.to(x.device)
