"""An adapter's tensors by layer, as a checkpoint holds them, and packed, as the adapter does.

A checkpoint names each layer's rows, ``base_model.model.<layer>.hal_p`` and so on, so that it does
not depend on the order of layers and shows its ranks itself. What belongs to no layer (the
hypernetworks, the progress) is ``base_model.hal_adapter.<name>``.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hal_kernels.integration import (
    LATER,
    HyperAdapter,
    Layout,
    expect_finite,
    expect_mask,
    expect_tensors,
    replace_data,
    saved_steps,
    without_offsets,
    without_sketches,
)

LAYERS = "base_model.model."
REST = "base_model.hal_adapter."
FAMILIES = ("", "anchor_", "importance_", "uncertainty_", "momentum_")
BY_DIRECTION = {"mask": "mask", "hypernet.lam_embedding": "embedding"}
"""Packed names of tensors with one row per direction, beside the factors; and their short names."""

PROGRESS = f"{REST}progress"
"""The adapter's extra state: the step counter."""

State = dict[str, torch.Tensor]


def by_layer(layout: Layout, packed: Mapping[str, torch.Tensor]) -> State:
    """A checkpoint's tensors, from an adapter's state dict."""
    rest, state = dict(packed), {}
    for key, short, layers in _rows(layout):
        if key in rest:
            parts = rest.pop(key).split([layout.ranks[i] for i in layers])
            for index, part in zip(layers, parts, strict=True):
                state[f"{LAYERS}{layout.layers[index].name}.hal_{short}"] = part.clone()
    return state | {f"{REST}{_file_name(key)}": value for key, value in rest.items()}


def packed(adapter: HyperAdapter, state: Mapping[str, torch.Tensor]) -> tuple[Layout, State]:
    """(layout, state dict) of a checkpoint's tensors, for `adapter`; its ranks are the file's.

    Args:
        state: the adapter's tensors alone, as `by_layer` names them.

    Raises:
        ValueError: tensors are missing, left over, of another width or dtype, or hold what no
            adapter holds. Nothing was changed.
    """
    layout, own = adapter.layout, adapter.state_dict()
    later = {f"{REST}{key}": torch.zeros_like(own[key]) for key in LATER if key in own}
    state = later | without_offsets(state)
    if PROGRESS in state:
        state[PROGRESS] = without_sketches(state[PROGRESS])
    expected = by_layer(layout, own)
    if expected.keys() != state.keys():
        raise ValueError(
            "the checkpoint does not fit the adapter: it lacks "
            f"{_some(expected.keys() - state.keys())} and also has "
            f"{_some(state.keys() - expected.keys())}"
        )
    ranks = {}
    for spec in layout.layers:
        name = f"{LAYERS}{spec.name}.hal_lam"
        lam, narrowest = state[name], min(spec.d_in, spec.d_out)
        if lam.dim() != 1 or len(lam) > narrowest:
            raise ValueError(
                f"the checkpoint's {name} has shape {tuple(lam.shape)}, expected at most "
                f"{narrowest} numbers (the layer's narrowest side)"
            )
        ranks[f"{LAYERS}{spec.name}"] = len(lam)
    if not any(ranks.values()):
        raise ValueError("the checkpoint has no direction in any layer")
    loaded = layout.with_ranks(list(ranks.values()))
    for key, value in expected.items():
        layer = key.rpartition(".hal_")[0]
        if layer in ranks:
            expected[key] = value.new_empty(ranks[layer], *value.shape[1:])
    expect_tensors(expected, state, "the adapter")
    factors = {key: value for key, value in state.items() if key != PROGRESS}
    expect_finite(factors, "the adapter")
    for key, value in factors.items():
        if key.endswith(".hal_mask"):
            expect_mask(value, key)
    try:
        saved_steps(state[PROGRESS])
    except ValueError as error:
        raise ValueError(f"the checkpoint's {PROGRESS} does not fit: {error}") from None
    layout = loaded
    result = {key: state[f"{REST}{_file_name(key)}"] for key in own if _is_rest(layout, key)}
    for key, short, layers in _rows(layout):
        if key in own:
            names = [f"{LAYERS}{layout.layers[i].name}.hal_{short}" for i in layers]
            result[key] = torch.cat([state[name] for name in names])
    return layout, result


def resize(adapter: HyperAdapter, layout: Layout) -> None:
    """Give the adapter the layout of what is about to be loaded, if it has another."""
    if layout.ranks == adapter.layout.ranks:
        return
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    for key, _, layers in _rows(layout):
        if key in tensors:
            old = tensors[key].data
            rows = sum(layout.ranks[i] for i in layers)
            replace_data(tensors[key], old.new_zeros(rows, *old.shape[1:]))
    adapter.set_layout(layout)


def _rows(layout: Layout) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the state dict, short name, layers in the order of its rows) of packed tensors."""
    everyone = tuple(range(len(layout.layers)))
    for family in FAMILIES:
        for side, groups in (("p", layout.p.groups), ("q", layout.q.groups)):
            for group in groups:
                yield f"{family}{side}_{group.width}", f"{family}{side}", group.layers
        yield f"{family}lam", f"{family}lam", everyone
    for key, short in BY_DIRECTION.items():
        yield key, short, everyone


def _is_rest(layout: Layout, key: str) -> bool:
    return all(key != name for name, _, _ in _rows(layout))


def _file_name(key: str) -> str:
    return PROGRESS.removeprefix(REST) if key == "_extra_state" else key


def expect_others(model: nn.Module, others: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless a checkpoint's other tensors, of modules trained in full, fit."""
    own: State = model.state_dict()
    names = {key: key if key in own else key.removeprefix(LAYERS) for key in others}
    fitting = {key: own[name] for key, name in names.items() if name in own}
    expect_tensors(fitting, others, "the modules trained in full")
    expect_finite(others, "the modules trained in full", or_inf=True)


def _some(keys: set[str]) -> str:
    shown = sorted(keys)
    return f"{shown[:4]}" + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
