"""Imports point one way: to what hal_kernels shows, and inside it towards the kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "hal_kernels").rglob("*.py"))
SHOWN = {"hal_kernels", "hal_kernels.ops", "hal_kernels.integration"}
ABOVE = {  # who may not be imported
    "hal_kernels": {"hal_peft", "hal_finetune", "examples", "bench", "tools"},
    "python/hal_peft": {"hal_finetune", "examples", "bench", "tools"},
    "python/hal_finetune": {"examples", "bench", "tools"},
    "examples": {"bench", "tools"},
}


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def nodes_of(tree):
    """Everything in `tree`, functions' bodies too, but what only a type checker reads."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from nodes_of(child)


def imports_of(file, known):
    """The modules of `known` that a file imports."""
    package = name_of(file) if file.stem == "__init__" else name_of(file).rpartition(".")[0]
    found = set()
    for node in nodes_of(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                part = f"{base}.{alias.name}"
                found.add(part if part in known else base)
    return (found & known) - {name_of(file)}


def reached_from(start, graph):
    """The modules that `start` imports, and those that these import, and so on."""
    reached, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - reached
        reached |= new
        todo += new
    return reached


def circles_of(graph):
    """Sets of modules that reach one another."""
    reach = {module: reached_from(module, graph) for module in graph}
    return {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}


def test_no_circles():
    known = {name_of(file) for file in FILES}
    graph = {name_of(file): imports_of(file, known) for file in FILES}
    assert "hal_kernels.nn.adapter" in graph["hal_kernels.patching"]  # the reading itself works
    assert "hal_kernels.ops.spectral_step.triton" in graph["hal_kernels.ops.spectral_step"]
    assert not circles_of(graph)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles_of(graph) == {frozenset("bc"), frozenset("e")}


def imported(folder):
    """(file, module) of every absolute import below a folder, at the top of a file or inside."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield path, str(node.module)


@pytest.mark.parametrize("folder", ABOVE)
def test_imports_point_one_way(folder):
    found = list(imported(folder))
    assert found
    for path, module in found:
        assert module.partition(".")[0] not in ABOVE[folder], f"{path} imports {module}"


@pytest.mark.parametrize("folder", ["python", "examples"])
def test_nothing_inside_hal_kernels_is_imported(folder):
    for path, module in imported(folder):
        inside = module.startswith("hal_kernels.") and module not in SHOWN
        assert not inside, f"{path} imports {module}"
