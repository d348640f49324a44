"""`export_lora`: the adapter as a plain PEFT LoRA adapter.

LoRA computes ΔW = lora_B · lora_A · alpha / r. Here lora_A = the kept rows of Pᵀ, lora_B = s·QᵀΛ,
both filled up with zeros to one rank, and alpha = r is that rank. So ΔW is the same whether a
reader takes r and alpha from the patterns, as PEFT, from the configuration's two numbers, as vLLM,
or r from each tensor, as llama.cpp.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from .files import folder_path, serialized, write_together
from .introspection import Factors, factors
from .merging import merged_weight
from .nn.linear import is_conv1d, is_foreign
from .patched import adapted_layers, enabled_adapter, owner_of, saved_modules
from .targets import matches

PREFIX = "base_model.model."
# Endings of transformers' class names, PEFT's task type, and what PEFT then trains in full.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ("ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
    ("ForCausalLM", "CAUSAL_LM", ()),
    ("LMHeadModel", "CAUSAL_LM", ()),
)


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into the folder `path`.

    Pruned directions are left out. All layers have the largest rank that one keeps, and layers
    that keep none are no targets. Modules trained in full go along as modules_to_save, and with
    them those whose weights are tied to theirs. Killed at any moment, the folder holds the former
    export or this one (`write_together` says where).

    Args:
        model: a patched model.
        base_model_name_or_path: for the config; None takes the model's own ``name_or_path``.
        task_type: PEFT's task type, such as "SEQ_CLS" or "CAUSAL_LM"; None takes it from the
            model's class.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since; `path`
            is no path; every direction is pruned; an adapted layer's weight is tied to a module
            trained in full. OSError: can't write there.
    """
    config, owner = enabled_adapter(model).config, owner_of(model)
    layers, adapted = adapted_layers(owner), factors(owner)
    in_full = _in_full(owner, layers, adapted)
    write_lora(
        path,
        {k: f for k, f in adapted.items() if not any(f"{k}.".startswith(f"{m}.") for m in in_full)},
        owner,
        dropout=config.dropout,
        fan_in_fan_out={name for name, layer in layers.items() if is_conv1d(layer)},
        saved_modules=in_full,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )


def write_lora(
    path: str | os.PathLike[str],
    factors: Mapping[str, Factors],
    model: nn.Module,
    *,
    dropout: float,
    fan_in_fan_out: Set[str],
    saved_modules: Mapping[str, Mapping[str, torch.Tensor]],
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> None:
    """`export_lora` for factors from anywhere.

    Args:
        factors: of the layers, by their names in `model`.
        model: the base model: its other modules' names must not be taken for targets.
        dropout, base_model_name_or_path, task_type: for the config.
        fan_in_fan_out: names of the layers that are Conv1D.
        saved_modules: tensors of the modules trained in full, by module name.
    """
    texts = {"task_type": task_type, "base_model_name_or_path": base_model_name_or_path}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, expected a str or None")
    folder = folder_path(path, to_write=True)
    kept = {name: f for name, f in factors.items() if (f.mask > 0).any()}
    if not kept:
        raise ValueError("export_lora: every direction is pruned, there is nothing to export")
    rank = max(int((f.mask > 0).sum()) for f in kept.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, f in kept.items():
        rows = f.mask > 0
        a, b = f.p.t()[rows], f.q[rows] * (f.scaling * f.lam[rows, None])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _with_rows(a, rank)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _with_rows(b, rank).t()
    for name, state in saved_modules.items():
        tensors |= {f"{PREFIX}{name}.{key}": v for key, v in state.items()}
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    if task_type is None:
        task_type = _task_type(model, set(kept), set(saved_modules))
    kind = type(model)
    header = {
        "peft_type": "LORA",
        "task_type": task_type,
        # What AutoPeftModel goes by where there is no task type.
        "auto_mapping": None
        if task_type
        else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": not fan_in_fan_out.isdisjoint(kept),
        "target_modules": exact_targets(model, list(kept)),
        "modules_to_save": list(saved_modules) or None,
    }
    files = {
        "adapter_model.safetensors": serialized(tensors),
        "adapter_config.json": json.dumps(header, indent=2).encode(),
    }
    write_together(folder, files)


def _with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """`matrix` with rows of zeros below."""
    return nn.functional.pad(matrix, (0, 0, 0, rows - len(matrix)))


def _in_full(
    model: nn.Module, layers: Mapping[str, Any], adapted: Mapping[str, Factors]
) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts, by name, of what PEFT must hold in full beside what was trained so.

    - Modules whose parameters are tied to those trained: PEFT trains a copy of each.
    - Modules whose names end like those of modules in full: PEFT takes them for such, too.
    - Layers that have several names in the model: PEFT would adapt them under the first alone.

    Adapted layers among them have their ΔW in their weight.

    Raises:
        ValueError: an adapted layer is tied to a module trained in full, or can't be merged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = dict(saved_modules(model))
    names = {id(layer): name for name, layer in layers.items()}
    inside = {id(part) for module in found.values() for part in module.modules()}
    trained = {id(p) for module in found.values() for p in module.parameters()}
    for name, module in modules.items():
        if id(module) in inside:
            continue
        if any(id(p) in trained for p in module._parameters.values()):
            if id(module) in names:
                raise ValueError(
                    f"export_lora: the adapted layer {name!r} shares a parameter with one of "
                    f"{list(found)}, which are trained in full, and LoRA can't hold both"
                )
            found[name] = module
    places = Counter(map(id, modules.values()))
    several = {id(m) for m in (*found.values(), *layers.values()) if places[id(m)] > 1}
    endings = tuple(found)
    for name, module in modules.items():
        if id(module) in several or (name.endswith(endings) and id(module) not in inside):
            found[name] = module
    states = {}
    for name, module in found.items():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        state = states[name] = dict(module.state_dict())
        for key, part in module.named_modules(prefix=name):
            if id(part) in names:
                weight = f"{key}.weight".removeprefix(f"{name}.")
                state[weight] = _merged(key, part, adapted[names[id(part)]])
    return states


def _merged(name: str, layer: Any, factors: Factors) -> torch.Tensor:
    if is_foreign(layer):
        raise ValueError(
            f"export_lora: PEFT would train {name!r} in full or in part, and its weight "
            f"({type(layer.weight).__name__}) can't take ΔW"
        )
    weight = merged_weight(layer, factors.delta())
    return weight.t() if is_conv1d(layer) else weight


def _task_type(model: nn.Module, adapted: Set[str], saved: Set[str]) -> str | None:
    """PEFT's task type of a transformers model, by its class; None where none is sure to do.

    PEFT's classes for a task give the model ``input_ids``, and train modules of certain names in
    full: those must be in the export, and be no LoRA layers.
    """
    name = type(model).__name__
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return "SEQ_2_SEQ_LM"
    for ending, task_type, heads in _TASKS:
        if name.endswith(ending):
            meant = {key for key, _ in model.named_modules() if key.endswith(heads)}
            return task_type if meant <= saved and not meant & adapted else None
    return None


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The layers' names, or a regular expression where other modules' names end like one of them.

    PEFT takes the entries of a list as endings, too.
    """
    others = {name for name, _ in model.named_modules()} - set(names)
    if any(matches(name, names) for name in others):
        return "|".join(re.escape(name) for name in names)
    return names
