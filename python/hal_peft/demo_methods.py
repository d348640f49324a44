"""The two contenders of the demo: HyperAdaLoRA on hal_kernels, and PEFT's AdaLoRA.

Both adapt the same layers of the same base model, start from the same head, use the same scaling
and reach the same budget at about the same step. Each has a learning rate of its own: one step of a
hypernetwork's weights moves the factors much further than one step of the factors themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import AdaLoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
)
from transformers.pytorch_utils import Conv1D

import hal_kernels

from .demo_data import Batch

METHODS = {"hyperadalora": "HyperAdaLoRA", "adalora": "AdaLoRA (PEFT)"}
HEADS = ("classifier", "score")
_ALPHA = 8
_GAMMA = 0.1


@dataclass(frozen=True)
class Settings:
    """What the run is made with; the same for both methods unless the name says otherwise."""

    model: str
    steps: int
    batch_size: int
    max_length: int
    rank: int
    seed: int
    lr_hyper: float
    lr_adalora: float
    head_lr: float

    @property
    def init_rank(self) -> int:
        """AdaLoRA's proportion: 1.5 times the target."""
        return math.ceil(1.5 * self.rank)

    @property
    def allocation_end(self) -> int:
        """The step at which the budget of ranks should be met."""
        return max(1, round(self.steps * 2 / 3))


@dataclass
class Contender:
    """One method in training: its model, how it steps, and what was seen."""

    label: str
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ranks: Callable[[], dict[str, int]]
    after_step: Callable[[int], None]  # called between optimizer.step() and zero_grad()
    ranks_before: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    budget_met_at: int | None = None

    def __post_init__(self) -> None:
        self.ranks_before = self.ranks()

    @property
    def trainable(self) -> int:
        """Number of trainable elements, the head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def train_step(self, batch: Batch, step: int, budget: int) -> None:
        """One timed training step (counted from 1); the loss kept is without the penalty."""
        self.model.train()
        start = time.perf_counter()
        output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()
        self.after_step(step)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.losses.append(float(cross_entropy(output.logits.detach(), batch["labels"])))
        if self.budget_met_at is None and sum(self.ranks().values()) <= budget:
            self.budget_met_at = step


def build(method: str, settings: Settings, num_labels: int) -> Contender:
    """A contender ready to train, from a freshly loaded base model."""
    if method == "hyperadalora":
        return _hyperadalora(settings, num_labels)
    return _adalora(settings, num_labels)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, which pads with its end-of-text token if it has no other.

    Raises:
        OSError, ValueError: it can't be loaded, or has neither token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # decoder models
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has neither a padding nor an end-of-text token: set its pad_token, and "
            "save it beside the model"
        )
    return tokenizer


def load_base(name: str, num_labels: int, seed: int) -> Any:
    """The pretrained model with a head drawn from `seed`: equal seeds give equal heads."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=num_labels, dtype=torch.float32
    )
    model.config.pad_token_id = load_tokenizer(name).pad_token_id
    return model


def adapted_layers(model: Any) -> list[str]:
    """Every linear layer outside the head: what both methods adapt."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not _in_head(name)
    ]


def _hyperadalora(settings: Settings, num_labels: int) -> Contender:
    model = load_base(settings.model, num_labels, settings.seed)
    # The fixed schedule's default prunes a tenth of the surplus each interval: ten meet the budget.
    hal_kernels.patch_model(
        model,
        rank=settings.rank,
        init_rank=settings.init_rank,
        targets=adapted_layers(model),
        modules_to_save=HEADS,
        alpha=_ALPHA,
        gamma=_GAMMA,
        interval=max(1, round(settings.allocation_end / 10)),
        seed=settings.seed,
    )
    optimizer, scheduler = _optimizer(model, settings.lr_hyper, settings)
    return Contender(
        METHODS["hyperadalora"],
        model,
        optimizer,
        scheduler,
        ranks=lambda: hal_kernels.rank_pattern(model),
        after_step=lambda step: None,  # hal_kernels notices optimizer steps by itself
    )


def _adalora(settings: Settings, num_labels: int) -> Contender:
    base = load_base(settings.model, num_labels, settings.seed)
    config = AdaLoraConfig(
        task_type=TaskType.SEQ_CLS,
        target_modules=adapted_layers(base),
        modules_to_save=list(HEADS),
        init_r=settings.init_rank,
        target_r=settings.rank,
        # PEFT divides by the initial rank, hal_kernels by the target: this gives equal scaling.
        lora_alpha=_ALPHA * settings.init_rank / settings.rank,  # type: ignore[arg-type]
        orth_reg_weight=_GAMMA,
        tinit=settings.steps // 10,
        tfinal=settings.steps - settings.allocation_end,
        deltaT=max(1, settings.steps // 20),
        total_step=settings.steps,
    )
    torch.manual_seed(settings.seed)
    model: Any = get_peft_model(base, config)
    optimizer, scheduler = _optimizer(model, settings.lr_adalora, settings)
    return Contender(
        METHODS["adalora"],
        model,
        optimizer,
        scheduler,
        ranks=lambda: adalora_ranks(model),
        after_step=model.base_model.update_and_allocate,
    )


def adalora_ranks(model: Any) -> dict[str, int]:
    """Ranks by layer: the last allocation, or the initial ranks before the first one."""
    config = model.peft_config["default"]
    kept = config.rank_pattern or {}
    ranks = {}
    for name, parameter in model.base_model.model.named_parameters():
        layer, found, _ = name.partition(".lora_E.")
        if found:
            # Saving the model takes the adapter's name out of the pattern's keys.
            pattern = kept.get(name, kept.get(name.removesuffix(".default")))
            ranks[layer] = parameter.shape[0] if pattern is None else sum(pattern)
    return ranks


def _optimizer(
    model: Any, adapter_lr: float, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if not _in_head(n)], "lr": adapter_lr},
        {"params": [p for n, p in trained if _in_head(n)], "lr": settings.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=settings.steps // 10, num_training_steps=settings.steps
    )
    return optimizer, scheduler


def _in_head(parameter: str) -> bool:
    return any(part in HEADS for part in parameter.split("."))


def train(
    contenders: list[Contender],
    batches: Iterable[Batch],
    settings: Settings,
    on_step: Callable[[int], None],
) -> None:
    """Train all contenders on the same batches, step by step in turn.

    Interleaving makes their times comparable: whatever else the machine does meets all of them.
    """
    for step, batch in enumerate(batches, start=1):
        # Who goes first alternates; the seed makes the base model's dropout equal for both.
        for contender in contenders if step % 2 else contenders[::-1]:
            torch.manual_seed(settings.seed + step)
            budget = settings.rank * len(contender.ranks_before)
            contender.train_step(batch, step, budget)
        on_step(step)
