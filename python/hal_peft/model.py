"""`HyperAdaLoraModel`: the tuner that `peft.get_peft_model` makes of a `HyperAdaLoraConfig`."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, _find_minimal_target_modules
from peft.utils import (
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    ModulesToSaveWrapper,
)
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.other import get_pattern_key
from torch import nn

from hal_kernels import Factors, HALConfig, HALLinear
from hal_kernels.integration import (
    HyperAdapter,
    SharedInput,
    adapted_class,
    adapter_factors,
    adapter_rank_pattern,
    compact_adapter,
    find_groups,
    hook_forward,
    layers_of,
    linear_widths,
    new_adapter,
    write_lora,
)

from .config import HyperAdaLoraConfig, in_peft_names
from .layer import AdapterUsers, HyperAdaLoraLinear, PeftSlot
from .names import expect_free_name, is_named, is_saved, unwrapped_name, with_task_heads
from .quantized import is_quantized
from .state import LAYERS, REST, State, by_layer, expect_others, packed, resize


@dataclasses.dataclass
class _Pending:
    """An adapter to be made once PEFT has found its layers."""

    name: str
    config: HyperAdaLoraConfig
    asked_for: Any  # target_modules as given: PEFT expands "all-linear"
    low_cpu_mem_usage: bool
    targets: dict[str, nn.Module] = dataclasses.field(default_factory=dict)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.asked_for, str) and self.asked_for.lower() == "all-linear"


class HyperAdaLoraModel(BaseTuner):
    """A model with HyperAdaLoRA adapters.

    Training needs no call beside the loop's own: see `hal_kernels.patch_model`. Each adapter is one
    `HyperAdapter` for all its layers, in ``hal_adapters``; the layers are `HyperAdaLoraLinear`.
    """

    uses_shared_state = True
    prefix = "hal_"
    tuner_layer_cls = HyperAdaLoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    peft_config: Any  # dict[str, HyperAdaLoraConfig], of which PEFT's typing knows the base

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.hal_adapters = nn.ModuleDict()
        self._pending: _Pending | None = None

    # -- making an adapter -----------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: State | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        _warn_of_unmatched(model, config)
        config.modules_to_save = with_task_heads(model, config)
        trained = [p for p in self.hal_adapters.parameters() if p.requires_grad]
        self._pending = _Pending(adapter_name, config, config.target_modules, low_cpu_mem_usage)
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
        finally:
            # A further adapter changes nothing about those there are, and waits to be activated.
            self._pending = None
            trains = adapter_name in self.active_adapters and not config.inference_mode
            new = [self.hal_adapters[adapter_name]] if adapter_name in self.hal_adapters else []
            self.hal_adapters.requires_grad_(False)
            for parameter in [*trained, *(p for a in new for p in a.parameters() if trains)]:
                parameter.requires_grad_(True)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """PEFT's, without all that it is going to train in full: it asks for whole names here."""
        return not is_saved(peft_config, key) and BaseTuner._check_target_module_exists(
            peft_config, key
        )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Note a layer for `_add`: an adapter is made when all its layers are known."""
        base = _base(target)
        assert self._pending is not None
        if _never_called(base) and self._pending.all_linear:
            return
        if adapted_class(base) is None:
            raise TypeError(
                f"target_modules: {current_key!r} is a {type(base).__name__}, expected a linear "
                "layer (nn.Linear, Conv1D or a quantized linear)"
            )
        if nn.parameter.is_lazy(base.weight):
            raise ValueError(
                f"target_modules: {current_key!r} has an uninitialized weight; run a forward pass "
                "before adding an adapter"
            )
        self._pending.targets[current_key] = target

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT has found every layer, and changed nothing yet: now the adapter is made."""
        if self._pending is not None:
            self._add(self._pending)
        super()._mark_only_adapters_as_trainable(model)

    def _add(self, new: "_Pending") -> None:
        """Make an adapter for the layers that were found, and wrap those that are not yet.

        Raises:
            ValueError: a layer or the adapter's name does not allow it. Nothing was changed.
        """
        active = self.active_adapters
        if new.all_linear:
            self.targeted_module_names = [n for n in self.targeted_module_names if n in new.targets]
            new.config.target_modules = _shortened(new.targets, self.model)
        bases = {key: _base(target) for key, target in new.targets.items()}
        widths = {key: linear_widths(base) for key, base in bases.items()}
        device = next(iter(bases.values())).weight.device
        empty = init_empty_weights() if new.low_cpu_mem_usage else contextlib.nullcontext()
        with empty, in_peft_names():
            adapter = new_adapter(
                _without_unmatched(new.config.hal_config(), widths),
                widths,
                torch.device("cpu") if device.type == "meta" else device,
            )
        expect_free_name(
            self.model, {**self.hal_adapters, new.name: adapter}, self.peft_config, new.name
        )
        layers = {
            key: target if isinstance(target, HyperAdaLoraLinear) else HyperAdaLoraLinear(target)
            for key, target in new.targets.items()
        }
        _replace(self.model, {id(layer.base_layer): layer for layer in layers.values()})
        plain = [v for v in layers.values() if adapted_class(v.base_layer) is HALLinear]
        groups = [SharedInput(members) for members in find_groups(self.model, plain)]
        shared = {id(member): group for group in groups for member in group.layers}
        self.hal_adapters[new.name] = adapter
        handles = hook_forward(self.model, adapter, groups)
        users = AdapterUsers(self.hal_adapters, new.name, handles)
        for index, layer in enumerate(layers.values()):
            kind = type(layer.base_layer)
            slot = PeftSlot(adapter, index, kind, shared.get(id(layer)), users=users)
            layer.add_slot(new.name, slot)
            layer.set_adapter(active)

    # -- what PEFT's users call ------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Those of the layers, where `peft.functional` sets them; the tuner is not told of it."""
        layer = next((m for m in self.model.modules() if isinstance(m, HyperAdaLoraLinear)), None)
        return super().active_adapters if layer is None else list(layer.active_adapters)

    def update_and_allocate(self, global_step: int) -> None:
        """Nothing: AdaLoRA's callback, which scripts may keep. Steps are noticed without it."""

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._expect_mergeable(adapter_names, safe_merge, stacklevel=3)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override] # PEFT's annotation says None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = [m for m in self.model.modules() if isinstance(m, HyperAdaLoraLinear)]
        if merge:
            self._expect_mergeable(adapter_names, safe_merge, stacklevel=4)
        else:
            for layer in layers:
                layer.unmerge()
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.leave_adapters()
        return self.model

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        """PEFT's, for every place that the layer has in the model."""
        _replace(self.model, {id(child): new_module})

    def _expect_mergeable(
        self, adapter_names: list[str] | None, safe: bool, *, stacklevel: int
    ) -> None:
        """Raise ValueError, before anything changes, where a layer can't be merged.

        Warns, at this level of the stack, if one has a quantized weight.
        """
        owners: dict[int, set[str]] = {}
        quantized = False
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(parameter.data_ptr() or id(parameter), set()).add(name)
        for name, layer in self.model.named_modules():
            if isinstance(layer, HyperAdaLoraLinear) and layer.to_merge(adapter_names):
                weight = layer.mergeable_weight()
                others = owners[weight.data_ptr() or id(weight)] - {f"{name}.base_layer"}
                if others:
                    raise ValueError(
                        f"merge: the weight of {name!r} is shared with {sorted(others)}, which "
                        "would change with it; untie them first"
                    )
                if safe:
                    layer.merged_weight(layer.to_merge(adapter_names), safe=True)
                quantized = quantized or is_quantized(layer.get_base_layer())
        if quantized:
            warnings.warn(
                "hal_peft: merging into a quantized weight may get different generations due to "
                "rounding errors",
                stacklevel=stacklevel,
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is no mean of hypernetworks, nor of factors in SVD form.

        Raises:
            TypeError: always. `export_lora` writes adapters that LoRA's add_weighted_adapter takes.
        """
        raise TypeError(
            f"{type(self).__name__} does not support add_weighted_adapter; export_lora writes "
            "LoRA adapters, which PEFT can combine"
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: HyperAdaLoRA does not support a batch of several adapters; use "
                "set_adapter"
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Factors and hypernetworks have the config's dtype; with False, that of their layers."""
        layers = (m for m in self.model.modules() if isinstance(m, HyperAdaLoraLinear))
        dtype = next(m.weight.dtype for m in layers if adapter_name in m.hal_adapters)
        if autocast_adapter_dtype or not dtype.is_floating_point:
            return
        adapter = self._adapter(adapter_name)
        try:
            adapter.config = dataclasses.replace(adapter.config, dtype=dtype)
        except ValueError as error:
            warnings.warn(
                f"hal_peft: autocast_adapter_dtype is False, but adapters can't be {dtype} as the "
                f"layers are; this one keeps the dtype of its config ({error})",
                stacklevel=2,
            )
            return
        adapter.to(dtype)
        self.peft_config[adapter_name].dtype = str(dtype).removeprefix("torch.")

    # -- what HyperAdaLoRA adds ------------------------------------------------------------------

    def factors(self, adapter_name: str | None = None) -> dict[str, Factors]:
        """What `hal_kernels.factors` gives, of one adapter; None: of the active one."""
        return adapter_factors(self._intact(adapter_name))

    def rank_pattern(self, adapter_name: str | None = None) -> dict[str, int]:
        """How many singular directions each layer keeps. Waits for the device."""
        return adapter_rank_pattern(self._intact(adapter_name))

    def penalty(self, adapter_name: str | None = None) -> torch.Tensor:
        """γ · orthogonality penalty, for a loss that the model does not compute itself."""
        return self._adapter(adapter_name).penalty()

    def compact(self, adapter_name: str | None = None) -> None:
        """Drop pruned directions for good, as `hal_kernels.compact` does."""
        compact_adapter(self._intact(adapter_name))

    def export_lora(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Write an adapter as plain LoRA, which loads without this library.

        Raises:
            ValueError: no such adapter, or all its directions are pruned. OSError: can't write.
        """
        adapter = self._intact(adapter_name)
        name = adapter_name or self.active_adapters[0]
        config = self.peft_config[name]
        write_lora(
            path,
            adapter_factors(adapter),
            self.model,
            dropout=config.lora_dropout,
            fan_in_fan_out=self.transposed,
            saved_modules=self.saved_modules(name),
            base_model_name_or_path=config.base_model_name_or_path,
            task_type=config.task_type,
        )

    def saved_modules(self, adapter_name: str) -> dict[str, State]:
        """State dicts of the modules trained in full with an adapter, by name in the model."""
        return {
            key: module.modules_to_save[adapter_name].state_dict()
            for key, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        }

    @property
    def transposed(self) -> set[str]:
        """Names of the adapted layers that are Conv1D."""
        layers = self.model.named_modules()
        return {k for k, m in layers if isinstance(m, HyperAdaLoraLinear) and m.fan_in_fan_out}

    def _adapter(self, name: str | None) -> HyperAdapter:
        if name is None and len(self.active_adapters) != 1:
            raise ValueError(
                f"adapter_name is None, expected one of {sorted(self.hal_adapters)}: "
                f"{len(self.active_adapters)} adapters are active"
            )
        name = self.active_adapters[0] if name is None else name
        if name not in self.hal_adapters:
            raise ValueError(
                f"adapter_name is {name!r}, expected one of {sorted(self.hal_adapters)}"
            )
        adapter = self.hal_adapters[name]
        assert isinstance(adapter, HyperAdapter)
        return adapter

    def _intact(self, name: str | None) -> HyperAdapter:
        """`_adapter`, refused if the model's layers are no longer those that were adapted."""
        adapter = self._adapter(name)
        name = self.active_adapters[0] if name is None else name
        layers_of(self.model, adapter, lambda m: getattr(m, "_slots", {}).get(name))
        return adapter

    # -- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: State,
        unwanted_adapter_names: Sequence[str],
    ) -> State:
        where, tuner = _tuner(model)
        adapter = tuner._intact(adapter_name)
        given = {unwrapped_name(key): value for key, value in state_dict.items()}
        prefix = unwrapped_name(f"{where}hal_adapters.{adapter_name}.")
        own = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
        found = by_layer(adapter.layout, own)
        if not found:  # filtered already, as what scripts replace `state_dict` by
            found = {key: value for key, value in given.items() if _is_own(key)}
            if found and len(tuner.hal_adapters) > 1:
                raise ValueError(
                    "state_dict was filtered already and does not say of which adapter; pass the "
                    "whole model's"
                )
        lacking = sorted(by_layer(adapter.layout, adapter.state_dict()).keys() - found.keys())
        if lacking:
            raise ValueError(
                f"state_dict lacks {len(lacking)} tensors of adapter {adapter_name!r}, as "
                f"{lacking[0]!r}: it would not load; pass the whole model's state dict"
            )
        # PEFT takes the modules trained in full from the same dictionary, by their names here.
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                within = f"modules_to_save.{adapter_name}."
                here, there = name.removeprefix("_fsdp_wrapped_module."), unwrapped_name(name)
                for key in module.modules_to_save[adapter_name].state_dict():
                    value = given.get(f"{there}.{within}{key}", given.get(f"{there}.{key}"))
                    if value is not None:
                        state_dict.setdefault(f"{here}.{within}{key}", value)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return unwrapped_name(key)  # which holds none: see _get_adapter_state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State
    ) -> State:
        where, tuner = _tuner(model)
        if "_fsdp_wrapped_module." in where:
            raise ValueError("model is wrapped in FSDP, where only a part would load; load first")
        adapter = tuner._intact(adapter_name)
        layout, own = packed(adapter, {k: v for k, v in state_dict.items() if _is_own(k)})
        others = {k: v for k, v in state_dict.items() if not _is_own(k)}
        expect_others(model, others)
        resize(adapter, layout)
        prefix = f"{where}hal_adapters.{adapter_name}."
        return others | {prefix + key: value for key, value in own.items()}


def _is_own(key: str) -> bool:
    """Whether a checkpoint's tensor belongs to an adapter, not to one of `modules_to_save`."""
    return key.startswith(REST) or (
        key.startswith(LAYERS) and key.rpartition(".")[2].startswith("hal_")
    )


def _tuner(model: nn.Module) -> tuple[str, HyperAdaLoraModel]:
    """(prefix of its state dict's keys, tuner) of a PeftModel or the tuner itself."""
    for name, module in model.named_modules():
        if isinstance(module, HyperAdaLoraModel):
            return f"{name}." if name else "", module
    raise TypeError(f"model is a {type(model).__name__}, expected one with HyperAdaLoRA adapters")


def _never_called(layer: nn.Module) -> bool:
    """Whether a linear layer's parent reads its weight instead of calling it (attention's)."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules, by the id of what they replace, in all its places, tied ones included."""
    for module in list(model.modules()):
        if isinstance(module, HyperAdaLoraLinear):
            continue  # the place of a base layer in its own wrapper
        for name, child in module._modules.items():
            if child is not None and id(child) in replacements:
                module._modules[name] = replacements[id(child)]


def _base(target: nn.Module) -> Any:
    return target.base_layer if isinstance(target, HyperAdaLoraLinear) else target


def _shortened(targets: Iterable[str], model: nn.Module) -> set[str]:
    """Endings of names that mean these layers and no other module, where PEFT shortens them too."""
    found = set(targets)
    if len(found) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return found
    others = {name for name, _ in model.named_modules()} - found
    shortest: set[str] = _find_minimal_target_modules(found, others)
    return shortest


def _without_unmatched(config: HALConfig, names: Iterable[str]) -> HALConfig:
    """The configuration without pattern keys that match nothing: PEFT warns of those."""
    names = list(names)
    kept: dict[str, Any] = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        used = [key for key in pattern if any(get_pattern_key([key], n) == key for n in names)]
        kept[field] = {key: pattern[key] for key in used}
    return dataclasses.replace(config, **kept)


def _warn_of_unmatched(model: nn.Module, config: HyperAdaLoraConfig) -> None:
    """PEFT takes a list as long as one entry matches; a mistyped one would go unnoticed."""
    if isinstance(config.target_modules, str | None):
        return
    names = [name for name, _ in model.named_modules()]
    unmatched = sorted(
        entry for entry in config.target_modules if not any(is_named(n, [entry]) for n in names)
    )
    if unmatched and len(unmatched) < len(config.target_modules):  # else PEFT raises
        warnings.warn(f"hal_peft: target_modules {unmatched} match no module", stacklevel=2)
