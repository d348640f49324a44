"""Names under PEFT: which modules are trained in full, and which names adapters can have."""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from hal_kernels.integration import adapted_class

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT's models for these tasks add to `modules_to_save`, some only after adapting layers."""


def task_heads(model: nn.Module) -> list[str]:
    """Names of the heads that transformers puts beside a base model for a task, new or trained.

    They hold a weight matrix: norms start alike everywhere. A language model's head is none, it was
    pretrained with the base.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or _output_embeddings(model) is not None:
        return []
    children = dict(model.named_children())
    if prefix in children:
        return [
            name
            for name, child in children.items()
            if name != prefix and any(p.dim() > 1 for p in child.parameters())
        ]
    if "For" not in type(model).__name__:  # the base model itself
        return []
    return [name for name, child in children.items() if adapted_class(child) is not None]


def with_task_heads(model: nn.Module, config: Any) -> list[str] | None:
    """`modules_to_save` of the config, with the model's heads where it leaves them to us."""
    given = config.modules_to_save
    if given is not None and config.task_type not in TASK_HEADS:
        return list(given)
    known = saved_names(config)
    heads = [name for name in task_heads(model) if not name.endswith(known)]
    heads = [name for name in heads if not _is_targeted(model.get_submodule(name), name, config)]
    return [*(given or []), *heads] or given


def _is_targeted(head: nn.Module, name: str, config: Any) -> bool:
    """Whether `target_modules` gives the whole name of a part of a head: then it is meant."""
    targets = config.target_modules or ()
    names = {f"{name}.{part}".rstrip(".") for part, _ in head.named_modules()}
    if isinstance(targets, str):
        return not names.isdisjoint(re.sub(r"\\(.)", r"\1", targets).split("|"))
    return not names.isdisjoint(targets)


def saved_names(config: Any) -> tuple[str, ...]:
    """Endings of the names of modules that are, or PEFT is about to have, trained in full."""
    return (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type, ()))


def is_named(name: str, entries: Iterable[str]) -> bool:
    """Whether an entry of a list is this name or, from a dot on, its ending: PEFT's rule."""
    return any(f".{name}".endswith(f".{entry}") for entry in entries)


def is_saved(config: Any, name: str) -> bool:
    """Whether a module is trained in full, or is a part of one that is, by PEFT's rule."""
    endings = saved_names(config)
    return any(outer.endswith(endings) for outer in _outer(name))


def expect_free_name(
    model: nn.Module, adapters: dict[str, nn.Module], configs: dict[str, Any], new: str
) -> None:
    """Raise ValueError if PEFT would take an adapter's name for a part of a tensor's name.

    Args:
        model: the base model. adapters, configs: those there are and the new one, by name.
    """
    parts = {name: _parts(model, adapters[name], configs[name]) for name in adapters}
    if new in parts[new]:
        raise ValueError(f"adapter_name is {new!r}, expected none of {sorted(parts[new])}")
    for name in adapters.keys() - {new}:
        for one, other in ((new, name), (name, new)):
            # Of a key that holds the name of another adapter, PEFT takes it for the other's.
            if one in parts[other] | {"hal_adapters", "model", "modules_to_save"}:
                raise ValueError(
                    f"adapter_name is {new!r}: an adapter called {one!r} can't stand beside "
                    f"{other!r}, whose tensors have names with that part; choose another name"
                )


def unwrapped_name(name: str) -> str:
    """A name in the PEFT model, from the one it has in a wrapper (FSDP, DDP, torch.compile)."""
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def _parts(model: nn.Module, adapter: nn.Module, config: Any) -> set[str]:
    """Parts of the names that an adapter's tensors have in a checkpoint."""
    keys = list(adapter.state_dict())
    for name, module in model.named_modules():
        if name.endswith(saved_names(config)):
            inner = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            keys += [f"{name}.{key}" for key in inner.state_dict()]
    return {part for key in keys for part in key.split(".")}


def _outer(name: str) -> Iterable[str]:
    """ "a.b.c" -> "a", "a.b", "a.b.c"."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _output_embeddings(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
