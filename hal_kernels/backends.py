"""Which implementation of an operator serves which device, and why.

Every operator has a default in plain PyTorch for all devices. The native one for the CPU (csrc/) is
a shared library beside this file, loaded with `hal_kernels.ops`; Triton kernels serve CUDA devices.

Environment:
    HAL_KERNELS_NATIVE  0 leaves the native operators out; a path loads that file instead.
    HAL_KERNELS_ISA     baseline or avx2: no wider instructions than these, on x86-64.
"""

import ctypes
import importlib.util
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = Path(__file__).with_name("libhal_kernels.so")
_SCHEMAS = b"hal_kernels schemas\n"  # what stands before them in the library (csrc/library.cpp)

_why = "hal_kernels.ops is not imported"  # the state of the native library, in words


class Backend(NamedTuple):
    """What serves one operator on one kind of device."""

    name: str
    """"native" (csrc), "triton" or "default" (plain PyTorch)."""
    reason: str


def backends() -> dict[str, dict[str, Backend]]:
    """Operator -> device type ("cpu", "cuda") -> the backend that serves it, and why."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("hal::")]
    return {
        name.removeprefix("hal::"): {"cpu": _on_cpu(name), "cuda": _on_cuda(name)}
        for name in sorted(names)
    }


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _on_cpu(name: str) -> Backend:
    if _has_kernel(name, "CPU"):
        return Backend("native", _why)
    if _has_kernel("hal::svd_linear", "CPU"):
        return Backend("default", "not written natively")
    return Backend("default", _why)


def _on_cuda(name: str) -> Backend:
    if _has_kernel(name, "CUDA"):
        return Backend("triton", "Triton kernels")
    if importlib.util.find_spec("triton") is None:
        return Backend("default", "triton is not installed")
    return Backend("default", "not written in Triton")


def load_native() -> None:
    """Load the native operators; `hal_kernels.ops` calls this once, when it has defined its own.

    A library that is not there is the user's choice; one that is there and can't be used is warned
    about.
    """
    global _why
    setting = os.environ.get("HAL_KERNELS_NATIVE", "1")
    path = LIBRARY if setting in ("", "0", "1") else Path(setting)
    if setting == "0":
        _why = "the native operators are turned off by HAL_KERNELS_NATIVE=0"
    elif path == LIBRARY and not path.exists():
        _why = (
            f"the native operators were not built: there is no {path.name} in the package "
            "(no torch, no C++ compiler, or HAL_KERNELS_BUILD=0, when it was installed)"
        )
    else:
        problem = _load(path)
        if problem is None:
            _why = f"{path.name}, {_instruction_set(path)}"
            return
        _why = f"the native operators in {path} cannot be used: {problem}"
        warnings.warn(
            f"hal_kernels: {_why}. Plain PyTorch serves instead; installing hal_kernels again "
            "builds them again, HAL_KERNELS_NATIVE=0 leaves them out.",
            stacklevel=4,  # this function, hal_kernels.ops, hal_kernels, the user's import
        )


def _load(path: Path) -> str | None:
    """Load the library at `path`; what is wrong with it, if it can't be."""
    try:
        problem = _defect(path.read_bytes())
        if problem is None:
            torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)
    return problem


def _defect(content: bytes) -> str | None:
    """What the loader would not notice, or not survive."""
    # Mapping a truncated file succeeds, and the first access beyond its end kills the process. The
    # section headers are the last thing in a file.
    if content[:5] == b"\x7fELF\x02":
        header = content.ljust(64, b"\0")
        (table,) = struct.unpack_from("=Q", header, 0x28)
        size, count = struct.unpack_from("=HH", header, 0x3A)
        if table == 0 or table + size * count > len(content):
            return "the file is truncated"
    _, found, rest = content.partition(_SCHEMAS)
    if not found:
        return "it is not a library of hal_kernels"
    # Kernels are called by position: one written for another schema would misread its arguments.
    for schema in rest.partition(b"\0")[0].decode(errors="replace").splitlines():
        name = schema.split("(", 1)[0].removeprefix("hal::")
        if not _is_known(name, schema):
            return f"it was built for another version of hal_kernels ({name} has changed)"
    return None


def _is_known(name: str, schema: str) -> bool:
    """Whether the operator `name` of this package has the schema so written."""
    operator = getattr(torch.ops.hal, name, None)
    try:
        return operator is not None and torch._C.parse_schema(schema) == operator.default._schema
    except RuntimeError:  # not a schema
        return False


def _instruction_set(path: Path) -> str:
    function = ctypes.CDLL(str(path)).hal_kernels_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())
