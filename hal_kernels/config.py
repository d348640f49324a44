"""Options of an adapter: one frozen dataclass, checked when it is made, saved as JSON."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from .ops._library import expect_number
from .ops.orthogonality_penalty import KINDS as PENALTIES

HYPERNETS = ("bert", "mlp", "cnn", "direct")
UPDATES = ("anchor", "replace", "residual", "spectral")
ALLOCATIONS = ("sensitivity", "ema", "magnitude")
SCHEDULES = ("fixed", "cubic")
AUTO = "auto"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HALConfig:
    """What `patch_model` needs to know. Unknown or impossible values raise at once.

    Attributes:
        rank: target average rank; the budget is rank × number of layers (of layers narrower than
            that, their narrower side). The paper uses 3.
        init_rank: rank every layer starts with; None means ⌈1.5 · rank⌉ (AdaLoRA's proportion).
            Equal to `rank`: nothing is ever pruned. A layer narrower than this starts with as many
            directions as its narrower side has.
        targets: layers to adapt, as PEFT's target_modules: a list of names or name endings, a
            regular expression for whole names, or "all-linear" (every linear layer except the
            output head and `modules_to_save`).
        exclude: list of names or endings, or a regular expression, left out of `targets`.
        modules_to_save: names or endings of modules trained in full and saved with the adapter.
            "auto": the task heads of transformers' models, whatever the checkpoint that the model
            was loaded from did not hold, and modules called "classifier", "score" or "qa_outputs".
        hypernet: generator of the factors: "bert" (the paper's), "mlp", "cnn" (its ablation), or
            "direct": P, Λ, Q are the parameters themselves (AdaLoRA). None: "bert" with an `update`
            that is a hypernetwork's, else "direct".
        norm_first: LayerNorm before attention and before the inner layer (pre-LN) instead of after
            each (post-LN, the paper's). Unused by all but "bert".
        hidden: hidden width of "bert". None: the paper's 312, with 12 attention heads and an inner
            layer of 1200. Else a multiple of 4: there are 4 heads then, and the inner layer is 4
            times as wide. Raises with any other `hypernet`.
        update: how the factors move. "spectral": by steps of unit spectral norm along the matrices
            of rank r (`ops.spectral_step_`), which keep P and Q orthonormal, at the learning rate
            of the optimizer that holds them; that optimizer keeps no moments of them. Or how a
            hypernetwork's output becomes the factors: "anchor" adds it to the initial factors
            (starts as the identity), "replace" takes it as it is (the paper's literal rule),
            "residual" adds it to the last factors. None: "spectral" where no `hypernet` is named,
            else "anchor", of which hypernet="direct" uses nothing: the optimizer moves the factors
            itself.
        alpha: scaling s = alpha / rank, constant while pruning goes on.
        rank_pattern: initial ranks of single layers, instead of `init_rank`. Keys are names,
            endings or regular expressions for an ending, as PEFT's; the first that matches counts.
        alpha_pattern: alpha of single layers, by the same kind of keys.
        dropout: probability of dropping an element of a layer's input, on the adapter's path only.
        gamma: weight of the orthogonality penalty in a training loss [eq. 7].
        penalty: "squared" [eq. 7] or "frobenius" (PEFT's form).
        allocation: score that decides what is pruned: "sensitivity" |σ·∇σ| [eq. 9], "ema"
            (AdaLoRA's smoothed sensitivity × uncertainty), "magnitude" |σ|.
        schedule: "fixed" prunes `prune_per_interval` directions every `interval` steps until the
            budget is met; "cubic" is AdaLoRA's, with `tinit`, `tfinal` and `total_step`.
        interval: optimizer steps between two allocations (ΔT). None means 100, or fewer where
            `total_step` says that the budget would not be met in the first two thirds of the run.
        prune_per_interval: directions pruned at a time under "fixed"; None means a tenth of the
            surplus over the budget, so that ten intervals meet it (more where `total_step` leaves
            room for fewer).
        tinit: "cubic": steps before the first allocation.
        tfinal: "cubic": steps after the last allocation.
        total_step: all optimizer steps of the run. "cubic" needs it; under "fixed" it settles an
            `interval` that is None. None: a run of transformers' Trainer says it itself.
        beta1, beta2: "ema": decay of the smoothed sensitivity and of its uncertainty.
        dtype: of factors and hypernetworks.
        seed: of their initial values; None draws from torch's global generator.
        skip_nonfinite: an optimizer step whose gradients hold NaN or Inf is skipped as a whole, as
            torch.amp.GradScaler does. Costs one host synchronisation a step on a GPU.
    """

    rank: int = 3
    init_rank: int | None = None
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = AUTO
    hypernet: str | None = None
    norm_first: bool = False
    hidden: int | None = None
    update: str | None = None
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)
    dropout: float = 0.0
    gamma: float = 0.1
    penalty: str = "squared"
    allocation: str = "sensitivity"
    schedule: str = "fixed"
    interval: int | None = None
    prune_per_interval: int | None = None
    tinit: int = 0
    tfinal: int = 0
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    dtype: torch.dtype = torch.float32
    seed: int | None = None
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save"):
            value = getattr(self, name)
            if value is not None or name == "targets":
                object.__setattr__(self, name, _pattern(name, value))
        _expect_int("rank", self.rank, 1)
        if self.init_rank is not None:
            _expect_int("init_rank", self.init_rank, 1)
            if self.init_rank < self.rank:
                raise ValueError(
                    f"init_rank is {self.init_rank}, expected at least rank = {self.rank}: "
                    "ranks only shrink (init_rank = rank prunes nothing)"
                )
        if self.update is None:
            chosen = "spectral" if self.hypernet is None else "anchor"
            object.__setattr__(self, "update", chosen)
        _expect_choice("update", self.update, UPDATES)
        if self.hypernet is None:
            object.__setattr__(self, "hypernet", "direct" if self.spectral else "bert")
        _expect_choice("hypernet", self.hypernet, HYPERNETS)
        if self.spectral:
            self._expect_spectral()
        if self.hidden is not None:
            self._expect_hidden()
        _expect_choice("penalty", self.penalty, PENALTIES)
        _expect_choice("allocation", self.allocation, ALLOCATIONS)
        _expect_choice("schedule", self.schedule, SCHEDULES)
        expect_number("alpha", self.alpha, above=0.0)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _checked_mapping(name, getattr(self, name)))
        for key, rank in (self.rank_pattern or {}).items():
            _expect_int(f"rank_pattern[{key!r}]", rank, 1)
        for key, alpha in (self.alpha_pattern or {}).items():
            expect_number(f"alpha_pattern[{key!r}]", alpha, above=0.0)
        expect_number("gamma", self.gamma, least=0.0)
        expect_number("dropout", self.dropout, least=0.0, below=1.0)
        expect_number("beta1", self.beta1, above=0.0, below=1.0)
        expect_number("beta2", self.beta2, above=0.0, below=1.0)
        _expect_int("tinit", self.tinit, 0)
        _expect_int("tfinal", self.tfinal, 0)
        for name in ("interval", "prune_per_interval", "total_step"):
            if getattr(self, name) is not None:
                _expect_int(name, getattr(self, name), 1)
        if self.schedule == "cubic" and self.total_step is None:
            raise ValueError('total_step is None, expected a number of steps (schedule="cubic")')
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit is {self.tinit}, expected less than total_step - tfinal = "
                f"{self.total_step - self.tfinal}: nothing could be allocated"
            )
        if self.seed is not None:
            _expect_int("seed", self.seed, 0)
            if self.seed >= 2**63:
                raise ValueError(f"seed is {self.seed}, expected less than 2**63")
        for name in ("norm_first", "skip_nonfinite"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected a bool")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype is {self.dtype}, expected one of {list(DTYPES.values())}")

    def _expect_hidden(self) -> None:
        """Raise TypeError or ValueError unless the hypernetwork may be that wide."""
        _expect_int("hidden", self.hidden, 4)
        if self.hidden % 4:  # type: ignore[operator]
            raise ValueError(f"hidden is {self.hidden}, expected a multiple of its 4 heads")
        if self.hypernet != "bert":
            raise ValueError(
                f"hidden is {self.hidden!r}, expected None with hypernet={self.hypernet!r}: "
                "only 'bert' has a width to choose"
            )

    def _expect_spectral(self) -> None:
        """Raise ValueError for what has no meaning where factors take spectral steps."""
        if self.hypernet != "direct":
            raise ValueError(
                f"hypernet is {self.hypernet!r}, expected 'direct' or None with update=\"spectral\""
            )
        if self.allocation == "ema":
            raise ValueError(
                "allocation is 'ema', expected 'sensitivity' or 'magnitude' with "
                'update="spectral": its directions turn, so their elements have no averages '
                '(hypernet="direct" trains as AdaLoRA does)'
            )

    @property
    def spectral(self) -> bool:
        """Whether factors move by spectral steps."""
        return self.update == "spectral"

    @property
    def anchored(self) -> bool:
        """Whether a hypernetwork's output is added to the initial factors."""
        return self.hypernet != "direct" and self.update == "anchor"

    @property
    def scaling(self) -> float:
        """s = alpha / rank, of a layer that no `alpha_pattern` names."""
        return self.alpha / self.rank

    def scaling_of(self, name: str) -> float:
        """s of the layer of this name."""
        return _matched(self.alpha_pattern, name, self.alpha) / self.rank

    def init_rank_of(self, name: str, narrowest: int) -> int:
        """The rank that a layer starts with, once `init_rank` is settled.

        Args:
            narrowest: the layer's narrower side, which bounds its rank.
        """
        if self.init_rank is None:
            raise ValueError("init_rank is None, expected the rank that for_layers settles")
        return min(_matched(self.rank_pattern, name, self.init_rank), narrowest)

    def for_layers(self, narrowest: Mapping[str, int]) -> "HALConfig":
        """This configuration with `init_rank` settled, for layers by name.

        Args:
            narrowest: each layer's narrower side. A layer that is narrower than a rank has that
                many directions, and no other layer has fewer for it.

        Raises:
            ValueError: no layer is wide enough for `rank` or `init_rank`, or the one that
                `rank_pattern` names is not; a key of a pattern names no layer; the initial ranks
                are less than the budget.
        """
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field) or {}:
                if not any(names_layer(key, name) for name in narrowest):
                    raise ValueError(f"{field}: {key!r} matches no adapted layer")
        widest = max(narrowest.values())
        for field in ("rank", "init_rank"):
            if (getattr(self, field) or 0) > widest:
                raise ValueError(
                    f"{field} is {getattr(self, field)}, expected at most {widest} (the narrower "
                    "side of the largest adapted layer)"
                )
        for name, side in narrowest.items():
            asked = _matched(self.rank_pattern, name, 0)
            if asked > side:
                raise ValueError(
                    f"rank_pattern gives {name!r} rank {asked}, expected at most {side} (its "
                    "narrower side)"
                )
        init_rank = self.init_rank or min(math.ceil(1.5 * self.rank), widest)
        config = dataclasses.replace(self, init_rank=init_rank)
        total, budget = config.initial_rows(narrowest), config.budget(narrowest)
        if total < budget:
            raise ValueError(
                f"rank_pattern lets the layers start with {total} directions, expected at least "
                f"rank × layers = {budget}: ranks only shrink"
            )
        return config

    def initial_rows(self, narrowest: Mapping[str, int]) -> int:
        """How many directions layers of these narrower sides, by name, start with in all."""
        return sum(self.init_rank_of(name, side) for name, side in narrowest.items())

    def budget(self, narrowest: Mapping[str, int]) -> int:
        """How many directions they keep in all: `rank` for each layer that is as wide."""
        return sum(min(self.rank, side) for side in narrowest.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HALConfig":
        """Rebuild from `to_dict`'s values. Unknown names raise ValueError."""
        unknown = unknown_options(values)
        if unknown:
            raise ValueError(f"config has unknown options: {unknown}")
        values = dict(values)
        if isinstance(values.get("dtype"), str):
            if values["dtype"] not in DTYPES:
                raise ValueError(f"dtype is {values['dtype']!r}, expected one of {list(DTYPES)}")
            values["dtype"] = DTYPES[values["dtype"]]
        return cls(**values)


PEFT_NAMES = {
    "r": "rank", "target_r": "rank", "init_r": "init_rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "target_modules": "targets", "exclude_modules": "exclude",
    "orth_reg_weight": "gamma", "deltaT": "interval",
}  # fmt: skip
"""What options of PEFT's AdaLoRA and LoRA are called here."""


def unknown_options(names: Iterable[str]) -> str:
    """Those of `names` that are no options, with what may have been meant; "" if all are."""
    known = HALConfig.__dataclass_fields__
    words = []
    for name in sorted(set(names) - set(known), key=str):
        near = PEFT_NAMES.get(name) or next(iter(get_close_matches(str(name), known, 1)), None)
        words.append(repr(name) + (f" (did you mean {near!r}?)" if near else ""))
    return ", ".join(words)


def _checked_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A pattern's entries, its keys checked; None for an empty one."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}, expected a mapping from layer names")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} holds the key {key!r}, expected a name")
        try:
            names_layer(key, "")
        except re.error as error:
            raise ValueError(
                f"{name} holds the key {key!r}, expected a name or a regular expression for the "
                f"end of one ({error})"
            ) from None
    return dict(value) or None


def names_layer(key: str, name: str) -> bool:
    """Whether a pattern's key means the layer of this name, by PEFT's rule."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _matched(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return next((v for key, v in (pattern or {}).items() if names_layer(key, name)), default)


def _pattern(name: str, value: Any) -> str | tuple[str, ...]:
    """A regular expression or names, checked; a set of names in a fixed order."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name} is {value!r}, expected a list of names or a regular expression ({error})"
            ) from None
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError(f"{name} is {value!r}, expected a list of names or a regular expression")
    for entry in value:
        if not isinstance(entry, str):
            raise TypeError(f"{name} holds {entry!r}, expected names")
    return tuple(value) if isinstance(value, list | tuple) else tuple(sorted(value))


def _expect_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an int")
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


def _expect_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {choices}")
