"""The methods that are compared, each as one training step in measured phases.

All share the frozen weights of one base model, the batch, the trained classifier and AdamW.
`frozen` trains the classifier alone; `floor` also computes the gradient of every layer's input,
which any adapter in the first layer needs.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import hal_kernels

from .common import Clock
from .models import Base

METHODS = ("frozen", "floor", "lora", "adalora", "hal-direct", "hal-spectral", "hal-hyper")
ALL_METHODS = (
    "frozen", "floor", "lora", "dora", "adalora", "hal-direct", "hal-spectral", "hal-hyper",
)  # fmt: skip
STEP_METHODS = tuple(name for name in ALL_METHODS if name != "dora")
HYPER_PEFT = ("hyper-lora", "hyper-dora", "hyper-dylora")  # bench.hyper_peft
RANK, INIT_RANK, INTERVAL, ALPHA = 3, 5, 10, 8
WARMUP = 3  # steps before any is measured
TOTAL_STEPS = 10_000  # nothing is pruned for good while we measure, as early in a real run


def batch_of(
    rows: int, length: int, device: torch.device, process: int = 0
) -> dict[str, torch.Tensor]:
    """Random tokens and labels, others in each process."""
    generator = torch.Generator().manual_seed(rows + 10_000 * process)
    ids = torch.randint(5, 50_000, (rows, length), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def build(
    name: str,
    model: nn.Module,
    targets: str,
    head: str,
    *,
    rank: int = RANK,
    init_rank: int = INIT_RANK,
    interval: int = INTERVAL,
    total_step: int = TOTAL_STEPS,
    tfinal: int = TOTAL_STEPS // 10,
    seed: int = 0,
) -> nn.Module:
    """`model` adapted by the method `name`, which also trains the module `head`.

    A model without one ("") is a causal language model, of which nothing else is trained.
    """
    model.requires_grad_(False)
    if name in ("frozen", "floor"):
        model.get_submodule(head).requires_grad_(True)
        if name == "floor":
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            embeddings.register_forward_hook(lambda m, args, output: output.requires_grad_(True))
        return model
    if name in ("lora", "dora", "dylora", "adalora", *HYPER_PEFT):
        from peft import AdaLoraConfig, LoraConfig, get_peft_model

        common: dict[str, Any] = {
            "target_modules": targets,
            # Without one PEFT leaves its penalty out.
            "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        }  # fmt: skip
        config: Any
        if name == "adalora":
            config = AdaLoraConfig(
                init_r=init_rank, target_r=rank, orth_reg_weight=0.1, deltaT=interval, tinit=0,
                tfinal=tfinal, total_step=total_step, **common,
                # It divides by the initial rank where others divide by the rank.
                lora_alpha=ALPHA * init_rank / rank,
            )  # fmt: skip
        else:
            config = LoraConfig(r=rank, lora_alpha=ALPHA, use_dora=name.endswith("dora"), **common)
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        if name.endswith("dylora"):
            truncate_at_random(adapted, rank)
        if name in HYPER_PEFT:
            from .hyper_peft import generate_factors

            generate_factors(adapted)
        return adapted  # type: ignore[no-any-return]
    options: dict[str, Any] = {"hypernet": "bert"}
    if name == "hal-direct":  # AdaLoRA's own method
        options = {
            "hypernet": "direct", "penalty": "frobenius", "allocation": "ema",
            "schedule": "cubic", "total_step": total_step, "tfinal": tfinal,
        }  # fmt: skip
    elif name == "hal-spectral":
        options = {}
    return hal_kernels.patch_model(
        model, rank, init_rank=init_rank, alpha=ALPHA, targets=targets, interval=interval,
        seed=seed, modules_to_save=(head,) if head else (), **options,
    )  # fmt: skip


def truncate_at_random(model: nn.Module, rank: int) -> None:
    """Make PEFT's LoRA a DyLoRA: each training step uses the first b ≤ r directions, times r / b.

    b is drawn anew for each step, the same in all layers (Valipour et al., 2023, without its
    freezing of all directions but the b-th). In evaluation mode all r serve.
    """
    generator = torch.Generator().manual_seed(0)
    scales: list[torch.Tensor] = []

    def draw(module: nn.Module, args: Any) -> None:
        b = int(torch.randint(1, rank + 1, (), generator=generator))
        scales[:] = [torch.tensor([rank / b] * b + [0.0] * (rank - b))]

    def truncate(layer: nn.Module, args: Any, h: torch.Tensor) -> torch.Tensor:
        # PEFT's generate() passes by the hook of the whole model: the layer knows its own mode.
        return h * scales[0].to(h) if layer.training else h

    model.register_forward_pre_hook(draw)
    for name, layer in model.named_modules():
        if name.endswith("lora_A.default"):
            layer.register_forward_hook(truncate)


def sharing(model: nn.Module, head: str) -> nn.Module:
    """A copy of `model` with a head of its own, around the same other parameters and buffers."""
    own = {id(p) for p in model.get_submodule(head).parameters()} if head else set()
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in own})


class Outputs(nn.Module):
    """Loss and logits of a model, from the tensors of a batch alone."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(**dict(zip(self.names, batch, strict=True)))
        return out.loss, out.logits.detach()


class Method:
    """One method on the frozen weights of `model`, which other methods may use as well.

    Without `phases` a step is timed as a whole: on a GPU its phases overlap then, as they do in
    training. `options` are those of `build`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        base: Base,
        device: torch.device,
        *,
        lr: float = 1e-5,
        phases: bool = True,
        **options: int,
    ) -> None:
        self.name, self.clock, self.steps = name, Clock(None if phases else "step"), 0
        own = sharing(model, base.head)
        adapted: Any = build(name, own, base.targets, base.head, **options)
        adapted = adapted.to(device)
        self.allocate: Callable[[], None] | None = None
        if name == "adalora":
            tuner = adapted.base_model
            tuner.model.forward = self.clock.wrap("inner forward", tuner.model.forward)
            if options.get("init_rank", INIT_RANK) > options.get("rank", RANK):  # else PEFT fails
                self.allocate = lambda: tuner.update_and_allocate(self.steps)
        elif name.startswith("hal"):
            self._time_phases(adapted.hal)
        self.model: nn.Module = adapted.train()
        self.graphed: Callable[..., Any] | None = None
        self.trained = [p for p in adapted.parameters() if p.requires_grad]
        self.trained_parameters = sum(p.numel() for p in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr)

    def _time_phases(self, adapter: Any) -> None:
        adapter.loss_term = self.clock.wrap("penalty", adapter.loss_term)
        adapter.after_optimizer_step = self.clock.wrap("allocation", adapter.after_optimizer_step)

    def capture(self, batch: dict[str, torch.Tensor]) -> None:
        """Make forward and backward CUDA graphs, for batches of this one's shape.

        Raises:
            RuntimeError: they leave other gradients than without graphs.
        """
        expected = self._gradients(batch)
        self.graphed = torch.cuda.make_graphed_callables(
            Outputs(self.model, batch), tuple(batch.values()), allow_unused_input=True
        )
        for found, own in zip(self._gradients(batch), expected, strict=True):
            error = float((found - own).norm() / own.norm().clamp(min=1e-30))
            if not error <= 1e-3:
                raise RuntimeError(f"a captured gradient has relative error {error:.1e}")

    def _gradients(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of every trained parameter; zeros where there is none."""
        self._forward(batch)[0].backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.trained]
        self.optimizer.zero_grad()
        return found

    def _forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphed is not None:
            return self.graphed(*batch.values())  # type: ignore[no-any-return]
        out = self.model(**batch)
        return out.loss, out.logits.detach()

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """One training step; seconds spent in each of its phases."""
        self.steps += 1
        clock = self.clock
        with clock.phase("step"):
            with clock.phase("forward"):
                loss, self.logits = self._forward(batch)
            with clock.phase("backward"):
                loss.backward()
            with clock.phase("optimizer"):
                self.optimizer.step()
            if self.allocate is not None:
                with clock.phase("allocation"):
                    self.allocate()
            self.optimizer.zero_grad()
        seconds = clock.take()
        if "inner forward" in seconds:  # PEFT adds its penalty around the model's forward
            seconds["penalty"] = seconds["forward"] - seconds.pop("inner forward")
        if "penalty" in seconds:
            seconds["forward"] -= seconds["penalty"]
        if self.allocate is None and "allocation" in seconds:  # inside optimizer.step()
            seconds["optimizer"] -= seconds["allocation"]
        return seconds
