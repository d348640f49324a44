"""`patch_model`: adapt a model's linear layers in place."""

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .config import HALConfig, unknown_options
from .nn.adapter import HyperAdapter
from .nn.layout import LayerSpec, Layout
from .nn.linear import AdaptedLayer, HALLinear, LayerSlot, adapted_class, linear_widths
from .nn.notices import shortened
from .nn.setting import expect_supported
from .nn.shared_input import SharedInput, find_groups
from .patched import ATTRIBUTE, adapted_layers, find_adapter, owner_of
from .pretrained import SavePretrained
from .stepping import watch
from .targets import is_transformers, saved_module_names, target_layers, untrained_names

_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


def patch_model(
    model: nn.Module, rank: int = 3, *, config: HALConfig | None = None, **options: Any
) -> nn.Module:
    """Give a model's linear layers an adapter in SVD form, in place, and freeze everything else.

    Nothing else has to be called while training: optimizer steps are noticed, factors advance and
    ranks are allocated with them, and a training forward that returns a loss (``output.loss``, a
    ``"loss"`` entry, the first entry of a tuple, or a bare scalar) returns it with γ·penalty added.
    Add `hal_kernels.penalty` yourself to a loss computed outside the model.

    Args:
        model: any module that holds linear layers; all adapted ones on one device.
        rank: target average rank of a layer.
        config: all options at once, instead of `rank` and `options`.
        **options: the fields of `HALConfig`, by name.

    Returns:
        The same model. It now has a submodule ``hal``, whose parameters an optimizer takes along
        with every other ``requires_grad`` parameter of the model.

    Raises:
        TypeError, ValueError: an unknown or impossible option, a model patched already, no layer
            that matches, a layer that can't be adapted. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected torch.nn.Module")
    if config is not None and not isinstance(config, HALConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected HALConfig")
    if config is not None and (options or rank != 3):
        raise ValueError("config comes with rank or other options: give one or the other")
    if config is None:
        unknown = unknown_options(options)
        if unknown:
            known = ", ".join(HALConfig.__dataclass_fields__)
            raise TypeError(f"patch_model has no such options: {unknown}; it has {known}")
        config = HALConfig(rank=rank, **options)
    expect_unpatched(model)
    layers = target_layers(model, config)
    widths = {name: linear_widths(layer) for name, layer in layers.items()}
    saved = saved_module_names(model, config)
    adapter = new_adapter(config, widths, _device(layers))
    untrained = untrained_names(model, saved)
    if untrained:
        warnings.warn(
            f"hal_kernels: {shortened(untrained)}: not in the checkpoint that the model was loaded "
            "from, and neither trained nor saved with the adapter; name the modules that hold them "
            "in modules_to_save",
            stacklevel=2,
        )
    attach(model, adapter, layers, saved)
    return model


def new_adapter(
    config: HALConfig, widths: Mapping[str, tuple[int, int]], device: torch.device
) -> HyperAdapter:
    """An adapter for layers of these (d_in, d_out), by name, in this order.

    Raises:
        ValueError: what `HALConfig.for_layers` raises.
    """
    narrowest = {name: min(pair) for name, pair in widths.items()}
    config, specs = config.for_layers(narrowest), []
    for name, pair in widths.items():
        rank = config.init_rank_of(name, narrowest[name])
        specs.append(LayerSpec(name, *pair, rank, rank, config.scaling_of(name)))
    return HyperAdapter(config, Layout(specs), device)


def expect_unpatched(model: nn.Module) -> None:
    """Raise ValueError if `model` or a part of it is patched or merged already."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model is in DistributedDataParallel already, which would not synchronise the "
                "adapter; patch it before wrapping"
            )
        if isinstance(module, AdaptedLayer):
            raise ValueError(
                f"model is patched already ({name or 'the model itself'} is adapted); merge it "
                "first to start anew"
            )
        if isinstance(module, HyperAdapter):
            raise ValueError(f"model holds an adapter already, {name!r}; unload it first")
        if "_hal_merged" in module.__dict__:
            raise ValueError("model holds a merged adapter; unmerge it instead of patching again")
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"model has an attribute {ATTRIBUTE!r}, where the adapter would go")


def attach(
    model: nn.Module, adapter: HyperAdapter, layers: dict[str, nn.Module], saved: Iterable[str]
) -> None:
    """Turn `layers` (in the adapter's order) into adapted ones and hook `adapter` into `model`.

    Args:
        saved: names of the modules to train in full.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in saved:
        module = model.get_submodule(name)
        adapter.saved_modules.setdefault(
            name, {k: v.detach().clone() for k, v in module.state_dict().items()}
        )
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    classes = {id(layer): adapted_class(layer) for layer in layers.values()}
    plain = [layer for layer in layers.values() if classes[id(layer)] is HALLinear]
    groups = [SharedInput(members) for members in find_groups(model, plain)]  # type: ignore[arg-type]
    shared = {id(layer): group for group in groups for layer in group.layers}
    for index, layer in enumerate(layers.values()):
        adapted = classes[id(layer)]
        assert adapted is not None  # target_layers took only such
        layer.__dict__["_hal"] = LayerSlot(adapter, index, type(layer), shared.get(id(layer)))
        layer.__class__ = adapted
    setattr(model, ATTRIBUTE, adapter)
    if is_transformers(model):
        model.__dict__["save_pretrained"] = SavePretrained(model)
    model.__dict__["_hal_hooks"] = hook_forward(model, adapter, groups)
    # Or DistributedDataParallel would send the state, which is alike everywhere, with every step.
    own = [f"{ATTRIBUTE}.{name}" for name, _ in adapter.named_buffers()]
    ignored = [*getattr(model, _DDP_IGNORED, ()), *own]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def hook_forward(
    model: nn.Module, adapter: HyperAdapter, groups: Sequence[SharedInput]
) -> list[RemovableHandle]:
    """Let `adapter` know of `model`'s forward passes and optimizer steps."""
    handles = [
        model.register_forward_pre_hook(_Opening(adapter, groups)),
        model.register_forward_hook(_Closing(adapter, groups), with_kwargs=True, always_call=True),
        model.register_load_state_dict_post_hook(_Forgetting(adapter)),
    ]
    handles += [
        module.register_forward_pre_hook(_leave_fast_path)
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
    ]
    _choose_checkpointing(model)
    adapter.train(model.training)
    watch(adapter)
    return handles


def _choose_checkpointing(model: nn.Module) -> None:
    """Where a transformers model checkpoints activations and nobody said which way, as after
    `peft.prepare_model_for_kbit_training`, take the way that adapters can train under."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(run, functools.partial) and "use_reentrant" not in run.keywords:
            module._gradient_checkpointing_func = functools.partial(run, use_reentrant=False)  # type: ignore[assignment]


def detach_adapter(model: nn.Module) -> HyperAdapter:
    """Take the adapter out of `model`: its layers get their own classes back."""
    adapter = find_adapter(model)
    owner = owner_of(model)
    for layer in adapted_layers(owner).values():
        slot = layer.__dict__.pop("_hal")
        layer.__class__ = slot.original_class
    for handle in owner.__dict__.pop("_hal_hooks"):
        handle.remove()
    ignored = owner.__dict__.pop(_DDP_IGNORED)
    others = [name for name in ignored if not name.startswith(f"{ATTRIBUTE}.")]
    if others:
        owner.__dict__[_DDP_IGNORED] = others
    delattr(owner, ATTRIBUTE)
    owner.__dict__.pop("save_pretrained", None)
    return adapter


def _device(layers: dict[str, nn.Module]) -> torch.device:
    weight = next(iter(layers.values())).weight
    assert isinstance(weight, torch.Tensor)
    return weight.device


class _Hook:
    """Hooks are objects, not closures: a deep copy of the model gets its own, with its adapter."""

    def __init__(self, adapter: HyperAdapter, groups: Sequence[SharedInput] = ()) -> None:
        self.adapter, self.groups = adapter, groups


class _Opening(_Hook):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        watch(self.adapter)  # a copy of a model is trained like the original

    def __call__(self, model: nn.Module, args: Any) -> None:
        adapter = self.adapter
        if not torch.compiler.is_compiling() and not adapter.disabled:
            expect_supported(model, adapter)
            adapter.patched = weakref.ref(model)
            if adapter.step_begins:
                for group in self.groups:
                    group.begin_step()
        adapter.open_forward()


class _Closing(_Hook):
    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        adapter = self.adapter
        try:
            if model.training and torch.is_grad_enabled() and output is not None:
                if not torch.compiler.is_compiling():
                    adapter.calls.forward_ended(adapter)
                once = kwargs.get("num_items_in_batch") is not None
                output = _with_loss(output, lambda: adapter.loss_term(counts_once=once))
        finally:
            adapter.close_forward()
            if not torch.compiler.is_compiling() and not adapter.in_pass:
                for group in self.groups:
                    group.close(failed=output is None)
        return output


class _Forgetting(_Hook):
    def __call__(self, model: nn.Module, incompatible_keys: Any) -> None:
        self.adapter.forget()


def _leave_fast_path(module: nn.Module, args: Any) -> None:
    """Does nothing. A hooked nn.TransformerEncoderLayer calls its linear layers in evaluation too,
    instead of a fused kernel that reads their weights."""


def _with_loss(output: Any, make_term: Callable[[], torch.Tensor | None]) -> Any:
    """`output` with a term added to the loss it carries; it is made only if there is one."""

    def added(loss: Any) -> Any:
        if not (isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.requires_grad):
            return loss
        term = make_term()
        return loss if term is None else loss + term.to(loss.device, loss.dtype)

    if isinstance(output, torch.Tensor):
        return added(output)
    if isinstance(output, MutableMapping):
        if output.get("loss") is not None:
            output["loss"] = added(output["loss"])
        return output
    if isinstance(output, tuple | list) and output:
        return _rebuilt(output, [added(output[0]), *output[1:]])
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            return dataclasses.replace(output, loss=added(loss))
        output.loss = added(loss)
    return output


def _rebuilt(output: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple of the same type with other items."""
    return output._make(items) if hasattr(output, "_make") else type(output)(items)
