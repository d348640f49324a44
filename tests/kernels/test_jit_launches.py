"""What launches would compile, seen by Triton itself: see `jit_launches`.

A process of its own: here kernels are interpreted, which knows no types of arguments.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def variants(*arguments, program="jit_launches.py"):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    done = subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_number_of_rows_compiles_anything_anew():
    """Twelve of them: the variants are those of one, by how many partial sums there are."""
    found = variants("rows")
    for name in ("shrink_kernel", "gradients_dy_kernel"):
        assert found.pop(name) == 1, name
    # "prepare" and "add" differ; each with 1, 2, 4, 8 or 16 parts of h or u.
    for name in ("expand_kernel", "gradients_x_kernel"):
        assert found.pop(name) <= 10, name
    assert found.pop("reduce_kernel") <= 3  # all three gradients are partial, or fewer
    assert found.pop("fused_kernel") <= 3  # its tiles for few rows and for many
    assert found == {}


def test_no_rank_of_a_class_compiles_anything_anew():
    """Pruned models have layers of every rank."""
    found = variants("ranks")
    assert found.pop("reduce_kernel") <= 4  # the size of dΛ may be 1 or 16, and so on
    assert found.pop("fused_kernel") <= 3
    assert all(count <= 2 for count in found.values()), found


@pytest.mark.slow
def test_launches_of_odd_sizes_compile():
    """Numbers that are 1 are constants in a kernel, which the interpreter never shows."""
    found = variants("odd", "--compile")
    assert found.keys() == {
        "shrink_kernel", "expand_kernel", "fused_kernel", "gradients_dy_kernel",
        "gradients_x_kernel", "reduce_kernel", "residual_kernel", "sum_kernel", "gradient_kernel",
        "gram_kernel", "solve_kernel", "write_kernel",
    }  # fmt: skip
    assert sum(found.values()) > 30


def test_kept_launches_are_those_that_triton_would_make():
    """Of the same kernel, grid, stream and arguments; from the second of a kind on, directly."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    found = variants(program="kept_launches.py")
    assert found["other"] == 0
    assert found["hooked"] == found["told"] > 0
    if (3, 5) <= version <= (3, 7):
        assert found["direct"] > found["launches"] / 2
    else:
        assert found["direct"] == 0
