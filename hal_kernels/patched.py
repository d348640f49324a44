"""What a patched model holds: its adapter, its adapted layers, and the modules trained in full.

`disabled`: the base model's output for a while.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .nn.adapter import HyperAdapter
from .nn.linear import LayerSlot

ATTRIBUTE = "hal"


def find_adapter(model: nn.Module) -> HyperAdapter:
    """The adapter of a patched model, also through wrappers such as DistributedDataParallel.

    Of a model whose adapters have another owner (hal_peft's), the one that is enabled.

    Raises:
        TypeError: `model` is no module. ValueError: it is not patched, or several are enabled.
    """
    if isinstance(model, nn.Module):
        held = {id(m._modules.get(ATTRIBUTE)) for m in model.modules()}
        adapters = [m for m in model.modules() if isinstance(m, HyperAdapter) and id(m) not in held]
        enabled = [adapter for adapter in adapters if not adapter.disabled]
        if len(enabled) == 1 or len(adapters) == 1:
            return (enabled or adapters)[0]
        if adapters:
            raise ValueError(
                f"model holds {len(adapters)} adapters of which {len(enabled)} are enabled, "
                "expected one"
            )
    adapter = getattr(owner_of(model), ATTRIBUTE)
    assert isinstance(adapter, HyperAdapter)
    return adapter


def intact_adapter(model: nn.Module) -> HyperAdapter:
    """`find_adapter`, refused if a patched model's layers are no longer those that were adapted."""
    adapter = find_adapter(model)
    if any(m._modules.get(ATTRIBUTE) is adapter for m in model.modules()):
        adapted_layers(model)
    return adapter


def enabled_adapter(model: nn.Module) -> HyperAdapter:
    """`intact_adapter`, refused inside a `disabled` block, where trained modules are put aside."""
    adapter = intact_adapter(model)
    if adapter.disabled:
        raise ValueError("the adapter is disabled here: leave the disabled(model) block first")
    return adapter


def owner_of(model: nn.Module) -> nn.Module:
    """The module that was given to `patch_model`: `model` itself or a part of a wrapper.

    Raises:
        TypeError: `model` is no module. ValueError: it is not patched, or holds several models that
            are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected torch.nn.Module")
    owners = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module._modules.get(ATTRIBUTE), HyperAdapter)
    }
    if len(owners) > 1:
        raise ValueError(
            f"model holds several patched models, {sorted(owners)}: pass one of them at a time"
        )
    if owners:
        return next(iter(owners.values()))
    if any("_hal_merged" in module.__dict__ for module in model.modules()):
        raise ValueError("model is merged: call hal_kernels.unmerge(model) first")
    raise ValueError("model is not patched: call hal_kernels.patch_model(model) first")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a patched model, as `layers_of` gives them.

    Raises:
        TypeError, ValueError: `model` is no module, or not patched; what `layers_of` raises.
    """
    owner = owner_of(model)
    return layers_of(owner, getattr(owner, ATTRIBUTE), lambda m: getattr(m, "_hal", None))


def layers_of(
    model: nn.Module, adapter: HyperAdapter, slot_of: Callable[[nn.Module], LayerSlot | None]
) -> dict[str, Any]:
    """The layers of an adapter, in its order, by the names that they had when it was made.

    A layer is recognised by the module itself, and may lie in a wrapper (torch.compile's, an
    activation checkpoint's) that was put around a part of the model since.

    Args:
        slot_of: a module's place in an adapter of this kind, if any.

    Raises:
        ValueError: the model has other layers since, or the same ones in other places.
    """
    specs = adapter.layout.layers
    found: dict[int, nn.Module] = {}
    added = []
    for name, module in model.named_modules():
        slot = slot_of(module)
        if slot is not None and slot.adapter is adapter and slot.index not in found:
            found[slot.index] = module
        elif slot is not None:
            added.append(name)  # a copy of a layer, perhaps with a copy of the adapter
    layers = {spec.name: found[i] for i, spec in enumerate(specs) if i in found}
    expect_in_place(model, layers, [s.name for s in specs if s.name not in layers], added)
    return layers


def expect_in_place(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    missing: Sequence[str] = (),
    added: Sequence[str] = (),
) -> None:
    """Raise ValueError unless each layer is in `model`, and no other module but a wrapper around it
    has its name.

    Args:
        missing, added: names of further layers to complain about.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    gone = [*missing, *(name for name, layer in layers.items() if id(layer) not in names)]
    faults = [f"missing {gone}"] if gone else []
    faults += [f"added {[*added]}"] if added else []
    for name, layer in layers.items():
        here = names.get(id(layer), name)
        wrapped = here.startswith(f"{name}.")
        if modules.get(name, layer) is not layer and not wrapped and here != name:
            faults.append(f"{name!r} is {here!r} now")
    if faults:
        raise ValueError(
            f"the model's layers are no longer those that were adapted: {'; '.join(faults)}. Put "
            "them back where they were, or change a model before it gets an adapter"
        )


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module trained in full beside the adapter."""
    owner = owner_of(model)
    for name in find_adapter(model).saved_modules:
        try:
            yield name, owner.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"model lacks {name!r} now, which is trained in full with its adapter"
            ) from None


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what the base model did, bit for bit.

    Modules trained in full (`modules_to_save`) have their original tensors there, as in PEFT. The
    adapter is back afterwards, also after an exception. Blocks may be nested.

    Raises:
        TypeError, ValueError: `model` is no module, or not patched.
    """
    adapter = find_adapter(model)
    if adapter.disabled:
        yield model
        return
    owner = owner_of(model)
    exchanged = []
    for name, module in saved_modules(model):
        trained = module.state_dict(keep_vars=True)
        for key, original in adapter.saved_modules[name].items():
            exchanged.append((trained[key], _like(trained[key], original)))
    adapter.disabled = True
    _exchange(owner, exchanged)
    try:
        yield model
    finally:
        _exchange(owner, [(original, trained) for trained, original in exchanged])
        adapter.disabled = False


def _like(trained: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    moved = original.to(trained.device, trained.dtype)
    return nn.Parameter(moved, False) if isinstance(trained, nn.Parameter) else moved


def _exchange(model: nn.Module, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put the second tensor of each pair wherever the model holds the first, tied places included.

    The tensors themselves stay as they are, so a graph that holds them can still run backward.
    """
    replacement = {id(old): new for old, new in pairs}
    for module in model.modules():
        stores: list[dict[str, Any]] = [module._parameters, module._buffers]
        for store in stores:
            for name, tensor in store.items():
                store[name] = replacement.get(id(tensor), tensor)
