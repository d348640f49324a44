"""The tiles of an architecture by name, and what each of their fields may be."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hal_kernels.kernels.configs import Architecture, Tile

# Fields of a tile; those that are zero in the shipped tile are not used by its kernel.
LIMITS = {
    "rows": (16, 256),
    "columns": (16, 512),
    "depth": (16, 256),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
}
HALVED = ("columns", "depth")


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
