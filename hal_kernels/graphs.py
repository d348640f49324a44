"""`graphed`: forward and backward of a patched model as CUDA graphs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .patched import enabled_adapter

DEVICE = "cuda"


def _loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"] if isinstance(output, Mapping) else output.loss
    return loss


class _Loss(nn.Module):
    """A model's loss as a function of tensors. (torch captures no module with hooks of its own.)"""

    def __init__(self, model: nn.Module, names: list[str], loss: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.model, self.names, self.loss = model, names, loss

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model(**dict(zip(self.names, tensors, strict=True))))


class Graphed:
    """What `graphed` returns: ``graphed(**batch)`` is the loss."""

    def __init__(
        self, model: nn.Module, sample: Mapping[str, torch.Tensor], loss: Callable[[Any], Any]
    ) -> None:
        self._adapter, self._modules = enabled_adapter(model), list(model.modules())
        if not self._adapter.direct:
            raise ValueError(
                f"graphed: the adapter has hypernet={self._adapter.config.hypernet!r}, whose "
                "factors are generated anew in every pass; expected a model that is patched "
                'without one (the default, or hypernet="direct")'
            )
        if not model.training:
            raise ValueError("graphed: model is in evaluation mode, expected model.train()")
        held: dict[str, Any] = {"the adapter": self._adapter.mask, **sample}
        for name, tensor in held.items():
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != DEVICE:
                where = getattr(tensor, "device", type(tensor).__name__)
                raise ValueError(f"graphed: {name} is on {where}, expected a tensor on {DEVICE}")
        self._sample = {name: tensor.clone() for name, tensor in sample.items()}
        self._run: Any = torch.cuda.make_graphed_callables(
            _Loss(model, list(sample), loss).train(),
            tuple(self._sample.values()),
            allow_unused_input=True,
        )
        self._adapter.forget()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._captured = self._state()

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, from which ``backward()`` may be called once.

        Raises:
            TypeError, ValueError: `batch` has other tensors than the sample.
            RuntimeError: the model is no longer what was captured.
        """
        if batch.keys() != self._sample.keys():
            raise TypeError(f"graphed: batch has {[*batch]}, expected {[*self._sample]}")
        for name, like in self._sample.items():
            own = batch[name]
            if (own.shape, own.dtype, own.device) != (like.shape, like.dtype, like.device):
                raise ValueError(
                    f"graphed: {name} is {own.dtype} {tuple(own.shape)} on {own.device}, expected "
                    f"{like.dtype} {tuple(like.shape)} on {like.device}, as it was captured"
                )
        if self._state() != self._captured:
            raise RuntimeError(
                "graphed: the model has changed since it was captured (compacted, moved, merged, "
                "disabled, in evaluation mode, or other parameters are trained): call "
                "hal_kernels.graphed again"
            )
        # The graph writes gradients where it did before: those that are kept are put elsewhere.
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        self._adapter.notices.penalized = True  # with the loss
        loss: torch.Tensor = self._run(*(batch[name] for name in self._sample))
        self._adapter.replayed()
        return loss

    def _state(self) -> list[Any]:
        """What the graphs hold (addresses) and what the host decided, in far less than a walk
        through the model takes."""
        found: list[Any] = [self._adapter.disabled, self._adapter.layout]
        for module in self._modules:
            found += (module.training, *map(id, module._modules.values()))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.requires_grad)
        return found


def graphed(
    model: nn.Module,
    sample: Mapping[str, torch.Tensor],
    loss: Callable[[Any], torch.Tensor] = _loss_of,
) -> Graphed:
    """Capture forward and backward of a patched model as CUDA graphs, to train with.

        step = hal_kernels.graphed(model, batch)        # once
        step(**batch).backward()                        # instead of model(**batch).loss.backward()
        optimizer.step(); optimizer.zero_grad()         # as ever

    A replay runs no Python of the model. It computes what the model did when it was captured, with
    factors, masks and weights as they are now. Optimizer and rank allocation stay outside.
    Gradients may be accumulated; each loss needs its backward before the next is computed. Evaluate
    with the model itself.

    Args:
        model: patched without a hypernetwork, as it is by default, on one CUDA device, in training
            mode. Neither it nor what wraps it may wait for the device in a forward pass.
        sample: a batch: the model's keyword arguments, all tensors. Others must have their shapes.
        loss: of the model's output: a scalar. Its attribute or key "loss" by default.

    Returns:
        A function of a batch's tensors, by name, that returns its loss. It refuses batches of other
        shapes, and a model that has changed in what a graph can't follow (`Graphed.__call__`).

    Raises:
        TypeError, ValueError: what `factors` raises of `model`; a hypernetwork, evaluation mode, or
            anything that is on no CUDA device.
    """
    return Graphed(model, sample, loss)
