"""Which layers of a model are adapted: PEFT's target_modules, and errors for what can't be."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .config import AUTO, HALConfig
from .nn.linear import AdaptedLayer, adapted_class, is_conv1d

HEAD_NAMES = ("classifier", "score", "qa_outputs")
"""What task heads are called in models that don't say themselves which of their parts are heads."""


def matches(name: str, pattern: str | Sequence[str] | None) -> bool:
    """Whether a module name is meant: a regular expression for all of it, or names or endings."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in pattern)


def saved_module_names(model: nn.Module, config: HALConfig) -> list[str]:
    """Names of the modules to train in full: outermost matches that hold parameters.

    "auto" takes task heads, and what the checkpoint that the model was loaded from lacked.
    """
    pattern, chosen = config.modules_to_save, set()
    if pattern == AUTO:
        pattern, chosen = HEAD_NAMES, _task_heads(model) | _new_modules(model)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        meant = name and not inside and (id(module) in chosen or matches(name, pattern))
        if meant and next(module.parameters(), None) is not None:
            found.append(name)
    return found


def _task_heads(model: nn.Module) -> set[int]:
    """Ids of what a transformers model adds to its base model, unless that is a language model's
    head, which comes with the checkpoint."""
    if not is_transformers(model) or _output_embeddings(model) is not None:
        return set()
    base = model.base_model
    return set() if base is model else {id(c) for c in model.children() if c is not base}


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is a PreTrainedModel (recognised without importing transformers)."""
    return isinstance(getattr(type(model), "base_model_prefix", None), str)


def _new_modules(model: nn.Module) -> set[int]:
    """Ids of the modules of transformers models whose parameters are all new.

    Embeddings of tokens are left out: they are large, and new rows alone make them look new.
    """
    new = _new_parameters(model)
    embeddings = {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings.add(id(_output_embeddings(model)))
    parts = (m for m in model.modules() if is_transformers(m))
    return {
        id(module)
        for part in parts
        for module in part.modules()
        if id(module) not in embeddings and all(id(p) in new for p in module.parameters())
    }


def _new_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that ``from_pretrained`` did not find in its checkpoint.

    transformers marks those that it did find. None is new where none is marked.
    """
    known = {id(p): bool(getattr(p, "_is_hf_initialized", False)) for p in model.parameters()}
    if not any(known.values()):
        return set()
    return {id(p) for p in model.parameters() if not known[id(p)] and p.is_floating_point()}


def untrained_names(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """Names of parameters with random values that lie in none of the modules trained in full."""
    new, heads = _new_parameters(model), tuple(f"{name}." for name in saved)
    return [n for n, p in model.named_parameters() if id(p) in new and not n.startswith(heads)]


def target_layers(model: nn.Module, config: HALConfig) -> dict[str, Any]:
    """The layers to adapt, by name, in the model's order.

    Raises:
        ValueError, TypeError: nothing matches, an entry of a list matches nothing, a match can't
            be adapted, or a layer can't be used as it is.
    """
    saved = saved_module_names(model, config)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not any(name == s or name.startswith(s + ".") for s in saved)
    }
    modules = {n: m for n, m in modules.items() if not matches(n, config.exclude)}
    if config.targets == "all-linear":
        kept_out = _output_head(model)
        layers = {
            name: module
            for name, module in modules.items()
            if adapted_class(module) is not None and id(module) not in kept_out
        }
    else:
        _expect_every_entry(modules, config.targets)
        layers = {name: m for name, m in modules.items() if matches(name, config.targets)}
        for name, module in layers.items():
            if adapted_class(module) is None:
                raise TypeError(
                    f"targets: {name!r} is a {type(module).__name__}, expected a linear layer "
                    "(nn.Linear, Conv1D or a quantized linear)"
                )
    if not layers:
        raise ValueError(
            f"targets is {config.targets!r}: no linear layer of {type(model).__name__} matches"
            + _meant_as_list(model, config.targets)
            + (f" (exclude is {config.exclude!r})" if config.exclude is not None else "")
        )
    expect_usable(layers)
    return layers


def _meant_as_list(model: nn.Module, targets: str | Sequence[str]) -> str:
    """For a message, where a string would match as an entry of a list."""
    if isinstance(targets, str) and any(matches(n, (targets,)) for n, _ in model.named_modules()):
        return f" all of its name; did you mean the list [{targets!r}], for names that end so?"
    return ""


def expect_usable(layers: dict[str, Any]) -> None:
    """Raise ValueError for layers, by name, that can't take an adapter as they are now."""
    for name, module in layers.items():
        _expect_usable(name, module)
    devices = {module.weight.device for module in layers.values()}
    if len(devices) > 1:
        raise ValueError(
            f"targets: the layers are on several devices, {sorted(map(str, devices))}; the packed "
            "factors need one (patch each part of the model by itself)"
        )


def _expect_every_entry(modules: dict[str, nn.Module], targets: str | Sequence[str]) -> None:
    if isinstance(targets, str):
        return
    for entry in targets:
        if not any(matches(name, (entry,)) for name in modules):
            raise ValueError(f"targets: {entry!r} matches no module")


def _expect_usable(name: str, module: Any) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"targets: {name!r} has a forward function of its own (an offloading hook?), which "
            "would bypass the adapter; patch the model before such hooks are added"
        )
    if nn.parameter.is_lazy(module.weight):
        raise ValueError(
            f"targets: {name!r} is a {type(module).__name__} whose weight is uninitialized; run a "
            "forward pass before patching"
        )
    if module.weight.device.type == "meta":
        raise ValueError(
            f"targets: {name!r} is on the meta device; load the weights before patching"
        )


def _output_head(model: nn.Module) -> set[int]:
    """Ids of output heads, and of linear layers that share their weight with an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {
        id(m)
        for m in model.modules()
        if id(getattr(m, "weight", None)) in embeddings and not isinstance(m, nn.Embedding)
    }
    head = _output_embeddings(model)
    return heads | ({id(head)} if head is not None else set())


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """A language model's last layer, from hidden states to logits of tokens."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else getattr(model, "lm_head", None)
    except NotImplementedError:  # transformers: a model without one
        return None
    return head if isinstance(head, nn.Module) else None


def base_weight(layer: AdaptedLayer) -> torch.Tensor:
    """The layer's weight as ``[d_out, d_in]``: a view."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if is_conv1d(layer) else weight
