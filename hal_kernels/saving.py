"""Adapter checkpoints: safetensors and JSON, written so that a crash never costs one.

A checkpoint is a folder with ``adapter.json`` and one ``adapter-<digest>.safetensors``. The JSON
file names the tensor file and its SHA-256, and replacing it is the one atomic moment of a save:
before it the old checkpoint is whole, after it the new one is. The tensor file holds a copy of
what the JSON file says, so that neither can be altered unnoticed.
"""

import hashlib
import json
import os
import re
import warnings
from typing import Any

import torch
from torch import nn

from .checks import expect_finite
from .files import folder_path, held, serialized, write_atomically
from .nn.adapter import HyperAdapter
from .nn.notices import shortened
from .patched import ATTRIBUTE, enabled_adapter, saved_modules

FORMAT = 1
JSON_NAME = "adapter.json"
TENSOR_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter and its training state into the folder `path`.

    Saved: configuration, factors, anchors, hypernetworks, masks, scores, the step counter, and the
    modules trained in full. An optimizer saves its own state. The save is atomic: killed at any
    moment, the folder holds the former checkpoint or this one.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since; `path`
            is no path; a tensor holds NaN or Inf, from which no training goes on. OSError: can't
            write there. Nothing was written then.
    """
    adapter, folder = enabled_adapter(model), folder_path(path, to_write=True)
    _warn_of_unsaved(model, adapter)
    own = adapter.state_dict()
    expect_finite(without_progress(own), "the adapter")
    tensors = {f"{ATTRIBUTE}.{key}": value for key, value in own.items()}
    for name, module in saved_modules(model):
        state = module.state_dict()
        expect_finite(state, repr(name), or_inf=True)
        tensors |= {f"saved.{name}.{key}": v for key, v in state.items()}
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
    with held(folder, [JSON_NAME, "adapter-*.safetensors"]):
        write_atomically(folder / file, data)
        write_atomically(folder / JSON_NAME, json.dumps(header, indent=2).encode())
        for old in folder.glob("adapter-*.safetensors"):
            if old.name != file and TENSOR_NAME.fullmatch(old.name):
                old.unlink(missing_ok=True)


def _warn_of_unsaved(model: nn.Module, adapter: HyperAdapter) -> None:
    """Warn of what the user trains beside the adapter and what is not saved with it."""
    saved = {id(p) for _, module in saved_modules(model) for p in module.parameters()}
    saved |= {id(p) for p in adapter.parameters()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if others:
        warnings.warn(
            f"hal_kernels: {shortened(others)}: trained, and not saved with the adapter; save them "
            "yourself, or name the modules that hold them in modules_to_save",
            stacklevel=3,
        )


def without_progress(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key != "_extra_state"}
