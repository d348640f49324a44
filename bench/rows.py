"""Rows of results as they are read, and the Markdown that they become."""

import json
from typing import Any

from .common import RESULTS, stored

Row = dict[str, Any]


def rows(name: str, **wanted: Any) -> list[Row]:
    """Rows of ``<name>.jsonl`` with these fields, oldest first; those of --quick do not count."""
    found = stored(name, RESULTS, wanted)
    return [row for row in found if "--quick" not in row["machine"]["command"].split()]


def newest(name: str, **wanted: Any) -> Row:
    found = rows(name, **wanted)
    if not found:
        raise SystemExit(f"bench/results/{name}.jsonl has no row with {wanted}")
    return found[-1]


def newest_each(found: list[Row], *fields: str) -> list[Row]:
    """The newest row for each value of these fields, in order of first appearance."""
    kept = {tuple(json.dumps(row.get(f)) for f in fields): row for row in found}
    return list(kept.values())


def groups(found: list[Row], *fields: str) -> list[list[Row]]:
    """Rows that agree in these fields, in order of first appearance."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        together.setdefault(tuple(json.dumps(row.get(f)) for f in fields), []).append(row)
    return list(together.values())


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(row: Row) -> str:
    """Where and when a row was measured, for the line under its table."""
    machine = row["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"\n{machine['time'][:10]}, {device}, torch {machine['torch']}, peft {machine['peft']}, "
        f"commit {machine['commit'][:9]}: `{machine['command']}`\n"
    )
