"""What NVIDIA's assembler made of a kernel's loops."""

import re
import subprocess
import tempfile
from typing import NamedTuple

AHEAD = ("LDGSTS", "UTMALDG")  # asynchronous copies from memory to shared memory


class Loop(NamedTuple):
    """An innermost loop: what a warp issues in one turn, and the bytes that it asks for ahead."""

    instructions: int
    copies: int  # asynchronous ones
    bytes: int  # of those copies


def loops_of(cubin: bytes) -> list[Loop]:
    """The innermost loops of a binary, in order."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return loops_in(text)


def loops_in(text: str) -> list[Loop]:
    """The same of the disassembler's text: what a branch back to a label encloses."""
    names: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*)", line):
            names.append(found[1])
            target = re.search(r"\((\.L_x_\d+)\)", found[2])
            # A label that comes later is not known yet; the branch to itself ends a kernel.
            first = labels.get(target[1]) if found[1].startswith("BRA") and target else None
            if first is not None and first < len(names) - 1:
                spans.append((first, len(names)))
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [_loop(names[a:b]) for a, b in sorted(inner)]


def _loop(names: list[str]) -> Loop:
    copies = [name.split(".") for name in names if name.startswith(AHEAD)]
    widths = [16 if "128" in name else 8 if "64" in name else 4 for name in copies]
    return Loop(len(names), len(copies), 32 * sum(widths))
