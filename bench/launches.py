"""GPU launches per training step, counted without a GPU.

    python -m bench.launches [--model roberta llama] [--arch sm_90] [--batch 8]

Runs the frozen model, PEFT's LoRA and AdaLoRA and this library on the CPU and counts what each step
would launch on a GPU: torch operations that are neither views nor allocations, and for this
library's operators what their Triton implementations launch (the kernels themselves are not run).
A foreach operation counts once. Vendor GEMMs that take two kernels count once.

The exit status is 1 if a part is beyond its budget, or if work over all layers grows with them.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hal_kernels.kernels import configs
from hal_kernels.nn import spectral
from hal_kernels.nn.tensors import finite_norm
from hal_kernels.ops._library import TRITON

from .common import append_row, parser
from .methods import METHODS, build

BUDGET = {
    "adapter forward, a layer": 2,
    "adapter backward, a layer": 3,
    "penalty forward": 2,
    "penalty backward": 1,
    "hypernetworks forward": 48,
    "hypernetworks backward": 80,
    "importance and allocation": 10,
    "spectral step": 10,
}
BUDGETS = {
    "hal-direct": BUDGET | {"importance and allocation": 24},  # "ema": averages, a mean a width
    "hal-spectral": BUDGET | {"importance and allocation": 20},  # dΛ is made of K and Q
}
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
FREE = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias", "set_", *SYNCS}


class Launches(TorchDispatchMode):
    """Counts launches by name: of torch operations, and of Triton kernels as "operator: kernel"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if func.namespace == "hal":
            with self, triton_launches(name, self.counts):
                TRITON[name](*args)
            return func(*args, **kwargs)  # the values, from the backend that serves the CPU
        self.syncs += name in SYNCS
        if not func.is_view and name not in FREE and "empty" not in name:
            self.counts[name] += 1
        return func(*args, **kwargs)

    @property
    def total(self) -> int:
        return self.counts.total()


@contextlib.contextmanager
def triton_launches(operator: str, counts: Counter[str]) -> Iterator[None]:
    """Triton kernels are counted, as "operator: kernel", instead of run."""
    from triton.runtime.jit import KernelInterface

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            counts[f"{operator}: {kernel.fn.__name__}"] += 1

        return launch

    with mock.patch.object(KernelInterface, "__getitem__", launcher):
        yield


def counted(function: Callable[[], Any]) -> Launches:
    """What `function` launches."""
    with Launches() as launches:
        function()
    return launches


def roberta(layers: int) -> nn.Module:
    """RoBERTa-base (12 layers) with random weights and a two-class head."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = RobertaForSequenceClassification(config)
    return model


def llama(layers: int) -> nn.Module:
    """A Llama with the widths of 3.2-1B, cut to a few layers: grouped queries, gated MLP."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=1000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, num_labels=2, use_cache=False,
        pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = LlamaForSequenceClassification(config)
    return model


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to count on: its builder, depths (the second is reported), targets, head's name."""

    build: Callable[[int], nn.Module]
    depths: tuple[int, int]
    targets: str
    linear_layers: int  # of one block
    head: str


SHAPES = {
    "roberta": Shape(
        roberta, (2, 12), r".*encoder\.layer\..*(query|key|value|dense)", 6, "classifier"
    ),
    "llama": Shape(llama, (1, 2), r".*layers\..*_proj", 7, "score"),
}


def phases(name: str, shape: Shape, layers: int, batch: int, length: int) -> dict[str, Launches]:
    """Launches of each phase of a step."""
    torch.manual_seed(0)
    model: Any = build(
        name, shape.build(layers), shape.targets, shape.head, interval=1, total_step=100, tfinal=1
    ).train()
    rows = {"input_ids": torch.randint(5, 900, (batch, length))}
    labels = torch.zeros(batch, dtype=torch.int64)
    trained = [p for p in model.parameters() if p.requires_grad]
    found: dict[str, Launches] = {}

    def both(prefix: str, run: Callable[[], torch.Tensor]) -> None:
        kept: list[torch.Tensor] = []
        found[f"{prefix}forward"] = counted(lambda: kept.append(run()))
        found[f"{prefix}backward"] = counted(kept[0].backward)

    # A first step, so that momenta, caches and moving averages are there.
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for _ in range(2):
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(1)
        optimizer.zero_grad()
    both("plain ", lambda: model(**rows).logits.square().mean())
    model.zero_grad()
    if name.startswith("hal"):
        adapter = model.hal
        if name == "hal-hyper":
            found["generation forward"] = counted(adapter.open_forward)
            outputs = [t for t in adapter._pass.live.effective.tensors() if t.requires_grad]
            ones = [torch.ones_like(t) for t in outputs]
            adapter.close_forward()
            found["generation backward"] = counted(lambda: torch.autograd.backward(outputs, ones))
            model.zero_grad()
    both("", lambda: model(**rows, labels=labels).loss)
    if name == "adalora":
        found["allocation"] = counted(lambda: model.base_model.update_and_allocate(2))
    elif name.startswith("hal"):
        with mock.patch("hal_kernels.nn.adapter.all_finite", finite_norm):  # as on a GPU
            found["check for NaN"] = counted(lambda: adapter.before_optimizer_step(optimizer))
        mask = adapter.mask.clone()

        def advance(*args: Any) -> None:
            found["spectral step"] = counted(lambda: spectral.advance(*args))

        with mock.patch("hal_kernels.nn.adapter.advance", advance):
            found["allocation"] = counted(adapter.after_optimizer_step)
        if torch.equal(adapter.mask, mask):
            raise RuntimeError("nothing was pruned: the allocation was not counted")
    return found


def parts(found: dict[str, dict[str, Launches]], name: str, adapted: int) -> dict[str, float]:
    """What a method launches beyond the frozen model, by part."""
    own, frozen, floor = found[name], found["frozen"], found["floor"]
    nothing = Launches()
    out: dict[str, float] = {}
    for side, base in (("forward", frozen), ("backward", floor)):
        generation = own.get(f"generation {side}", nothing).total
        plain = own[f"plain {side}"].total - base[f"plain {side}"].total - generation
        out[f"adapter {side}, a layer"] = plain / adapted
        whole = own[side].total - own[f"plain {side}"].total
        whole -= base[side].total - base[f"plain {side}"].total
        kernels = sum(n for kernel, n in own[side].counts.items() if "penalty" in kernel)
        if name.startswith("hal"):
            out[f"penalty {side}"] = kernels
            out[f"adding the penalty, {side}"] = whole - kernels
        elif name == "adalora":
            out[f"penalty {side}"] = whole
        if name == "hal-hyper":
            out[f"hypernetworks {side}"] = generation
    if name.startswith("hal"):
        out["advancing the state"] = own["allocation"].counts.pop("_foreach_copy_", 0)
    for part, key in (
        ("importance and allocation", "allocation"),
        ("spectral step", "spectral step"),
        ("check for NaN", "check for NaN"),
    ):
        if key in own:
            out[part] = own[key].total
            out[f"{part}: host synchronisations"] = own[key].syncs
    if "spectral step" in own:  # taken inside the other
        out["importance and allocation"] -= own["spectral step"].total
    out["step, optimizer not counted"] = sum(
        own[key].total
        for key in ("forward", "backward", "allocation", "check for NaN")
        if key in own
    )
    return out


PER_LAYER = ("adapter forward, a layer", "adapter backward, a layer", "step, optimizer not counted")


def missed(results: dict[str, dict[str, dict[str, float]]], model: str) -> list[str]:
    """What is beyond its budget, or grows with the number of layers, in words."""
    found = []
    for name in ("hal-direct", "hal-spectral", "hal-hyper"):
        few, many = (results[depth][name] for depth in results)
        for part, limit in BUDGETS.get(name, BUDGET).items():
            if many.get(part, 0) > limit:
                found.append(f"{model}, {name}: {part}: {many[part]:g} > {limit}")
        for part, value in many.items():
            if part not in PER_LAYER and few[part] != value:
                found.append(f"{model}, {name}: {part}: {few[part]:g} becomes {value:g} with depth")
        if many["importance and allocation: host synchronisations"]:
            found.append(f"{model}, {name}: allocation waits for the device")
    return found


def table(model: str, depth: int, results: dict[str, dict[str, float]]) -> Table:
    view = Table(title=f"{model}, {depth} blocks: launches of a step beyond the frozen model's")
    view.add_column("part")
    view.add_column("at most", justify="right")
    names = [n for n in METHODS if n in results]
    for name in names:
        view.add_column(name, justify="right")
    order = dict.fromkeys(part for n in reversed(names) for part in results[n])
    for part in order:
        cells = [f"{results[n][part]:.4g}" if part in results[n] else "–" for n in names]
        view.add_row(part, f"{BUDGET[part]}" if part in BUDGET else "", *cells)
    return view


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--arch", choices=configs.ARCHITECTURES, default="sm_90")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--length", type=int, default=128, help="tokens a row")
    options.add_argument("--kernels", action="store_true", help="list every launch by name")
    arguments = options.parse_args()
    console, misses = Console(), []
    for model in arguments.model:
        shape = SHAPES[model]
        depths = shape.depths if not arguments.quick else (1, 2)
        results: dict[str, dict[str, dict[str, float]]] = {}
        for depth in depths:
            with mock.patch.object(configs, "DEFAULT", configs.ARCHITECTURES[arguments.arch]):
                found = {
                    name: phases(name, shape, depth, arguments.batch, arguments.length)
                    for name in METHODS
                }
            adapted = depth * shape.linear_layers
            results[str(depth)] = {n: parts(found, n, adapted) for n in METHODS if n != "frozen"}
        deepest = results[str(depths[-1])]
        console.print(table(model, depths[-1], deepest))
        launch_us = configs.ARCHITECTURES[arguments.arch].launch_us
        times = (
            f"{name} {parts['step, optimizer not counted'] * launch_us / 1e3:.2f}"
            for name, parts in deepest.items()
        )
        console.print(f"ms of a step at {launch_us:g} µs a launch: {', '.join(times)}")
        if arguments.kernels:
            for name, launches in found["hal-hyper"].items():
                console.print(name, dict(launches.counts))
        misses += missed(results, model)
        if not arguments.no_save:
            row = {"model": model, "arch": arguments.arch, "batch": arguments.batch}
            row |= {"length": arguments.length, "parts": results}
            append_row("launches", row, Path(arguments.out))
    for miss in misses:
        console.print(f"missed: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
