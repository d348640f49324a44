"""An adapter's tensors by layer, as a checkpoint holds them, and packed, as the adapter does.

A checkpoint names each layer's rows, ``base_model.model.<layer>.hal_p`` and so on, so that it does
not depend on the order of layers and shows its ranks itself. What belongs to no layer (the
hypernetworks, the progress) is ``base_model.hal_adapter.<name>``.
"""

from collections.abc import Iterator, Mapping

import torch

from hal_kernels.nn.adapter import HyperAdapter
from hal_kernels.nn.alignment import extra_state_sizes
from hal_kernels.nn.layout import Layout
from hal_kernels.nn.tensors import replace_data

LAYERS = "base_model.model."
REST = "base_model.hal_adapter."
FAMILIES = ("", "anchor_", "offset_", "importance_", "uncertainty_", "momentum_")
BY_DIRECTION = {"mask": "mask", "hypernet.lam_embedding": "embedding"}
"""Packed names of tensors with one row per direction, beside the factors; and their short names."""

PROGRESS = f"{REST}progress"
"""The adapter's extra state: the step counter and, in the first steps, the sketches."""

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
        ValueError: tensors are missing, left over, or of another width. Nothing was changed.
    """
    layout, own = adapter.layout, adapter.state_dict()
    expected = by_layer(layout, own)
    if expected.keys() != state.keys():
        raise ValueError(
            "the checkpoint does not fit the adapter: it lacks "
            f"{_some(expected.keys() - state.keys())} and also has "
            f"{_some(state.keys() - expected.keys())}"
        )
    ranks = [len(state[f"{LAYERS}{spec.name}.hal_lam"]) for spec in layout.layers]
    loaded = layout.with_ranks(ranks)
    expected[PROGRESS] = torch.empty(_progress_size(adapter, loaded, state[PROGRESS]))
    for key, tensor in state.items():
        index = next(
            (i for i, s in enumerate(layout.layers) if key.startswith(f"{LAYERS}{s.name}.hal_")),
            None,
        )
        rows = () if index is None else (ranks[index],)
        shape = (*rows, *expected[key].shape[len(rows) :])
        if tensor.shape != shape:
            raise ValueError(
                f"the checkpoint's {key} has shape {tuple(tensor.shape)}, expected {shape}"
            )
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


def _progress_size(adapter: HyperAdapter, layout: Layout, progress: torch.Tensor) -> int:
    """How many numbers the extra state should hold at the step that it says."""
    steps = int(progress[0]) if progress.numel() else 0
    sizes = extra_state_sizes(adapter.config, layout, steps)
    return progress.numel() if progress.numel() in sizes else sizes[-1]


def _some(keys: set[str]) -> str:
    shown = sorted(keys)
    return f"{shown[:4]}" + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
