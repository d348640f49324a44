"""`HyperAdaLoraConfig`: the options of the PEFT method, in PEFT's names where it has them."""

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass, fields

from peft import PeftConfig

from hal_kernels import HALConfig


class HyperAdaLoraType(str, enum.Enum):  # noqa: UP042 (str() as PEFT's own PeftType has it)
    """The method's name, as a member of an enum like `peft.PeftType`, which takes none of others.

    A str, so that it is the key that a saved config's "HYPERADALORA" finds.
    """

    HYPERADALORA = "HYPERADALORA"


PEFT_NAMES = {
    "rank": "r", "init_rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
}  # fmt: skip
"""Fields of `HALConfig` that have another name here."""


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
        hypernet, norm_first, hidden, update, gamma, penalty, allocation, schedule,
            interval, prune_per_interval, tinit, tfinal, total_step, beta1, beta2, seed,
            skip_nonfinite: as for `hal_kernels.HALConfig`.

    Raises:
        TypeError, ValueError: an impossible option, naming it, or one that there is not.
    """

    r: int = 3
    init_r: int | None = None
    target_modules: list[str] | set[str] | str | None = "all-linear"
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    dtype: str = "float32"
    hypernet: str | None = None
    norm_first: bool = False
    hidden: int | None = None
    update: str | None = None
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
    seed: int | None = None
    skip_nonfinite: bool = True

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
        known = {field.name for field in fields(HALConfig)}
        values = {name: value for name, value in vars(self).items() if name in known}
        renamed = {name: getattr(self, theirs) for name, theirs in PEFT_NAMES.items()}
        with in_peft_names():
            return HALConfig.from_dict(values | renamed | {"modules_to_save": None})


@contextlib.contextmanager
def in_peft_names() -> Iterator[None]:
    """Errors of `HALConfig` begin with a field's name; let it be the one that it has here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, verb, rest = str(error).partition(" is ")
        raise type(error)(f"{PEFT_NAMES.get(name, name)}{verb}{rest}") from None
