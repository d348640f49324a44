"""PEFT's AdaLoRA checkpoints, read into HyperAdaLoRA without hypernetworks, and written.

Both compute ΔW = s·QᵀΛPᵀ, with lora_A = Pᵀ, lora_E = Λ and lora_B = Qᵀ. AdaLoRA's scaling is
s = lora_alpha / (init_r + 1e-5), HyperAdaLoRA's lora_alpha / r.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hal_kernels.integration import (
    INVALID,
    HyperAdapter,
    adapted_class,
    adapter_factors,
    exact_targets,
    expect_finite,
    expect_tensors,
    folder_path,
    linear_widths,
    serialized,
    write_together,
)

from .config import HyperAdaLoraConfig
from .model import HyperAdaLoraModel
from .names import is_named
from .state import LAYERS, PROGRESS, REST, State, by_layer, expect_others

SHARED = (
    "task_type", "base_model_name_or_path", "revision", "modules_to_save", "lora_dropout",
    "beta1", "beta2",
)  # fmt: skip
SCHEDULE = ("init_r", "tinit", "tfinal", "total_step")
"""Options that both methods have by the same name; those of a run are not exported."""

RANK_OFFSET = 1e-5
"""What AdaLoRA adds to the rank that divides its scaling."""


def load_adalora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> peft.PeftModel:
    """Put an AdaLoRA adapter that PEFT saved on `model`, with equal outputs.

    The scores that AdaLoRA allocates ranks by are not in its checkpoints: one that was saved after
    an allocation keeps its ranks, an earlier one starts its schedule anew.

    Args:
        model: the base model.
        path: a folder with adapter_config.json and adapter_model.safetensors.
        is_trainable: as for `PeftModel.from_pretrained`.

    Raises:
        FileNotFoundError: no safetensors file there. ValueError: it is no AdaLoRA checkpoint, or
            does not fit the model.
    """
    folder = folder_path(path)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}")
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, *INVALID) as error:
        raise ValueError(f"{path} holds no checkpoint of PEFT's: {error!r}") from error
    if not isinstance(config, peft.AdaLoraConfig):
        raise ValueError(f"path holds a {type(config).__name__}, expected PEFT's AdaLoraConfig")
    strange = sorted(key for key in tensors if not key.startswith(LAYERS))
    if strange:
        raise ValueError(
            f"path holds tensors called {strange}, expected names with {LAYERS!r} first"
        )
    factors = _factors(tensors, model)
    others = {key: value for key, value in tensors.items() if ".lora_" not in key}
    expect_others(model, others)
    try:
        with _unchanged_on_failure(model):
            heads = [*(config.modules_to_save or ())]
            _expect_targets(config, model, factors, heads)
            ours = _config(config, factors, is_trainable=is_trainable)
            adapted = peft.get_peft_model(model, ours, adapter_name)
            tuner = _tuner(adapted)
            state = _state(config, tuner._adapter(adapter_name), factors)
            for key, saved in tuner.saved_modules(adapter_name).items():
                own = {f"{LAYERS}{key}.{k}": v for k, v in saved.items()}
                lacking = sorted(own.keys() - others.keys())
                if len(lacking) == len(own) and not is_named(key, heads):
                    state |= own  # a head that AdaLoRA left alone
                elif lacking:
                    raise ValueError(f"it lacks {lacking}, which AdaLoRA trained in full")
            set_peft_model_state_dict(adapted, state | others, adapter_name)
    except INVALID as error:  # PEFT's own, for what it finds wrong or misses, are of many kinds
        raise ValueError(f"{path} does not fit the model: {error!r}") from error
    return adapted.train(is_trainable)


@contextlib.contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Undo what PEFT did to a model (wrappers, hooks, flags; no value) if the block raises."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fields = [
        (m, {k: v.copy() if isinstance(v, dict) else v for k, v in vars(m).items()})
        for m in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, before in fields:
            vars(module).clear()
            vars(module).update(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _state(config: Any, adapter: HyperAdapter, factors: Mapping[str, State]) -> State:
    """An AdaLoRA checkpoint's factors as a checkpoint of HyperAdaLoRA."""
    state: State = {}
    for key, own in by_layer(adapter.layout, adapter.state_dict()).items():
        name, _, short = key.removeprefix(LAYERS).rpartition(".hal_")
        if key == PROGRESS:
            state[key] = torch.tensor([0 if config.rank_pattern is None else config.total_step])
            continue
        if key.startswith(REST):
            state[key] = own
            continue
        found = factors[name].get(short)
        if found is None:  # the mask, and scores that start at zero
            rank = len(factors[name]["lam"])
            found = own.new_full((rank, *own.shape[1:]), 1.0 if short == "mask" else 0.0)
        state[key] = found
    return state


def export_adalora(
    model: peft.PeftModel, path: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write an adapter as a checkpoint of PEFT's AdaLoRA, with equal outputs.

    Pruned directions are left out, in AdaLoRA's rank_pattern. A hypernetwork stays behind: its
    factors are written as they are now.

    Args:
        model: with a HyperAdaLoRA adapter.
        adapter_name: None means the active one.

    Raises:
        TypeError: `model` has no HyperAdaLoRA adapter. ValueError: no such adapter.
    """
    tuner = _tuner(model)
    folder = folder_path(path, to_write=True)
    adapter = tuner._intact(adapter_name)
    name = adapter_name or tuner.active_adapters[0]
    config, layers = tuner.peft_config[name], adapter_factors(adapter)
    init_r = max(adapter.config.init_rank or 1, *(len(f.mask) for f in layers.values()))
    scaling = adapter.config.scaling
    tensors: State = {}
    pattern: dict[str, list[bool]] = {}
    for key, f in layers.items():
        kept = f.mask > 0
        count = int(kept.sum())
        tensors[f"{LAYERS}{key}.lora_A"] = f.p.t()[kept]
        tensors[f"{LAYERS}{key}.lora_B"] = f.q[kept].t()
        tensors[f"{LAYERS}{key}.lora_E"] = f.lam[kept, None] * (f.scaling / scaling)
        pattern[f"{key}.lora_E"] = [True] * count + [False] * (init_r - count)
    for key, saved in tuner.saved_modules(name).items():
        tensors |= {f"{LAYERS}{key}.{k}": v for k, v in saved.items()}
    theirs = peft.AdaLoraConfig(
        **{name: getattr(config, name) for name in SHARED},
        inference_mode=True,
        target_modules=exact_targets(tuner.model, list(layers)),
        fan_in_fan_out=not tuner.transposed.isdisjoint(layers),
        lora_alpha=scaling * (init_r + RANK_OFFSET),  # type: ignore[arg-type]
        init_r=init_r,
        target_r=config.r,
        total_step=max(adapter.steps, 1),
        deltaT=config.interval or 100,  # as in a long run
        orth_reg_weight=config.gamma,
        rank_pattern=pattern,
    )
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in theirs.to_dict().items()}
    files = {
        SAFETENSORS_WEIGHTS_NAME: serialized(tensors),
        CONFIG_NAME: json.dumps(values, indent=2, sort_keys=True).encode(),
    }
    write_together(folder, files)


def _tuner(model: nn.Module) -> HyperAdaLoraModel:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, HyperAdaLoraModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a HyperAdaLoRA PeftModel")
    return tuner


def _factors(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, State]:
    """P, Λ and Q of each layer of an AdaLoRA checkpoint.

    Raises:
        ValueError: they are not of the model's layers, or not what an adapter holds.
    """
    expect_finite(tensors, "the model", or_inf=True)
    modules = dict(model.named_modules())
    parts: dict[str, State] = {}
    for key, value in tensors.items():
        name, found, part = key.removeprefix(LAYERS).rpartition(".lora_")
        if found:
            parts.setdefault(name, {})[part] = value
    factors = {}
    for name, own in parts.items():
        layer = modules.get(name)
        if layer is None or adapted_class(layer) is None:
            raise ValueError(f"path adapts {name!r}, which is no linear layer of the model")
        d_in, d_out = linear_widths(layer)
        rank = len(own["E"]) if "E" in own and own["E"].dim() else 0
        rank = min(rank, d_in, d_out)
        shapes = {"A": (rank, d_in), "B": (d_out, rank), "E": (rank, 1)}
        expected = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
        expect_tensors(expected, own, f"{name!r}")
        expect_finite(own, f"{name!r}")
        factors[name] = {"p": own["A"], "lam": own["E"][:, 0], "q": own["B"].t()}
    if not factors:
        raise ValueError("path holds no tensors of AdaLoRA's: none is called lora_A")
    return factors


def _expect_targets(
    config: Any, model: nn.Module, factors: Mapping[str, State], heads: list[str]
) -> None:
    """Raise ValueError if a list of targets names other layers than a checkpoint has factors of."""
    targets = config.target_modules
    if isinstance(targets, str) or config.exclude_modules or config.layers_to_transform is not None:
        return
    whole = [name for name, _ in model.named_modules() if is_named(name, heads)]
    lacking = [
        name
        for name, module in model.named_modules()
        if is_named(name, targets) and adapted_class(module) is not None and name not in factors
        if not any(f"{name}.".startswith(f"{head}.") for head in whole)
    ]
    if lacking:
        raise ValueError(f"it lacks the factors of {lacking}, which its target_modules name")
    unnamed = [name for name in factors if not is_named(name, targets)]
    if unnamed:
        raise ValueError(f"it holds factors of {unnamed}, which its target_modules do not name")


def _config(theirs: Any, factors: Mapping[str, State], *, is_trainable: bool) -> HyperAdaLoraConfig:
    scaling = (theirs.lora_alpha if theirs.lora_alpha > 0 else theirs.init_r) / (
        theirs.init_r + RANK_OFFSET
    )
    dtype = next(iter(factors.values()))["p"].dtype
    return HyperAdaLoraConfig(
        **{name: getattr(theirs, name) for name in (*SHARED, *SCHEDULE)},
        inference_mode=not is_trainable,
        r=theirs.target_r,
        target_modules="|".join(re.escape(name) for name in factors),
        lora_alpha=scaling * theirs.target_r,
        dtype="float64" if dtype == torch.float64 else "float32",
        hypernet="direct",
        gamma=theirs.orth_reg_weight,
        penalty="frobenius",
        allocation="ema",
        schedule="cubic",
        interval=theirs.deltaT,
    )
