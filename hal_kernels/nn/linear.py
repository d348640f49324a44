"""Linear layers with an SVD adapter.

``y = xWᵀ + b + s·((dropout(x)P) ⊙ (Λ⊙mask)) Q``, so ΔW = s·Qᵀ diag(Λ⊙mask) Pᵀ.

A layer either owns its P, Λ, Q (`HALLinear.from_linear`) or belongs to a patched model, whose
`HyperAdapter` hands it views of the packed factors. `patch_model` changes the class of the existing
module, as torch.nn.utils.parametrize does: weights, hooks, names and references stay the same.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import nn

from ..ops._library import expect_number
from ..ops.svd_linear import layer_output, layer_penalty
from .adapter import HyperAdapter
from .packed import LayerFactors
from .shared_input import SharedInput
from .tensors import unit_rows


@dataclasses.dataclass(frozen=True)
class LayerSlot:
    """A layer's place in its model's adapter. (No Module attribute: no second owner.)"""

    adapter: HyperAdapter
    index: int
    original_class: type[nn.Module]
    shared_input: SharedInput | None = None

    def arguments(self, training: bool) -> tuple[LayerFactors, dict[str, Any]] | None:
        """((P, Λ_eff, Q), keyword arguments of the operators), or None while disabled."""
        adapter = self.adapter
        factors = adapter.layer_factors(self.index)
        if factors is None:
            return None
        dropout = adapter.config.dropout if training else 0.0
        scaling = adapter.scalings[self.index]
        return factors, {"scaling": scaling, "dropout": dropout, "tangent": adapter.tangent}


class AdaptedLayer(nn.Module):
    """What all adapted layers share: where their factors come from."""

    _hal: LayerSlot | None = None

    def adapter_arguments(self) -> tuple[LayerFactors, dict[str, Any]] | None:
        """What `LayerSlot.arguments` gives; a layer that stands alone has its own."""
        assert self._hal is not None
        return self._hal.arguments(self.training)

    def _arguments_of_call(self) -> tuple[LayerFactors, dict[str, Any]] | None:
        """The same for this layer's forward, which its adapter is told of."""
        if self._hal is not None:
            self._hal.adapter.note_call(self._hal.index)
        return self.adapter_arguments()


class HALLinear(AdaptedLayer, nn.Linear):
    """`torch.nn.Linear` with a frozen weight and an SVD adapter.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        rank: r, number of singular directions, 1 to min(in_features, out_features).
        alpha: scaling s = alpha / rank.
        dropout: on the adapter's input, in [0, 1).
        factor_dtype: of P, Λ, Q.

    Attributes (of a layer that stands alone):
        p ``[r, d_in]``, lam ``[r]`` (zeros at the start: the layer starts as the identity),
        q ``[r, d_out]``: parameters. mask ``[r]``: buffer, 1 keeps a direction and 0 prunes it.
        penalty: ‖PᵀP − I‖² + ‖QQᵀ − I‖² [eq. 7] of p and q as they are, a scalar to be added to the
            loss. On a GPU the kernels of the last forward in training have most of it ready. (A
            patched model's is `hal_kernels.penalty`.)

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    mask: torch.Tensor
    _grams: tuple[list[torch.Tensor], tuple[Any, ...]] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 3,
        alpha: float = 8.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        factor_dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._make_factors(rank, alpha, dropout, factor_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 3,
        *,
        alpha: float = 8.0,
        dropout: float = 0.0,
        factor_dtype: torch.dtype = torch.float32,
    ) -> "HALLinear":
        """An adapted layer around `linear`'s own weight and bias (shared, and frozen)."""
        if isinstance(linear, AdaptedLayer):
            raise ValueError("linear is adapted already")
        if adapted_class(linear) is not HALLinear:
            raise TypeError(
                f"linear is a {type(linear).__name__}, expected torch.nn.Linear itself (to what "
                "others return, hal_kernels.ops.svd_adapter_add adds the adapter)"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        layer._make_factors(rank, alpha, dropout, factor_dtype)
        return layer

    def _make_factors(
        self, rank: int, alpha: float, dropout: float, factor_dtype: torch.dtype
    ) -> None:
        narrowest = min(self.in_features, self.out_features)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank is {rank!r}, expected an int")
        if not 1 <= rank <= narrowest:
            raise ValueError(
                f"rank is {rank}, expected 1 to {narrowest} (the layer is "
                f"{self.in_features} -> {self.out_features})"
            )
        expect_number("alpha", alpha, above=0.0)
        expect_number("dropout", dropout, least=0.0, below=1.0)
        if not isinstance(factor_dtype, torch.dtype):
            raise TypeError(f"factor_dtype is {factor_dtype!r}, expected a torch.dtype")
        if not factor_dtype.is_floating_point:
            raise ValueError(f"factor_dtype is {factor_dtype}, expected a floating-point dtype")
        device = self.weight.device
        self.scaling, self.dropout = alpha / rank, dropout
        self.p = nn.Parameter(unit_rows(rank, self.in_features, factor_dtype).to(device))
        self.lam = nn.Parameter(torch.zeros(rank, dtype=factor_dtype, device=device))
        self.q = nn.Parameter(unit_rows(rank, self.out_features, factor_dtype).to(device))
        self.register_buffer("mask", torch.ones(rank, dtype=factor_dtype, device=device))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def adapter_arguments(self) -> tuple[LayerFactors, dict[str, Any]] | None:
        if self._hal is not None:
            return self._hal.arguments(self.training)
        own: dict[str, Any] = self._parameters  # a module's attributes take three look-ups each
        return (own["p"], own["lam"], own["q"]), {
            "scaling": self.scaling,
            "dropout": self.dropout if self.training else 0.0,
            "tangent": 0.0,
            "mask": self._buffers["mask"],
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = self._arguments_of_call()
        if found is None:
            return super().forward(input)
        factors, options = found
        slot = self._hal
        if slot is not None and slot.shared_input is not None and slot.adapter.in_pass:
            y = slot.shared_input.output(self, input, factors, **options)
            if y is not None:
                return y
        if slot is None and self.training and input.is_cuda and not torch.compiler.is_compiling():
            grams: list[torch.Tensor] = []
            y = layer_output(input, self.weight, self.bias, *factors, **options, grams=grams)
            self._grams = grams, self._versions()
            return y
        return layer_output(input, self.weight, self.bias, *factors, **options)

    @property
    def penalty(self) -> torch.Tensor:
        if self._hal is not None:
            raise RuntimeError("a patched model has one penalty: hal_kernels.penalty(model)")
        grams, versions = self._grams or ([], None)
        return layer_penalty(self.p, self.q, grams if versions == self._versions() else [])

    def _versions(self) -> tuple[Any, ...]:
        """What changes with P and Q."""
        return tuple((id(t), t.data_ptr(), t._version) for t in (self.p, self.q))

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n != "_grams"}

    def extra_repr(self) -> str:
        rank = self.p.shape[0] if self._hal is None else _rank_in(self._hal)
        return f"{super().extra_repr()}, rank={rank}"


class _MadeClass(AdaptedLayer):
    """A layer whose class is made by `_adapted_class`: pickled as what that is made of."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        assert self._hal is not None
        mixin = _Conv1DForward if isinstance(self, _Conv1DForward) else _ForeignForward
        return _new_layer, (mixin, self._hal.original_class), self.__dict__.copy()


class _Conv1DForward(_MadeClass):
    """transformers' Conv1D (weight ``[d_in, d_out]``): the same operator on the transposed view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self._arguments_of_call()
        if found is None:
            return super().forward(x)
        factors, options = found
        return layer_output(x, self.weight.t(), self.bias, *factors, **options)  # type: ignore[operator, arg-type]


class _ForeignForward(_MadeClass):
    """Any other linear layer (quantized, subclassed): its own forward, then the adapter added."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(x, *args, **kwargs)
        found = self._arguments_of_call()
        if found is None:
            return y
        factors, options = found
        return layer_output(x, None, y, *factors, **options)


@functools.cache
def _adapted_class(mixin: Any, base: Any) -> type[nn.Module]:
    return type(f"HAL{base.__name__}", (mixin, base), {"__module__": __name__})


def _new_layer(mixin: Any, base: Any) -> nn.Module:
    made = _adapted_class(mixin, base)
    return made.__new__(made)


def adapted_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that adapts `layer` when it becomes its class; None if it can't be adapted."""
    kind = type(layer)
    if isinstance(layer, AdaptedLayer):
        return None
    if is_conv1d(layer):
        return _adapted_class(_Conv1DForward, cast(Hashable, kind))
    if not isinstance(layer, nn.Linear):
        return None
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight and never calls it
    if kind is nn.Linear and type(layer.weight.data) is torch.Tensor:
        return HALLinear
    return _adapted_class(_ForeignForward, cast(Hashable, kind))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is transformers' Conv1D (which is not imported for it)."""
    slot = getattr(layer, "_hal", None)
    kind = type(layer) if slot is None else slot.original_class
    return kind.__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "weight")


def is_foreign(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, keeps a forward of its own (quantized or subclassed)."""
    kind = type(layer) if isinstance(layer, AdaptedLayer) else adapted_class(layer)
    return kind is not None and issubclass(kind, _ForeignForward)


def linear_widths(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a layer that is adapted, or that `adapted_class` accepts."""
    if is_conv1d(layer):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0], weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _rank_in(slot: LayerSlot) -> int:
    return slot.adapter.layout.ranks[slot.index]
