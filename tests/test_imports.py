"""Which way imports point: towards hal_kernels, and there to what it shows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOWN = {"hal_kernels", "hal_kernels.ops", "hal_kernels.integration"}
ABOVE = {  # who may not be imported
    "hal_kernels": {"hal_peft", "hal_finetune", "examples", "bench"},
    "python/hal_peft": {"hal_finetune", "examples", "bench"},
    "python/hal_finetune": {"examples", "bench"},
    "examples": {"bench"},
}


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
