"""`save_pretrained` of a patched transformers model: the base model's files and the adapter's."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .patched import ATTRIBUTE, disabled
from .saving import save_adapter

TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")


def save_pretrained(
    model: Any,
    folder: str,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """What a patched model's ``save_pretrained`` does, with transformers' arguments.

    ``from_pretrained(folder)`` gives the base model, bit for bit, and
    ``hal_kernels.load_adapter(base, folder)`` the adapted one. In a checkpoint of transformers'
    Trainer (a folder called ``checkpoint-<step>``) the model's own file keeps the adapter's tensors
    too, because Trainer resumes from that file alone.
    """
    if is_main_process:
        save_adapter(model, folder)
    save = type(model).save_pretrained
    if TRAINER_CHECKPOINT.fullmatch(Path(folder).name):
        save(model, folder, is_main_process, state_dict, **options)
        return
    trained = model.state_dict(keep_vars=True)
    with disabled(model):
        adapter = model._modules.pop(ATTRIBUTE)
        try:
            if state_dict is not None:  # gathered by the caller, from a model that is sharded, say
                state_dict = _of_base(state_dict, trained, model.state_dict(keep_vars=True))
            save(model, folder, is_main_process, state_dict, **options)
        finally:
            model._modules[ATTRIBUTE] = adapter


def _of_base(
    state: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """`state` without the adapter, and with the base model's tensors for those that are trained."""
    found = {}
    for key, value in state.items():
        if not key.startswith(f"{ATTRIBUTE}."):
            unchanged = key not in base or base[key] is trained.get(key)
            found[key] = value if unchanged else base[key].detach()
    return found


class SavePretrained:
    """Takes the place of a patched model's ``save_pretrained``. An object, so that a deep copy of
    the model saves the copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._told = model, False

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save_pretrained(self.model, save_directory, *args, **kwargs)
        if not self._told:
            self._told = True
            warnings.warn(
                f"hal_kernels: from_pretrained({str(save_directory)!r}) will give the base model; "
                f"hal_kernels.load_adapter(base, {str(save_directory)!r}) adds the adapter, which "
                "was saved beside it",
                stacklevel=2,
            )
