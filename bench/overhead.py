"""Host time of one adapted layer, forward and backward, where the arithmetic takes next to none.

    python -m bench.overhead

A stack of 32 linear layers of width 64 and one token, one thread. What a layer costs beyond the
frozen one is its overhead: on a GPU it decides the step time of small batches. Measured is the time
that the thread has the processor, so that other processes hardly count. The exit status is 1 if
this library's exceeds half of PEFT AdaLoRA's, or if an output is not what the factors say.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hal_kernels

from .common import append_row, interleaved, parser, summary

LAYERS, WIDTH, RANK, INIT_RANK = 32, 64, 3, 5
NAMES = [str(i) for i in range(LAYERS)]
BOUND = ("hal-direct", "adalora", 0.5)  # largest ratio of overheads


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def _peft(config: Any) -> nn.Module:
    from peft import get_peft_model

    model: nn.Module = get_peft_model(stack(), config)  # type: ignore[arg-type, assignment]
    for name, parameter in model.named_parameters():
        if "lora_E" in name or "lora_B" in name:
            nn.init.normal_(parameter)  # away from the identity: nothing is multiplied by zero
    return model


def lora() -> nn.Module:
    from peft import LoraConfig

    return _peft(LoraConfig(r=RANK, lora_alpha=8, target_modules=NAMES))


def adalora() -> nn.Module:
    from peft import AdaLoraConfig

    return _peft(
        AdaLoraConfig(
            init_r=INIT_RANK, target_r=RANK, lora_alpha=8, target_modules=NAMES, total_step=1000
        )
    )


def patched(hypernet: str | None) -> nn.Module:
    model = hal_kernels.patch_model(
        stack(), RANK, init_rank=INIT_RANK, hypernet=hypernet, targets=NAMES, seed=0
    )
    nn.init.normal_(model.hal.lam)  # type: ignore[arg-type, union-attr]
    return model


def alone() -> nn.Module:
    layers = [
        hal_kernels.nn.HALLinear.from_linear(layer, INIT_RANK)  # type: ignore[arg-type]
        for layer in stack()
    ]
    for layer in layers:
        nn.init.normal_(layer.lam)
    return nn.Sequential(*layers)


METHODS: dict[str, Callable[[], nn.Module]] = {
    "frozen": stack,
    "lora": lora,
    "adalora": adalora,
    "hal-direct": lambda: patched("direct"),
    "hal-spectral": lambda: patched(None),
    "hal-linear": alone,
}


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What one layer of this library should return, in float64 from its own tensors."""
    arguments = layer.adapter_arguments()  # type: ignore[operator]
    (p, lam, q), options = arguments
    lam = lam * options.get("mask", 1.0)
    linear = nn.functional.linear(x, layer.weight.double(), layer.bias.double())  # type: ignore[operator, union-attr]
    return linear + options["scaling"] * ((x @ p.double().t()) * lam.double()) @ q.double()


def check(model: nn.Module) -> None:
    """One layer's output against the formula: fp32 sums of 64 products stay under 1e-6."""
    x = torch.randn(1, WIDTH)
    layer = model[0]  # type: ignore[index]
    with torch.no_grad():
        want = expected(layer, x.double())
        error = float((layer(x).double() - want).norm() / want.norm())
    if error > 1e-6:
        raise SystemExit(f"a layer's output is {error:.1e} from what its factors say")


def one_step(model: nn.Module) -> Callable[[], dict[str, float]]:
    x = torch.randn(1, WIDTH, requires_grad=True)
    gradient = torch.randn(1, WIDTH)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> dict[str, float]:
        start = time.thread_time()
        model(x).backward(gradient)
        seconds = time.thread_time() - start
        for tensor in trained:
            tensor.grad = None
        return {"layer": seconds / LAYERS}

    return step


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=500)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    models = {name: build() for name, build in METHODS.items()}
    for name in ("hal-direct", "hal-spectral", "hal-linear"):
        check(models[name])
    samples: dict[str, list[dict[str, float]]] = {}
    steps = {name: one_step(model) for name, model in models.items()}
    for measured in interleaved(steps, 30 if arguments.quick else arguments.repeats, warmup=20):
        samples = measured
    results = {name: summary([s["layer"] for s in found]) for name, found in samples.items()}
    frozen = results["frozen"]["median_ms"]
    for result in results.values():
        result["overhead_ms"] = result["median_ms"] - frozen
    peer = results["adalora"]["overhead_ms"]
    view = Table(title="one layer, one token: microseconds, median [quartiles]")
    for column in ("method", "forward + backward", "beyond frozen", "÷ AdaLoRA"):
        view.add_column(column, justify="left" if column == "method" else "right")
    for name, r in results.items():
        spread = f"[{1e3 * r['q1_ms']:.0f}–{1e3 * r['q3_ms']:.0f}]"
        over = r["overhead_ms"]
        view.add_row(
            name, f"{1e3 * r['median_ms']:.0f} {spread}", f"{1e3 * over:.0f}", f"{over / peer:.2f}"
        )
    console = Console()
    console.print(view)
    if not arguments.no_save:
        row = {"layers": LAYERS, "width": WIDTH, "init_rank": INIT_RANK}
        append_row("overhead", row | {"methods": results}, Path(arguments.out))
    ours, theirs, bound = BOUND
    ratio = results[ours]["overhead_ms"] / results[theirs]["overhead_ms"]
    if ratio > bound and not arguments.quick:
        console.print(f"missed: {ours} / {theirs} = {ratio:.2f} > {bound}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
