"""Adapter checkpoints: safetensors and JSON, written so that a crash never costs one.

A checkpoint is a folder with ``adapter.json`` and one ``adapter-<digest>.safetensors``. The JSON
file names the tensor file and its SHA-256, and replacing it is the one atomic moment of a save:
before it the old checkpoint is whole, after it the new one is. The tensor file holds a copy of
what the JSON file says, so that neither can be altered unnoticed. Loading verifies both before it
touches the model.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .config import HALConfig
from .nn.adapter import HyperAdapter
from .nn.layout import LayerSpec, Layout
from .nn.linear import AdaptedLayer, adapted_class, linear_widths
from .nn.tensors import replace_data
from .patching import (
    ATTRIBUTE,
    attach,
    enabled_adapter,
    expect_unpatched,
    find_adapter,
    owner_of,
    saved_modules,
)
from .stepping import torch_optimizers
from .targets import expect_usable

FORMAT = 1
JSON_NAME = "adapter.json"


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter and its training state into the folder `path`.

    Saved: configuration, factors, anchors, hypernetworks, masks, scores, the step counter, and the
    modules trained in full. An optimizer saves its own state. The save is atomic: killed at any
    moment, the folder holds the former checkpoint or this one.

    Raises:
        TypeError, ValueError: `model` is no module, or not patched. OSError: can't write there.
    """
    adapter, folder = enabled_adapter(model), Path(path)
    tensors = {f"{ATTRIBUTE}.{key}": value for key, value in adapter.state_dict().items()}
    for name, module in saved_modules(model):
        tensors |= {f"saved.{name}.{key}": v for key, v in module.state_dict().items()}
    header = {
        "format": FORMAT,
        "config": adapter.config.to_dict(),
        "layers": [vars(spec) for spec in adapter.layout.layers],
        "saved_modules": list(adapter.saved_modules),
        "steps": adapter.steps,
    }
    data = serialized(tensors, {"header": json.dumps(header)})
    digest = hashlib.sha256(data).hexdigest()
    file = f"adapter-{digest[:16]}.safetensors"
    header["tensors"] = {"file": file, "sha256": digest}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / file, data)
    write_atomically(folder / JSON_NAME, json.dumps(header, indent=2).encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Restore what `save_adapter` wrote, training state included, and return the model.

    An unpatched model is patched as the checkpoint says. A patched one must have the same layers
    and the same factor-defining options; it takes over the checkpoint's ranks and configuration.

    Raises:
        TypeError, ValueError: the files are missing parts, truncated or altered, or don't fit the
            model. FileNotFoundError: no checkpoint there. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected torch.nn.Module")
    header, tensors, original = _read(Path(path))
    try:
        config = HALConfig.from_dict(header["config"])
        specs = [LayerSpec(**values) for values in header["layers"]]
        names = list(header["saved_modules"])
        if not specs or len({spec.name for spec in specs}) < len(specs):
            raise ValueError(f"layers are none, or not distinct: {[s.name for s in specs]}")
        config.initial_rows(spec.name for spec in specs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(path) / JSON_NAME} is not a valid checkpoint: {error}") from error
    patched = any(isinstance(m, HyperAdapter) for m in model.modules())
    owner = owner_of(model) if patched else model
    if patched:
        _expect_same_names(find_adapter(model), specs)
    else:
        expect_unpatched(model)
    layers = _layers(owner, specs)
    if not patched:
        expect_usable(layers)
    adapter = HyperAdapter(config, Layout(specs), next(iter(layers.values())).weight.device)  # type: ignore[arg-type]
    prefix = f"{ATTRIBUTE}."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _expect_tensors(adapter.state_dict(), state, "the adapter")
    saved = {}
    for name in names:
        start = f"saved.{name}."
        saved[name] = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        _expect_tensors(_submodule(owner, name).state_dict(), saved[name], repr(name))
    _expect_unaltered(header, original)
    adapter.to(state["lam"].dtype)  # an adapter may have been moved since it was made
    adapter.load_state_dict(state)

    if patched:
        _expect_same_kind(find_adapter(model), adapter, names)
        _take_over(find_adapter(model), adapter)
    else:
        attach(owner, adapter, layers)
    for name in names:
        owner.get_submodule(name).load_state_dict(saved[name])
    return model


def serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file's contents. Tensors that share memory are written each by itself."""
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    return save(copies, metadata)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that `path` is at every moment the former file or all of the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint folder's header, its tensors (verified), and the header saved with them."""
    path = folder / JSON_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter checkpoint ({JSON_NAME} is missing)")
    try:
        header = json.loads(path.read_bytes())
        file, digest = header["tensors"]["file"], header["tensors"]["sha256"]
        version = header["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid checkpoint: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, expected {FORMAT}")
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"{path} names the tensor file {file!r}, expected a plain file name")
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
            metadata = tensors.metadata() or {}
            loaded = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{tensor_path} is not a valid safetensors file: {error}") from error
    return header, loaded, json.loads(metadata.get("header", "{}"))


def _expect_unaltered(header: dict[str, Any], original: dict[str, Any]) -> None:
    stated = {key: value for key, value in header.items() if key != "tensors"}
    if stated != original:
        keys = sorted(stated.keys() | original.keys())
        config, was = stated.get("config", {}), original.get("config", {})
        altered = [f"{key!r}" for key in keys if stated.get(key) != original.get(key)]
        altered += [f"{key!r} of the config" for key in config if config[key] != was.get(key)]
        raise ValueError(
            f"{JSON_NAME} was altered after it was saved: its tensors were saved with another "
            f"{', '.join(altered)}"
        )


def _layers(model: nn.Module, specs: list[LayerSpec]) -> dict[str, nn.Module]:
    layers = {}
    for spec in specs:
        layer = _submodule(model, spec.name)
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
        layers[spec.name] = layer
    return layers


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except (AttributeError, TypeError):
        raise ValueError(
            f"the checkpoint holds {name!r}, which {type(model).__name__} lacks"
        ) from None


def _expect_same_names(adapter: HyperAdapter, specs: list[LayerSpec]) -> None:
    here = [spec.name for spec in adapter.layout.layers]
    there = [spec.name for spec in specs]
    if here != there:
        differing = sorted(set(here) ^ set(there)) or "their order"
        raise ValueError(f"the checkpoint's layers are not the model's; differing: {differing}")


def _expect_tensors(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], what: str
) -> None:
    if expected.keys() != found.keys():
        raise ValueError(
            f"the checkpoint's tensors for {what} don't fit; "
            f"missing {sorted(expected.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - expected.keys())}"
        )
    for key, tensor in expected.items():
        # The extra state grows while directions are chosen; the adapter checks it itself.
        if tensor.shape != found[key].shape and not key.endswith("_extra_state"):
            raise ValueError(
                f"the checkpoint's tensor {key!r} for {what} has shape {tuple(found[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )


def _expect_same_kind(adapter: HyperAdapter, loaded: HyperAdapter, saved: list[str]) -> None:
    if (
        adapter.config.hypernet != loaded.config.hypernet
        or adapter.norm_first != loaded.norm_first
        or set(adapter.state_dict()) != set(loaded.state_dict())
    ):
        raise ValueError(
            f"the checkpoint was made with hypernet={loaded.config.hypernet!r}, "
            f"update={loaded.config.update!r}, allocation={loaded.config.allocation!r}, "
            f"norm_first={loaded.config.norm_first}; the model was patched with "
            f"{adapter.config.hypernet!r}, {adapter.config.update!r}, "
            f"{adapter.config.allocation!r}, {adapter.config.norm_first}"
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
