"""Sibling layers that read one input: an attention's q, k and v, a gated MLP's two projections.

The first of them to be called computes all their outputs with `svd_linear_group`, one pass over x
forward and one gradient of x backward; the others find theirs waiting. Which layers those are is
guessed from their names when a model is patched, so each call verifies the guess: an output is
handed out only for the very tensor it was computed from, unchanged since, with the same weights,
factors and modes. Any other call is computed alone, as if there were no group.

A group whose outputs were left over (a cross-attention's, say) is given up, but not before the next
optimizer step: until then activation checkpointing may run a layer again, and has to see the same
tensors saved.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.svd_linear import group_outputs
from .packed import LayerFactors
from .threads import PerThread


class Adapted(Protocol):
    """A linear layer that `svd_linear` computes: `HALLinear`, or what wraps an nn.Linear."""

    in_features: int
    out_features: int

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    def adapter_arguments(self) -> tuple[LayerFactors, dict[str, Any]] | None: ...


NAMES = (
    ("query", "key", "value"),  # BERT, ViT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q_proj", "k_proj", "v_proj"),  # Llama and most decoders
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q", "k", "v"),  # T5
    ("gate_proj", "up_proj"),  # Llama
    ("w1", "w3"),  # Mixtral
    ("wi_0", "wi_1"),  # T5 v1.1
)
"""Children of one module that read one input in the models people fine-tune, in calling order."""


class _Waiting:
    """Outputs computed for layers that are yet to be called, and what they were computed from."""

    def __init__(self, x: torch.Tensor, outputs: dict[int, torch.Tensor], keys: list[Any]) -> None:
        self.x, self.version, self.modes = x, x._version, _modes(x)
        self.outputs, self.keys = outputs, keys

    def take(self, index: int, x: torch.Tensor, key: Any) -> torch.Tensor | None:
        """The output of layer `index` for `x`; None unless everything is as it was."""
        if (
            x is self.x
            and x._version == self.version
            and index in self.outputs
            and _same(key, self.keys[index])
            and _modes(x) == self.modes
        ):
            return self.outputs.pop(index)
        return None

    @property
    def left_over(self) -> bool:
        """Whether outputs were not asked for; not so if weights or factors have changed since."""
        tensors = itertools.chain.from_iterable(self.keys)
        return bool(self.outputs) and all(version == _version(t) for t, version in tensors)


class _Call:
    """The call of a group under way in a thread."""

    def __init__(self) -> None:
        self.waiting: _Waiting | None = None


class SharedInput:
    """A group of layers, and the outputs of one call of it."""

    def __init__(self, layers: Sequence[Adapted]) -> None:
        self.layers = tuple(layers)
        self.given_up = False
        self._left_over = False
        self._calls = PerThread(_Call)

    def output(
        self,
        layer: Adapted,
        x: torch.Tensor,
        factors: LayerFactors,
        scaling: float,
        dropout: float,
        tangent: float,
    ) -> torch.Tensor | None:
        """`layer`'s output for `x`; None where it is to be computed alone.

        With dropout it always is: each layer masks x differently.
        """
        if self.given_up or dropout > 0.0 or layer not in self.layers or not _shows_changes(x):
            return None
        index = self.layers.index(layer)
        if index == 0:
            self._drop()
            return self._compute(x, factors, scaling, tangent)
        waiting = self._calls.mine.waiting
        return None if waiting is None else waiting.take(index, x, _key(layer, factors))

    def _compute(
        self, x: torch.Tensor, factors: LayerFactors, scaling: float, tangent: float
    ) -> torch.Tensor | None:
        """All outputs; the first layer's is returned, the others wait."""
        leader, every = self.layers[0], [factors]
        for layer in self.layers[1:]:
            found = layer.adapter_arguments()
            if found is None or found[1]["scaling"] != scaling or not _ready(layer, leader):
                return None
            every.append(found[0])
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        p, lam, q = (list(part) for part in zip(*every, strict=True))
        outputs = group_outputs(x, weights, biases, p, lam, q, scaling, tangent)
        first, *others = outputs
        keys = [_key(layer, own) for layer, own in zip(self.layers, every, strict=True)]
        self._calls.mine.waiting = _Waiting(x, dict(enumerate(others, start=1)), keys)
        return first

    def _drop(self) -> None:
        call = self._calls.mine
        waiting, call.waiting = call.waiting, None
        if waiting is not None and waiting.left_over:
            self._left_over = True

    def begin_step(self) -> None:
        """No pass is under way, and no graph alive that may have to be made again."""
        if self._left_over and not self.given_up:
            self.given_up = True
            self._calls = PerThread(_Call)  # outputs may be left in autograd's threads, too

    def close(self, *, failed: bool) -> None:
        """A forward pass of the model has ended, or failed: let go of what is left of it."""
        if failed:
            self._calls.mine.waiting = None
        self._drop()


def find_groups(model: nn.Module, layers: Iterable[Adapted]) -> list[list[Adapted]]:
    """Those of `layers` that are siblings by the names of `NAMES`, with inputs of one width."""
    known = {id(layer): layer for layer in layers}
    groups = []
    for parent, names in itertools.product(model.modules(), NAMES):
        children = (id(parent._modules.get(name)) for name in names)
        found = [known[c] for c in children if c in known]
        if len(found) > 1 and len({layer.in_features for layer in found}) == 1:
            for layer in found:  # a module shared by two parents has one place
                del known[id(layer)]
            groups.append(found)
    return groups


def _shows_changes(x: torch.Tensor) -> bool:
    """Whether a change of `x` would show: inference tensors and traced ones keep no version."""
    return not torch.compiler.is_compiling() and not x.is_inference()


def _ready(layer: Adapted, leader: Adapted) -> bool:
    """Whether `layer` could be called now: weights may be offloaded or sharded until they are."""
    own, other = layer.weight, leader.weight
    shape = (layer.out_features, layer.in_features)
    return own.device == other.device and own.dtype == other.dtype and own.shape == shape


def _key(layer: Adapted, factors: LayerFactors) -> tuple[Any, ...]:
    """What an output depends on beside x: tensors, and how often each was written to."""
    tensors = [layer.weight, layer.bias, *factors]
    return tuple([(t, _version(t)) for t in tensors if t is not None])


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        a is b and v == w for (a, v), (b, w) in zip(one, other, strict=True)
    )


def _modes(x: torch.Tensor) -> tuple[Any, ...]:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), autocast and torch.get_autocast_dtype(device)
