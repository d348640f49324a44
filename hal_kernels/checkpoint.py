"""Loading an adapter checkpoint, as `saving` writes it.

Neither the JSON file nor the tensor file is believed: all that they say is compared with their
tensors and the model before the model is touched.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .checks import INVALID, expect_finite, expect_mask, expect_tensors
from .config import HALConfig
from .files import folder_path
from .nn.adapter import HyperAdapter
from .nn.earlier import OPTIONS, without_offsets, without_sketches
from .nn.layout import LayerSpec, Layout
from .nn.linear import AdaptedLayer, adapted_class, linear_widths
from .nn.state import LATER, saved_steps
from .nn.switch import to_spectral
from .nn.tensors import replace_data
from .patched import ATTRIBUTE, adapted_layers, enabled_adapter, owner_of
from .patching import attach, expect_unpatched
from .saving import FORMAT, JSON_NAME, TENSOR_NAME, without_progress
from .stepping import torch_optimizers
from .targets import expect_usable


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, update: str | None = None
) -> nn.Module:
    """Restore what `save_adapter` wrote, training state included, and return the model.

    An unpatched model is patched as the checkpoint says. A patched one must have the same layers
    and the same factor-defining options; it takes over the checkpoint's ranks and configuration.

    Args:
        update: "spectral" lets what another update has trained go on by spectral steps: the same
            function, ranks and step, P and Q made orthonormal. None: the update that it was.

    Raises:
        TypeError, ValueError: the files are missing parts, truncated or altered, or don't fit the
            model, `path` is no path, or `update` is another one. FileNotFoundError: no checkpoint
            there. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected torch.nn.Module")
    if update not in (None, "spectral"):
        raise ValueError(f"update is {update!r}, expected 'spectral', or None for the checkpoint's")
    folder = folder_path(path)
    header, tensors = _read(folder)
    try:
        config, specs, names = _parsed(header)
    except INVALID as error:
        raise ValueError(f"{folder / JSON_NAME} is not a valid checkpoint: {error}") from error
    present = None
    if any(isinstance(m, HyperAdapter) for m in model.modules()):
        present, owner = enabled_adapter(model), owner_of(model)
        _expect_same_names(present, specs)
        layers = adapted_layers(owner)
    else:
        expect_unpatched(model)
        owner = model
        layers = {spec.name: _submodule(owner, spec.name) for spec in specs}
    _expect_layers(layers, specs)
    if present is None:
        expect_usable(layers)
    modules = {name: _submodule(owner, name) for name in names}
    _expect_apart(modules, layers)

    state = without_offsets(_taken(tensors, f"{ATTRIBUTE}."))
    saved = {name: _taken(tensors, f"saved.{name}.") for name in names}
    if tensors:
        raise ValueError(f"the checkpoint holds tensors of nothing it names: {sorted(tensors)}")
    # Memory for an adapter of these ranks must not be what the header alone says.
    rows = torch.empty(sum(spec.rank for spec in specs), device="meta")
    expect_tensors({"lam": rows}, {k: v for k, v in state.items() if k == "lam"}, "the adapter")
    adapter = HyperAdapter(config, Layout(specs), next(iter(layers.values())).weight.device)
    expected = adapter.state_dict()
    for key in expected.keys() & set(LATER):
        zeros = torch.zeros_like(expected[key])
        state.setdefault(key, zeros.to(state["lam"].dtype) if zeros.is_floating_point() else zeros)
    if "_extra_state" in state:
        state["_extra_state"] = without_sketches(state["_extra_state"])
    expect_tensors(expected, state, "the adapter")
    expect_finite(without_progress(state), "the adapter")
    for key, tensor in state.items():
        dtype = torch.bool if key == "never_called" else state["lam"].dtype
        if key != "_extra_state" and tensor.dtype != dtype:
            raise ValueError(
                f"the checkpoint's tensor {key!r} for the adapter has dtype {tensor.dtype}, "
                f"expected {dtype}" + (" as 'lam' has" if dtype != torch.bool else "")
            )
    expect_mask(state["mask"], "mask")
    steps = saved_steps(state["_extra_state"])
    if header["steps"] != steps:
        raise ValueError(f"{JSON_NAME} says steps {header['steps']!r}, its tensors say {steps}")
    for name, module in modules.items():
        expect_tensors(module.state_dict(), saved[name], repr(name))
        expect_finite(saved[name], repr(name), or_inf=True)
    adapter.to(state["lam"].dtype)  # an adapter may have been moved since it was made
    adapter.load_state_dict(state)
    if update is not None and not config.spectral:
        adapter = to_spectral(adapter)
    if present is not None:
        _expect_same_kind(present, adapter, names)

    if present is not None:
        _take_over(present, adapter)
    else:
        attach(owner, adapter, layers, names)
    for name, module in modules.items():
        module.load_state_dict(saved[name])
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint folder's header and its tensors: what the files' digest and format vouch for."""
    path = folder / JSON_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter checkpoint ({JSON_NAME} is missing)")
    try:
        header = json.loads(path.read_bytes())
        file, digest = header["tensors"]["file"], header["tensors"]["sha256"]
        version = header["format"]
    except INVALID as error:
        raise ValueError(f"{path} is not a valid checkpoint: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, expected {FORMAT}")
    if not isinstance(file, str) or not TENSOR_NAME.fullmatch(file):
        raise ValueError(
            f"{path} names the tensor file {file!r}, expected adapter-<16 digits>.safetensors"
        )
    tensor_path = folder / file
    if not tensor_path.is_file():
        raise ValueError(f"{path} names {file}, which is missing")
    found = hashlib.sha256(tensor_path.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(
            f"{tensor_path} is damaged: its SHA-256 is {found}, {JSON_NAME} says {digest}"
        )
    try:
        with safe_open(tensor_path, "pt") as tensors:
            original = json.loads((tensors.metadata() or {}).get("header", "{}"))
            loaded = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, *INVALID) as error:
        raise ValueError(f"{tensor_path} is not a valid safetensors file: {error}") from error
    _expect_unaltered({k: v for k, v in header.items() if k != "tensors"}, original)
    return header, loaded


def _expect_unaltered(stated: dict[str, Any], original: Any) -> None:
    if stated != original:
        was = original if isinstance(original, dict) else {}
        altered = sorted(k for k in stated.keys() | was.keys() if stated.get(k) != was.get(k))
        raise ValueError(
            f"{JSON_NAME} was altered after it was saved: its tensors were saved with another "
            f"{', '.join(map(repr, altered))}"
        )


def _parsed(header: dict[str, Any]) -> tuple[HALConfig, list[LayerSpec], list[str]]:
    """(configuration, layers, names of modules trained in full), each valid by itself.

    Patterns of the configuration are not matched with names: what they say of each layer was saved
    with it, and a forged regular expression could take for ever.
    """
    for key, kind in (("config", dict), ("layers", list), ("saved_modules", list)):
        if not isinstance(header[key], kind):
            raise TypeError(f"{key} is {header[key]!r}, expected a {kind.__name__}")
    options = {k: v for k, v in header["config"].items() if k not in OPTIONS}
    config = HALConfig.from_dict(options)
    if config.init_rank is None:
        raise ValueError("init_rank is None, expected an int")
    same: dict[str, Any] = {} if config.rank_pattern else {"init_rank": config.init_rank}
    if not config.alpha_pattern:
        same["scaling"] = config.scaling
    specs = [LayerSpec(**(same | values)) for values in header["layers"]]
    narrowest = {spec.name: min(spec.d_in, spec.d_out) for spec in specs}
    for spec in specs:
        side = narrowest[spec.name]
        if not spec.rank <= spec.init_rank <= side:
            raise ValueError(
                f"layer {spec.name!r} has rank {spec.rank} and init_rank {spec.init_rank}, "
                f"expected rank <= init_rank <= {side} (its narrowest side)"
            )
        for field, value in same.items():
            value = min(value, side) if field == "init_rank" else value
            if getattr(spec, field) != value:
                raise ValueError(f"{field} of {spec.name!r} is {getattr(spec, field)}, not {value}")
    if len({spec.name for spec in specs}) < len(specs) or not any(spec.rank for spec in specs):
        raise ValueError(f"layers are not distinct, or without a rank: {[s.name for s in specs]}")
    initial, budget = sum(spec.init_rank for spec in specs), config.budget(narrowest)
    if initial < budget:
        raise ValueError(f"layers start with {initial} directions, expected at least {budget}")
    names = header["saved_modules"]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"saved_modules is {names!r}, expected distinct names")
    if isinstance(header["steps"], bool) or not isinstance(header["steps"], int):
        raise TypeError(f"steps is {header['steps']!r}, expected an int")
    return config, specs, names


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        found = model.get_submodule(name) if name else None
    except (AttributeError, TypeError):
        found = None
    if found is None:
        raise ValueError(f"the checkpoint holds {name!r}, which {type(model).__name__} lacks")
    return found


def _expect_layers(layers: Mapping[str, nn.Module], specs: list[LayerSpec]) -> None:
    if len({id(layer) for layer in layers.values()}) < len(layers):
        raise ValueError(f"the checkpoint adapts one layer under several names of {list(layers)}")
    for spec in specs:
        layer = layers[spec.name]
        if not isinstance(layer, AdaptedLayer) and adapted_class(layer) is None:
            raise ValueError(
                f"the checkpoint adapts {spec.name!r}, which is a {type(layer).__name__} here"
            )
        widths = linear_widths(layer)
        if widths != (spec.d_in, spec.d_out):
            raise ValueError(
                f"the checkpoint adapts {spec.name!r} as {spec.d_in} -> {spec.d_out}, "
                f"here it is {widths[0]} -> {widths[1]}"
            )


def _expect_apart(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a module trained in full holds an adapted layer, or another of them."""
    for name, module in modules.items():
        parts = {id(part) for part in module.modules()}
        others = [*layers.items(), *((n, m) for n, m in modules.items() if n != name)]
        inside = [other for other, part in others if id(part) in parts]
        if inside:
            raise ValueError(f"the checkpoint trains {name!r} in full, which holds {inside}")


def _expect_same_names(adapter: HyperAdapter, specs: list[LayerSpec]) -> None:
    here = [spec.name for spec in adapter.layout.layers]
    there = [spec.name for spec in specs]
    if here != there:
        differing = sorted(set(here) ^ set(there)) or "their order"
        raise ValueError(f"the checkpoint's layers are not the model's; differing: {differing}")


def _taken(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, without the prefix: taken out of `tensors`."""
    keys = [key for key in tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): tensors.pop(key) for key in keys}


def _expect_same_kind(adapter: HyperAdapter, loaded: HyperAdapter, saved: list[str]) -> None:
    if (
        adapter.config.hypernet != loaded.config.hypernet
        or adapter.body_options != loaded.body_options
        or set(adapter.state_dict()) != set(loaded.state_dict())
    ):
        raise ValueError(
            f"the checkpoint was made with hypernet={loaded.config.hypernet!r}, "
            f"update={loaded.config.update!r}, allocation={loaded.config.allocation!r}, "
            f"norm_first={loaded.config.norm_first}, hidden={loaded.config.hidden}; the model was "
            f"patched with {adapter.config.hypernet!r}, {adapter.config.update!r}, "
            f"{adapter.config.allocation!r}, {adapter.config.norm_first}, {adapter.config.hidden}"
            + (": load_adapter(..., update='spectral') switches" if adapter.config.spectral else "")
        )
    if adapter.lam.dtype != loaded.lam.dtype:
        raise ValueError(
            f"the checkpoint's factors have dtype {loaded.lam.dtype}, the model's "
            f"{adapter.lam.dtype}"
        )
    if saved != list(adapter.saved_modules):
        raise ValueError(
            f"the checkpoint holds the trained modules {saved}, the model trains "
            f"{list(adapter.saved_modules)}"
        )


@torch.no_grad()
def _take_over(adapter: HyperAdapter, loaded: HyperAdapter) -> None:
    """Make `adapter` equal `loaded`; its parameters stay the objects an optimizer holds."""
    new = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    optimizers = torch_optimizers()
    for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
        if tensor.shape == new[name].shape:
            tensor.copy_(new[name])
            continue
        replace_data(tensor, new[name].data)
        for optimizer in optimizers:  # moments of other shapes: the run they belong to is gone
            optimizer.state.pop(tensor, None)
    adapter.config = loaded.config
    adapter.set_layout(loaded.layout)
    adapter.set_extra_state(loaded.get_extra_state())
