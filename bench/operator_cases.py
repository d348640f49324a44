"""What `bench.operators` measures: operators, sizes, inputs, formulas, and the least traffic."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hal_kernels import ops
from hal_kernels.ops.svd_linear import layer_output, layer_penalty
from tools import traffic

from .spectral_layers import SpectralLayers

# The adapted layers of a block of Llama-3.1-8B, as (d_in, d_out).
LLAMA_BLOCK = (
    (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336),
    (14336, 4096),
)  # fmt: skip
Inputs = dict[str, Any]
Outputs = torch.Tensor | Sequence[torch.Tensor]
Function = Callable[[Inputs], Outputs]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size."""

    operator: str
    size: str
    ours: Function
    formula: Function
    inputs: Inputs
    floor: traffic.Traffic  # of forward and backward
    frozen: tuple[str, ...] = ()  # inputs whose names begin so need no gradient
    peft: Callable[[], Function] | None = None
    formula_timed: bool = True

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(iter(self.inputs.values())).dtype
        return dtype


def normal(
    *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    """Of mean 1, so that sums do not cancel by chance and relative errors mean something."""
    return ((torch.randn(shape, device=device) + 1) * scale).to(dtype)


def svd_linear_case(
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    penalty: bool = False,
) -> Case:
    """The linear layer, with its own penalty as a second output or without."""
    inputs = {
        "x": normal(T, d_in, dtype=dtype, device=device),
        "weight": normal(d_out, d_in, dtype=dtype, device=device, scale=d_in**-0.5),
        "bias": normal(d_out, dtype=dtype, device=device),
        "p": normal(r, d_in, dtype=torch.float32, device=device, scale=d_in**-0.5),
        "lam": normal(r, dtype=torch.float32, device=device),
        "q": normal(r, d_out, dtype=torch.float32, device=device, scale=d_out**-0.5),
    }
    width = dtype.itemsize
    floor = (
        traffic.gemm(T, d_in, d_out, width=width)
        + traffic.shrink(T, d_in, r, width=width)
        + traffic.expand(T, d_out, r, width=width)
        + traffic.gemm(T, d_out, d_in, width=width)
        + traffic.gradients_dy(T, d_out, r, width=width)
        + traffic.gradients_x(T, d_in, r, width=width, dx=True)
    )

    if penalty:
        for d in (d_in, d_out):
            floor += traffic.gram(d, r) + traffic.penalty_gradient(1, r, d)
        floor += traffic.finish(r)

    def ours(i: Inputs) -> Outputs:
        if not penalty:
            return ops.svd_linear(**i, scaling=0.5)
        grams: list[torch.Tensor] = []
        y = layer_output(*i.values(), 0.5, grams=grams)
        return y, layer_penalty(i["p"], i["q"], grams)

    def formula(i: Inputs) -> Outputs:
        i = {name: t.to(i["x"].dtype) for name, t in i.items()}
        y = ops.svd_linear_reference(**i, scaling=0.5)
        return (y, ops.orthogonality_penalty_reference([i["p"], i["q"]])) if penalty else y

    return Case(
        "svd_linear_penalty" if penalty else "svd_linear",
        f"T={T} {d_in}→{d_out} r={r} {_name(dtype)}",
        ours,
        formula,
        inputs,
        floor,
        ("weight", "bias"),
        None if penalty else lambda: peft_layer(inputs),
    )


def peft_layer(inputs: Inputs) -> Function:
    """PEFT's AdaLoRA layer with the same numbers; its rank number is 1/0.5 = 2 · alpha."""
    from peft import AdaLoraConfig, get_peft_model

    weight, rank = inputs["weight"], inputs["p"].shape[0]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device, weight.dtype)
    config = AdaLoraConfig(target_modules=["0"], init_r=rank, lora_alpha=1, total_step=10)
    model: Any = get_peft_model(torch.nn.Sequential(linear), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.base_layer.bias.copy_(inputs["bias"])
        layer.ranknum["default"].fill_(2.0)
    names = {"p": layer.lora_A, "lam": layer.lora_E, "q": layer.lora_B}
    parameters = {name: group["default"] for name, group in names.items()}

    def run(i: Inputs) -> torch.Tensor:
        # The very tensors of this call, so that their gradients are asked for like the others'.
        own = {"p": i["p"], "lam": i["lam"][:, None], "q": i["q"].t()}
        for name, group in names.items():
            group._parameters["default"] = own[name]
        try:
            out: torch.Tensor = layer(i["x"])
            return out
        finally:
            for name, group in names.items():
                group._parameters["default"] = parameters[name]

    return run


def group_case(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    widths = (d, d // 4, d // 4)  # grouped queries
    inputs = {"x": normal(T, d, dtype=dtype, device=device)}
    p = normal(3 * r, d, dtype=torch.float32, device=device, scale=d**-0.5).split(r)
    lam = normal(3 * r, dtype=torch.float32, device=device).split(r)
    for n, width in enumerate(widths):
        inputs |= {
            f"weight{n}": normal(width, d, dtype=dtype, device=device, scale=d**-0.5),
            f"p{n}": p[n],
            f"lam{n}": lam[n],
            f"q{n}": normal(r, width, dtype=torch.float32, device=device, scale=width**-0.5),
        }

    def lists(i: Inputs) -> Iterator[list[torch.Tensor]]:
        return ([i[f"{name}{n}"] for n in range(3)] for name in ("weight", "p", "lam", "q"))

    def ours(i: Inputs) -> Outputs:
        weight, *factors = lists(i)
        return ops.svd_linear_group(i["x"], weight, [None] * 3, *factors)

    def formula(i: Inputs) -> Outputs:
        weight, *factors = ([t.to(i["x"].dtype) for t in group] for group in lists(i))
        return ops.svd_linear_group_reference(i["x"], weight, [None] * 3, *factors)

    size = {"width": dtype.itemsize}
    floor = traffic.shrink(T, d, 3 * r, **size) + traffic.gradients_x(T, d, 3 * r, **size)
    for width in widths:
        floor += traffic.expand(T, width, r, **size) + traffic.gemm(T, d, width, **size)
        floor += traffic.gradients_dy(T, width, r, **size) + traffic.gemm(T, width, d, **size)
    name = f"T={T} d={d} r={r} {_name(dtype)}"
    return Case("svd_linear_group", name, ours, formula, inputs, floor, ("weight",))


def adapter_add_case(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    inputs = {
        "y": normal(T, d, dtype=dtype, device=device),
        "x": normal(T, d, dtype=dtype, device=device),
        "p": normal(r, d, dtype=torch.float32, device=device, scale=d**-0.5),
        "lam": normal(r, dtype=torch.float32, device=device),
        "q": normal(r, d, dtype=torch.float32, device=device, scale=d**-0.5),
    }

    def formula(i: Inputs) -> torch.Tensor:
        dtype = i["x"].dtype
        return ops.svd_adapter_add_reference(**{n: t.to(dtype) for n, t in i.items()})

    size = {"width": dtype.itemsize}
    floor = traffic.shrink(T, d, r, **size) + traffic.expand(T, d, r, base=True, **size)
    floor += traffic.gradients_dy(T, d, r, **size) + traffic.gradients_x(T, d, r, **size)
    return Case(
        "svd_adapter_add",
        f"T={T} d={d} r={r} {_name(dtype)}",
        lambda i: ops.svd_adapter_add(**i),
        formula,
        inputs,
        floor,
    )


def penalty_case(matrices: int, r: int, d: int, device: torch.device) -> Case:
    factors = normal(matrices, r, d, dtype=torch.float32, device=device, scale=d**-0.5)
    return Case(
        "orthogonality_penalty",
        f"{matrices} matrices r={r} d={d}",
        lambda i: ops.orthogonality_penalty([i["factors"]]),
        lambda i: ops.orthogonality_penalty_reference(list(i["factors"])),
        {"factors": factors},
        traffic.penalty_residual(matrices, r, d)
        + traffic.penalty_sum(matrices)
        + traffic.penalty_gradient(matrices, r, d),
    )


def spectral_case(
    name: str, widths: Sequence[tuple[int, int]], r: int, device: torch.device
) -> Case:
    """The spectral step of layers of these widths, without gradients: it works in place.

    For its error each call gets tensors of its own. It is timed on the same ones again and again,
    with the same gradients: each step starts where the last one ended. The formula goes layer by
    layer through SVDs on the CPU, and is timed only there.
    """
    layers = SpectralLayers(widths, r, device)
    parts = layers.traffic()
    return Case(
        "spectral_step_",
        f"{len(widths)} layers {name} r={r}",
        layers.step,
        layers.formula,
        layers.inputs(),
        parts["gram"] + parts["solve"] + parts["write"],
        frozen=("",),
        formula_timed=device.type == "cpu",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(device: torch.device, quick: bool, check: bool) -> Iterator[Case]:
    """Everything that is measured on `device`, one at a time: inputs are large.

    The linear layer's many sizes come last, so that a run that is stopped misses only some of them.
    """
    gpu = device.type == "cuda" and not quick
    bf16, fp32 = torch.bfloat16, torch.float32
    small = check or quick
    yield penalty_case(5 if small else 144, 5, 37 if small else 768, device)
    if check:
        yield spectral_case("of odd widths", ((37, 48), (48, 29), (37, 29)), 3, device)
    elif gpu:
        yield spectral_case("of Llama-3.1-8B", LLAMA_BLOCK * 32, 16, device)
    else:
        yield spectral_case("768→768", ((768, 768),) * (8 if quick else 72), 5, device)
    if check:
        for dtype in (fp32, bf16):
            yield svd_linear_case(33, 48, 80, 3, dtype, device)
            yield svd_linear_case(65, 37, 29, 64, dtype, device)
            yield svd_linear_case(33, 48, 80, 3, dtype, device, penalty=True)
            yield group_case(33, 48, 3, dtype, device)
            yield adapter_add_case(33, 48, 5, dtype, device)
    elif gpu:
        widths = ((768, 768), (768, 3072), (4096, 4096), (4096, 14336))
        for dtype, (d_in, d_out), T, r in itertools.product(
            (bf16, fp32), widths, (1, 128, 1024, 8192, 32768), (3, 8, 16, 64)
        ):
            if dtype == bf16 or (d_in == 768 and T <= 8192):
                yield svd_linear_case(T, d_in, d_out, r, dtype, device)
        for T, d in itertools.product((128, 8192), (768, 4096)):
            yield group_case(T, d, 16, bf16, device)
            yield adapter_add_case(T, d, 16, bf16, device)
            yield svd_linear_case(T, d, d, 16, bf16, device, penalty=True)
    else:
        for T in (1, 128) if quick else (1, 128, 1024):
            yield svd_linear_case(T, 768, 768, 3, fp32, device)
        yield group_case(128, 768, 3, fp32, device)
        yield adapter_add_case(128, 768, 3, fp32, device)
        yield svd_linear_case(128, 768, 768, 3, fp32, device, penalty=True)
