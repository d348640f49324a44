"""`HyperAdaLoraConfig`: the options of the PEFT method, in PEFT's names where it has them."""

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hal_kernels import HALConfig


class HyperAdaLoraType(str, enum.Enum):  # noqa: UP042 (str() as PEFT's own PeftType has it)
    """The method's name, as a member of an enum like `peft.PeftType`, which takes none of others.

    A str, so that it is the key that a saved config's "HYPERADALORA" finds.
    """

    HYPERADALORA = "HYPERADALORA"


HAL_OPTIONS = (
    "hypernet", "norm_first", "hidden", "update", "init", "offsets", "gamma", "penalty",
    "allocation", "schedule", "interval", "prune_per_interval", "tinit", "tfinal", "total_step",
    "beta1", "beta2", "seed", "skip_nonfinite", "rank_pattern", "alpha_pattern",
)  # fmt: skip
"""Fields that `HALConfig` has by the same name."""


@dataclass
class HyperAdaLoraConfig(PeftConfig):
    """Configuration of HyperAdaLoRA, for `peft.get_peft_model`.

    Args:
        r: target average rank of a layer; the budget is r × number of layers.
        init_r: rank that every layer starts with (a narrower layer: as many as its narrower side);
            None means ⌈1.5 · r⌉. As large as `r`: nothing is pruned.
        target_modules: names or endings of the layers to adapt, a regular expression for whole
            names, "all-linear" (the default, all but the output head), or None for the layers that
            PEFT's AdaLoRA adapts by default in this architecture.
        exclude_modules: names or endings, or a regular expression, left out of `target_modules`.
        lora_alpha: scaling s = lora_alpha / r, constant while pruning goes on.
        lora_dropout: probability of dropping an element of a layer's input, on the adapter's path.
        modules_to_save: names of modules trained in full and saved with the adapter. None: the
            task heads that the model has beside its base model, if it is one of transformers'.
            Those are added to a list, too, with a task type that has a head; [] means none.
        layers_to_transform: indices of the blocks to adapt, with `target_modules` as a list.
        layers_pattern: name of the ModuleList that the indices count in.
        rank_pattern: initial ranks of single layers, instead of `init_r`; keys are names, endings
            or regular expressions for an ending.
        alpha_pattern: lora_alpha of single layers.
        dtype: of factors and hypernetworks: "float32", "float64" or "bfloat16". They keep it
            whatever the base model's is, unless autocast_adapter_dtype=False asks for that.
        hypernet, norm_first, hidden, update, init, offsets, gamma, penalty, allocation,
            schedule, interval, prune_per_interval, tinit, tfinal, total_step, beta1, beta2, seed,
            skip_nonfinite: as for `hal_kernels.HALConfig`.

    Raises:
        TypeError, ValueError: an impossible option, naming it, or one that there is not.
    """

    r: int = field(default=3, metadata={"help": "Target average rank."})
    init_r: int | None = field(default=None, metadata={"help": "Initial rank; None: ⌈1.5 · r⌉."})
    target_modules: list[str] | set[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Names or endings of layers, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, endings or a regular expression to leave out."}
    )
    lora_alpha: float = field(default=8.0, metadata={"help": "Scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's path."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that the indices count in."}
    )
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "Initial ranks of single layers."}
    )
    alpha_pattern: dict[str, float] | None = field(
        default=None, metadata={"help": "lora_alpha of single layers."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of factors and hypernetworks."})
    hypernet: str | None = field(
        default=None, metadata={"help": "'bert', 'mlp', 'cnn', or 'direct' (AdaLoRA)."}
    )
    norm_first: bool = field(
        default=False, metadata={"help": "'bert': LayerNorm before each part instead of after."}
    )
    hidden: int | None = field(
        default=None, metadata={"help": "'bert': hidden width; None: the paper's 312."}
    )
    update: str = field(
        default="anchor", metadata={"help": "'anchor', 'replace', 'residual' or 'spectral'."}
    )
    init: str | None = field(
        default=None,
        metadata={"help": "Where P and Q start: 'gradient', 'random'; None: as fits."},
    )
    offsets: str = field(
        default="all",
        metadata={"help": "'anchor': what has trainable offsets: 'none', 'lam' or 'all'."},
    )
    gamma: float = field(default=0.1, metadata={"help": "Weight of the orthogonality penalty."})
    penalty: str = field(default="squared", metadata={"help": "'squared' or 'frobenius'."})
    allocation: str = field(
        default="sensitivity", metadata={"help": "'sensitivity', 'ema' or 'magnitude'."}
    )
    schedule: str = field(default="fixed", metadata={"help": "'fixed' or 'cubic'."})
    interval: int | None = field(
        default=None, metadata={"help": "Optimizer steps between allocations."}
    )
    prune_per_interval: int | None = field(
        default=None, metadata={"help": "'fixed': directions pruned at a time."}
    )
    tinit: int = field(default=0, metadata={"help": "'cubic': steps before allocations."})
    tfinal: int = field(default=0, metadata={"help": "'cubic': steps after the last one."})
    total_step: int | None = field(default=None, metadata={"help": "'cubic': all steps."})
    beta1: float = field(default=0.85, metadata={"help": "'ema': decay of the sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "'ema': decay of its uncertainty."})
    seed: int | None = field(default=None, metadata={"help": "Of the initial values."})
    skip_nonfinite: bool = field(
        default=True, metadata={"help": "Leave out steps whose gradients hold NaN or Inf."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HyperAdaLoraType.HYPERADALORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform comes with target_modules = {self.target_modules!r}, "
                "expected a list of names (a regular expression says itself which layers it means)"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern comes without layers_to_transform, which it explains")
        self.hal_config()  # raises for what is impossible

    def hal_config(self) -> HALConfig:
        """The same options for `hal_kernels`, where layers are not looked for."""
        values: dict[str, Any] = {name: getattr(self, name) for name in HAL_OPTIONS}
        renamed = {
            "rank": self.r,
            "init_rank": self.init_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "dtype": self.dtype,
            "modules_to_save": None,
        }
        with in_peft_names():
            return HALConfig.from_dict(values | renamed)


@contextlib.contextmanager
def in_peft_names() -> Iterator[None]:
    """Errors of `HALConfig` begin with a field's name; let it be the one that it has here."""
    names = {
        "rank is": "r is",
        "init_rank is": "init_r is",
        "alpha is": "lora_alpha is",
        "dropout is": "lora_dropout is",
    }
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for ours, theirs in names.items():
            if message.startswith(ours):
                message = theirs + message.removeprefix(ours)
                break
        raise type(error)(message) from None
