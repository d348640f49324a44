"""Shared by the tests of an adapter's life: adapters that do something, and proof of no change."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from torch import nn

import hal_kernels
from hal_kernels.nn import HyperAdapter, hypernet

HYPERNETS = ("direct", "bert", "mlp", "cnn")


def small_hypernets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypernetworks of the same structure and fewer parameters: the paper's are 3 to 13 million."""
    monkeypatch.setattr(hypernet, "HIDDEN", 24)
    monkeypatch.setattr(hypernet, "INNER", 32)
    monkeypatch.setattr(hypernet, "MLP_WIDTHS", (16, 16, 32))
    monkeypatch.setattr(hypernet, "CNN_STAGES", ((8, 1), (8, 1)))


def patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    """`model` (a `Net` if None) with an adapter that changes its output: see `stir`."""
    model = models.net() if model is None else model
    options = {"rank": 2, "hypernet": "direct", "seed": 1} | options
    hal_kernels.patch_model(model, **options)
    stir(model)
    return model


def stir(model: nn.Module, seed: int = 0) -> None:
    """Give the adapter an effect: what starts at zero gets random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hal.parameters():
            if not parameter.any():
                scale = 0.3 if parameter.dim() == 1 else 0.3 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def prune(model: nn.Module, *directions: int) -> None:
    """Prune directions by hand, counted over all layers, as an allocation would."""
    adapter = model.hal
    with torch.no_grad():
        adapter.mask[list(directions)] = 0
        if adapter.direct:
            adapter.lam.mul_(adapter.mask)
    adapter.forget()


def prune_layer(model: nn.Module, name: str) -> None:
    """Prune every direction of one layer by hand."""
    layout = model.hal.layout
    index = [spec.name for spec in layout.layers].index(name)
    prune(model, *range(layout.offsets[index], layout.offsets[index + 1]))


def predict(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """Logits without a graph, in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = models.logits_of(model(**(inputs or models.batch(model))))
    model.train(training)
    return logits


class Scaled(nn.Linear):
    """A subclass of nn.Linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def foreign_net():
    model = models.net()
    layer = Scaled(16, 24)
    layer.load_state_dict(model.up[0].state_dict())
    model.up[0] = layer
    return model


def pickled(model: nn.Module) -> Any:
    """A copy by way of torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failed call must leave as it was."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        fields = vars(module)
        facts[f"{name} object"] = (id(module), type(module), module.training)
        facts[f"{name} fields"] = sorted(fields)
        facts[f"{name} hooks"] = {k: len(v) for k, v in fields.items() if k.endswith("hooks")}
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                where = (id(tensor), tensor.requires_grad, tensor.dtype, tuple(tensor.shape))
                facts[f"{name}.{key} object"] = where
                facts[f"{name}.{key} value"] = _bits(tensor)
                facts[f"{name}.{key} gradient"] = _bits(tensor.grad)
        if isinstance(module, HyperAdapter):
            facts["adapter"] = (module.config, module.steps, module.disabled, module.layout.layers)
            for saved, values in module.saved_modules.items():
                facts[f"saved {saved}"] = {k: _bits(v) for k, v in values.items()}
    facts["state_dict"] = list(model.state_dict())
    return facts


def _bits(tensor: torch.Tensor | None) -> bytes | None:
    if tensor is None or tensor.device.type != "cpu":
        return None
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def unchanged(*watched: nn.Module) -> Iterator[None]:
    """Fail if the block changed anything about the models: values, classes, hooks, flags, …"""
    before = [snapshot(model) for model in watched]
    yield
    for model, old in zip(watched, before, strict=True):
        new = snapshot(model)
        differing = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
        assert not differing, f"changed: {sorted(differing)[:8]}"
