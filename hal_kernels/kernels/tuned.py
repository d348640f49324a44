"""What `python -m hal_kernels.tune` measured on this very GPU, in place of the shipped numbers.

It is read once, when a kernel is first launched on a GPU, from the file $HAL_KERNELS_TUNED names or
else from ``~/.cache/hal_kernels/tuned-<device>-<version>.json`` (``$XDG_CACHE_HOME`` in place of
``~/.cache`` where it is set); with HAL_KERNELS_TUNED set to nothing, from nowhere. A file that is
not whole and right for this GPU and this version is left alone, with one warning:

    {"version": "0.1.0", "device": "NVIDIA H100", "architecture": "sm_90",
     "gpu": {"bandwidth": 2.6e6, ...},
     "tiles": {"svd.16.shrink": {"rows": 64, "columns": 128, "num_warps": 4, ...}, ...}}

Both tables may name any part of what there is.
"""

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configs import Architecture, Tile

VARIABLE = "HAL_KERNELS_TUNED"
# Of a tile's fields; those that are zero in the shipped tile are not used by its kernel.
LIMITS = {
    "rows": (16, 256),
    "columns": (16, 512),
    "depth": (16, 256),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
}
HALVED = ("columns", "depth")
# What else of an architecture is measured, and its type.
RATES = {
    "multiprocessors": int,
    "bandwidth": float,
    "matrix_rate": float,
    "launch_us": float,
    "gemm_slowdown": float,
    "prepare": bool,
}


def tiles_of(gpu: Architecture) -> dict[str, Tile]:
    """Every tile that can be tuned, by name: "svd.16.shrink", "svd.16.fused.0", and so on."""
    tiles: dict[str, Tile] = {}
    groups: dict[str, Any] = {f"svd.{rank}": group for rank, group in gpu.svd.items()}
    groups |= {f"penalty.{rank}": group for rank, group in gpu.penalty.items()}
    for name, group in groups.items():
        for field in dataclasses.fields(group):
            found = getattr(group, field.name)
            if isinstance(found, Tile):
                tiles[f"{name}.{field.name}"] = found
            else:
                tiles |= {f"{name}.{field.name}.{i}": tile for i, tile in enumerate(found)}
    return tiles


def with_tiles(gpu: Architecture, tiles: Mapping[str, Tile]) -> Architecture:
    """`gpu` with some of its tiles replaced; names as in `tiles_of`."""

    def changed(name: str, group: Any) -> Any:
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(group):
            path, found = f"{name}.{field.name}", getattr(group, field.name)
            if isinstance(found, Tile):
                fields[field.name] = tiles.get(path, found)
            else:
                fields[field.name] = tuple(tiles.get(f"{path}.{i}", t) for i, t in enumerate(found))
        return dataclasses.replace(group, **fields)

    return dataclasses.replace(
        gpu,
        svd={rank: changed(f"svd.{rank}", group) for rank, group in gpu.svd.items()},
        penalty={rank: changed(f"penalty.{rank}", group) for rank, group in gpu.penalty.items()},
    )


def free_fields(name: str, tile: Tile) -> list[str]:
    """The fields of a tile that its kernel leaves open."""
    fixed = {"rows"} if name.startswith("penalty.") else set()  # those are the class of ranks
    return [n for n in LIMITS if getattr(tile, n) and n not in fixed]


def limits(name: str, field: str) -> tuple[int, int]:
    """The least and the most that a field of a tile may be."""
    least, most = LIMITS[field]
    # The SVD adapter's columns are of 16 bits: half as many of 32 bits still have to fill a dot.
    return (2 * least if name.startswith("svd.") and field in HALVED else least), most


def path_of(device: str) -> Path | None:
    """The file for a GPU of this name; None where none is to be read."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hal_kernels"
    return folder / f"tuned-{re.sub('[^A-Za-z0-9]+', '-', device)}-{_version()}.json"


def apply_tuned(gpu: Architecture, device: str) -> Architecture:
    """`gpu` with what was measured on it; as it is if nothing was, or nothing that can be used."""
    path = path_of(device)
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return gpu
    return load_or_warn(path, gpu, device)


def load_or_warn(path: Path, gpu: Architecture, device: str) -> Architecture:
    """`load`, or `gpu` as it is and a warning that says why."""
    try:
        return load(path, gpu, device)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(
            f"hal_kernels: {path} is not used: {reason}; the shipped tiles are "
            "(python -m hal_kernels.tune writes a new file)",
            stacklevel=3,
        )
        return gpu


def save(
    path: Path,
    gpu: Architecture,
    device: str,
    tiles: Mapping[str, Tile],
    rates: Mapping[str, float | bool],
) -> None:
    """Write a file that `load` reads: all of it or none."""
    content = {
        "version": _version(),
        "device": device,
        "architecture": gpu.name,
        "gpu": dict(rates),
        "tiles": {name: dataclasses.asdict(tile) for name, tile in tiles.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def load(path: Path, gpu: Architecture, device: str) -> Architecture:
    """`gpu` with what the file says. Raises ValueError, naming what came and what was expected."""
    content = json.loads(path.read_bytes())
    _expect_table("the file", content, ("version", "device", "architecture", "gpu", "tiles"))
    expected = {"version": _version(), "device": device, "architecture": gpu.name}
    for name, value in expected.items():
        if content.get(name) != value:
            raise ValueError(f"{name} is {content.get(name)!r}, expected {value!r}")
    rates = _expect_table("gpu", content.get("gpu", {}), RATES)
    for name, value in rates.items():
        _expect_rate(name, value)
    shipped = tiles_of(gpu)
    tiles = {
        name: _expect_tile(name, values, shipped[name])
        for name, values in _expect_table("tiles", content.get("tiles", {}), shipped).items()
    }
    return dataclasses.replace(with_tiles(gpu, tiles), **rates)


def _expect_table(name: str, table: Any, known: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f"{name} is a {type(table).__name__}, expected a table")
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"{name} has {unknown[0]!r}, expected some of {list(known)}")
    return table


def _expect_rate(name: str, value: Any) -> None:
    kind = RATES[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"gpu.{name} is {value!r}, expected true or false")
    if kind is not bool and not (number and math.isfinite(value) and value > 0):
        raise ValueError(f"gpu.{name} is {value!r}, expected a number above zero")
    if kind is int and not isinstance(value, int):
        raise ValueError(f"gpu.{name} is {value!r}, expected a whole number")


def _expect_tile(name: str, values: Any, shipped: Tile) -> Tile:
    fields = [field.name for field in dataclasses.fields(Tile)]
    _expect_table(f"tiles.{name}", values, fields)
    free = free_fields(name, shipped)
    for field in fields:
        value, where = values.get(field), f"tiles.{name}.{field}"
        if field not in free:
            if value != getattr(shipped, field):
                raise ValueError(f"{where} is {value!r}, expected {getattr(shipped, field)}")
            continue
        least, most = limits(name, field)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{where} is {value!r}, expected an integer from {least} to {most}")
        if field != "num_stages" and value & (value - 1):
            raise ValueError(f"{where} is {value}, expected a power of two")
    return Tile(**values)


def _version() -> str:
    from .. import __version__

    return __version__
