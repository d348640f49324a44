"""What every kernel costs on every GPU that has a configuration, without such a GPU.

    python -m tools.report [--quick] [--arch sm_90 ...] [--kernel NAME] [--jobs N]

compiles every kernel × every shipped configuration ahead of time and prints registers a thread,
spilled bytes, shared memory and how many blocks a multiprocessor holds; of SASS, asynchronous
copies and instructions of each innermost loop that has copies; and for the SVD kernels the least
time of their traffic and a model's (`tools.model`), neither of them measured. The exit status is 1
if a kernel does not compile, spills, needs more shared memory than a block may have, does not load
ahead where it is to, or leaves one block to a multiprocessor where two are wanted. ``--quick``
takes four architectures and one configuration of each kernel on each of them, another one on each.

`tools.kernel_cases` lists what is compiled. "default", what an unknown GPU takes, is compiled for
sm_80 within the 64 KiB that every GPU has.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from . import model
from .cases import Case
from .kernel_cases import CASES
from .sass import Loop, loops_of


class Target(NamedTuple):
    """What a GPU of one architecture is to the compiler, and what it holds."""

    backend: str
    arch: int | str
    block_shared: int  # bytes a block may ask for
    shared: int  # bytes of one multiprocessor
    warps: int = 64  # resident on one multiprocessor
    blocks: int = 32
    reserved: int = 1024  # bytes of shared memory that the system takes for every block
    warp: int = 32  # threads
    registers: int = 65536  # per multiprocessor: a thread's, times its threads


TARGETS = {
    "default": Target("cuda", 80, 65536, 167936),
    "sm_80": Target("cuda", 80, 166912, 167936),
    "sm_89": Target("cuda", 89, 101376, 102400, warps=48, blocks=24),
    "sm_90": Target("cuda", 90, 232448, 233472),
    "sm_100": Target("cuda", 100, 232448, 233472),
    "gfx942": Target(
        "hip", "gfx942", 65536, 65536, warps=32, reserved=0, warp=64, registers=4 * 512 * 64
    ),
}

QUICK = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case came to on one architecture."""

    arch: str
    kernel: str
    label: str
    options: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    blocks: int = 0  # that a multiprocessor holds
    occupancy: float = 0.0
    loops: tuple[Loop, ...] = ()  # those that load ahead
    least: tuple[int, int] = (0, 0)  # of them and of blocks
    floor: float = 0.0
    model: float = 0.0
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        limit = TARGETS[self.arch].block_shared
        if self.shared > limit:
            return f"shared memory above {limit}"
        if self.spills:
            return "spills"
        if len(self.loops) < self.least[0]:
            return f"{len(self.loops)} of {self.least[0]} loops load ahead"
        return f"fewer than {self.least[1]} blocks" if self.blocks < self.least[1] else ""


def measure(module: str, index: int) -> Row:
    """Compile one case, by its place in the list of `module`."""
    case = list(CASES[module]())[index]
    row = _started(module, case)
    target = TARGETS[case.architecture]
    try:
        compiled = _compile(case, target)
        registers, spills = (_ptxas if target.backend == "cuda" else _amdgcn)(compiled)
    except Exception as error:  # the compiler's own, of many types: one more row of the report
        lines = str(error).strip().splitlines() or [""]
        return dataclasses.replace(row, error=f"{type(error).__name__}: {lines[-1]}")
    shared = compiled.metadata.shared
    warps = case.config["num_warps"]
    occupancy = _occupancy(target, registers, shared, warps)
    blocks = round(occupancy * target.warps / warps)
    found: dict[str, Any] = {}
    if target.backend == "cuda":
        loops = loops_of(compiled.asm["cubin"])
        found["loops"] = tuple(loop for loop in loops if loop.copies)
        found["least"] = model.ahead(case), _least_blocks(case)
        found["floor"], found["model"] = model.times(case, loops, blocks) or (0.0, 0.0)
    return dataclasses.replace(
        row,
        registers=registers,
        spills=spills,
        shared=shared,
        blocks=blocks,
        occupancy=occupancy,
        **found,
    )


def _least_blocks(case: Case) -> int:
    """Two where a kernel of the lowest ranks streams 16-bit rows; dropout and penalty cost more."""
    c = case.constexprs
    plain = "p_seed" not in case.signature and c.get("GRAM") is None and c.get("PARTS", 1) <= 4
    streams = model.ahead(case) > 0 and c["R"] <= 16 and "*bf16" in case.signature.values()
    return 2 if plain and streams and case.architecture in ("sm_90", "sm_100") else 1


def _started(module: str, case: Case) -> Row:
    """The row of a case, as far as it is known before compiling."""
    kernel = f"{module}.{case.kernel.__name__.strip('_')}"
    options = f"{case.config['num_warps']}x{case.config['num_stages']}"
    return Row(case.architecture, kernel, _label(case), options)


def _types(kind: Any) -> tuple[str, ...]:
    """The types of one argument: several where it is a tuple."""
    return kind if isinstance(kind, tuple) else (kind,)


def _label(case: Case) -> str:
    """Types of the pointers to numbers, and the constants."""
    kinds = (case.signature[n] for n in case.kernel.arg_names if n not in case.constexprs)
    types = dict.fromkeys(t[1:] for kind in kinds for t in _types(kind) if t[0] == "*")
    floats = [t for t in types if t in ("fp32", "bf16", "fp16")]
    return " ".join([",".join(floats), *(f"{n}={v}" for n, v in case.constexprs.items())])


def _compile(case: Case, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature: dict[str, Any] = {
        n: "constexpr" if n in case.constexprs else case.signature[n] for n in names
    }
    attributes: dict[tuple[int, ...], Any] = {}
    for name in case.aligned:
        kind, at = signature[name], names.index(name)
        paths = [(at, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(at,)]
        attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    with _quiet_stderr():  # an overflow makes the compiler dump its whole module there
        return triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.warp), options=case.config
        )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _ptxas(compiled: Any) -> tuple[int, int]:
    """Registers a thread and spilled bytes, from NVIDIA's assembler."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    arch = _first(r"^\.target (\w+)", ptx)
    capability = int(_first(r"sm_(\d+)", arch))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name]
        done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed on {arch}: {done.stderr}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return int(_first(r"Used (\d+) registers", done.stderr)), spills


def _amdgcn(compiled: Any) -> tuple[int, int]:
    """Vector registers a thread and bytes of scratch memory, from AMD's assembler."""
    assert compiled.asm["hsaco"]
    text = compiled.asm["amdgcn"]
    scratch = _first(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return int(_first(r"\.vgpr_count:\s*(\d+)", text)), int(scratch)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"nothing matches {pattern!r} in the compiler's output")
    return found[1]


def _occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most there may be."""
    each = max(-(-registers // 8) * 8, 8)  # registers are given out by eights
    blocks = min(
        target.blocks,
        target.warps // warps,
        target.registers // (each * target.warp * warps),
        target.shared // max(shared + target.reserved, 1),
    )
    return blocks * warps / target.warps


_HEAD = (
    "arch", "kernel", "case", "warps", "regs", "spills", "shared", "blocks", "copies/loop",
    "floor µs", "model µs", "ratio", "",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.arch, row.kernel, row.label, row.options, str(row.registers), str(row.spills),
        str(row.shared), str(row.blocks),
        " ".join(f"{loop.copies}/{loop.instructions}" for loop in row.loops),
        *((f"{row.floor:.1f}", f"{row.model:.1f}", f"{row.floor / row.model:.0%}")
          if row.model else ("", "", "")), row.problem,
    )  # fmt: skip


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Text to the left, numbers to the right."""
    padded = (
        c.rjust(w) if 4 <= i <= 11 and i != 8 else c.ljust(w)
        for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def _few(rows: Sequence[Row]) -> list[int]:
    """One row of each kernel on each architecture, further on in its list with each of these."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.kernel, row.arch), []).append(index)
    archs = list(dict.fromkeys(row.arch for row in rows))
    return sorted(
        found[archs.index(arch) * len(found) // len(archs)] for (_, arch), found in groups.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report")
    parser.add_argument("--arch", nargs="+", choices=TARGETS)
    parser.add_argument("--kernel", default="", help="only those with this in module.kernel")
    parser.add_argument(
        "--quick", action="store_true", help="one configuration of each kernel and architecture"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", help="write the rows to this file as well")
    options = parser.parse_args(arguments)
    archs = options.arch or (QUICK if options.quick else list(TARGETS))
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")

    work, started = [], []
    for module, cases in CASES.items():
        for index, case in enumerate(cases()):
            row = _started(module, case)
            if row.arch in archs and options.kernel in row.kernel:
                work.append((module, index))
                started.append(row)
    if not work:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    if options.quick:
        kept = _few(started)
        work, started = [work[i] for i in kept], [started[i] for i in kept]
    table = [_HEAD, *map(_cells, started)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEAD))]
    widths[8] = max(widths[8], 17)
    print(_line(_HEAD, widths))
    rows = []
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[Row]] = map
        if options.jobs > 1:  # started afresh: the compiler's threads do not survive a fork
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context)
            run = stack.enter_context(pool).map
        for row in run(measure, *zip(*work, strict=True)):
            rows.append(row)
            print(_line(_cells(row), widths), flush=True)
    bad = [row for row in rows if row.problem]
    if any(row.model for row in rows):
        print(f"floor and model are computed, of {model.T} rows of {model.D}: nothing is measured")
    print(f"{len(rows)} compiled, {len(bad)} with a problem")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                [dataclasses.asdict(r) | {"problem": r.problem} for r in rows], file, indent=1
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
