"""`export_lora`: the adapter as a plain PEFT LoRA adapter.

PEFT computes ΔW = lora_B · lora_A · alpha / r. Here lora_A = the kept rows of Pᵀ, lora_B = s·QᵀΛ,
and alpha = r for every layer, so any reader of PEFT's format gets the same ΔW.
"""

import json
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import nn

from .checkpoint import serialized, write_atomically
from .introspection import Factors, factors
from .nn.linear import is_conv1d
from .patching import adapted_layers, enabled_adapter, owner_of, saved_modules
from .targets import matches

PREFIX = "base_model.model."


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into the folder `path`.

    Pruned directions are left out; every layer has the rank it keeps (PEFT's rank_pattern), and
    layers that keep none are no targets. Modules trained in full go along as modules_to_save.

    Args:
        model: a patched model.
        base_model_name_or_path: for the config; None takes the model's own ``name_or_path``.
        task_type: PEFT's task type, such as "SEQ_CLS" or "CAUSAL_LM"; None leaves it open.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or every direction is pruned.
        OSError: can't write there.
    """
    owner, config = owner_of(model), enabled_adapter(model).config
    layers = adapted_layers(owner)
    write_lora(
        path,
        factors(owner),
        owner,
        dropout=config.dropout,
        fan_in_fan_out={name for name, layer in layers.items() if is_conv1d(layer)},
        saved_modules={name: module.state_dict() for name, module in saved_modules(owner)},
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
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, f in factors.items():
        kept = f.mask > 0
        if not kept.any():
            continue
        ranks[name] = int(kept.sum())
        tensors[f"{PREFIX}{name}.lora_A.weight"] = f.p.t()[kept]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (f.q[kept] * (f.scaling * f.lam[kept, None])).t()
    if not ranks:
        raise ValueError("export_lora: every direction is pruned, there is nothing to export")
    for name, state in saved_modules.items():
        tensors |= {f"{PREFIX}{name}.{key}": v for key, v in state.items()}
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    largest = max(ranks.values())
    # PEFT reads pattern keys as regular expressions that match a name's end.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    header = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": not fan_in_fan_out.isdisjoint(ranks),
        "target_modules": exact_targets(model, list(ranks)),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": list(saved_modules) or None,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", serialized(tensors))
    write_atomically(folder / "adapter_config.json", json.dumps(header, indent=2).encode())


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The layers' names, or a regular expression where other modules' names end like one of them.

    PEFT takes the entries of a list as endings, too.
    """
    others = {name for name, _ in model.named_modules()} - set(names)
    if any(matches(name, names) for name in others):
        return "|".join(re.escape(name) for name in names)
    return names
