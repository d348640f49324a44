"""What a kernel file lists for the ahead-of-time check: kernels with the types of a launch."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


class Case(NamedTuple):
    """A kernel with the types and constants of one launch."""

    kernel: Any
    signature: dict[str, str]  # run-time arguments and their types, in the kernel's order
    constexprs: dict[str, Any]
    config: dict[str, int]  # num_warps, num_stages
    aligned: tuple[str, ...]  # run-time arguments known to be divisible by 16
    architecture: str  # whose config it is: a key of `configs.ARCHITECTURES`

    @property
    def name(self) -> str:
        """Kernel and constants, for tables."""
        constants = (f"{n}={v}" for n, v in self.constexprs.items() if v is not None)
        types = dict.fromkeys(t for t in self.signature.values() if t.startswith("*"))
        return f"{self.kernel.__name__}[{', '.join([*types, *constants])}]"


def make_case(
    kernel: Any,
    architecture: str,
    pointers: Mapping[str, torch.dtype],
    floats: Collection[str],
    unaligned: Collection[str],
    constexprs: Mapping[str, Any],
    config: Mapping[str, int],
) -> Case:
    """A case from the types of pointers and floats; other arguments are int32.

    `unaligned` names the arguments that are not known to be divisible by 16: "*" stands for all.
    """
    signature = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = POINTERS[pointers[name]]
        elif name not in constexprs:
            signature[name] = "fp32" if name in floats else "i32"
    aligned = () if "*" in unaligned else tuple(
        n for n, kind in signature.items() if kind != "fp32" and n not in unaligned
    )  # fmt: skip
    constants = {n: constexprs[n] for n in kernel.arg_names if n in constexprs}
    return Case(kernel, signature, constants, dict(config), aligned, architecture)
