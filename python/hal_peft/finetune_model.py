"""The model that is fine-tuned: loaded, and adapted by one of the methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)

import hal_kernels
from hal_kernels.targets import saved_module_names, target_layers

from .finetune_options import DataOptions, MethodOptions, OptionsError

ON_KERNELS = ("hyperadalora", "adalora")
"""Methods that `hal_kernels.patch_model` provides; the others are PEFT's, or none."""


def load_base(options: DataOptions, label_names: list[str] | None, *, full: bool, seed: int) -> Any:
    """The pretrained model: a classifier of these labels, or a causal language model for None.

    Raises:
        OptionsError: it can't be loaded.
    """
    assert options.model is not None  # settled with the options
    if options.dtype != "auto":
        dtype: Any = getattr(torch, options.dtype)
    else:  # weights that are all trained need the precision
        dtype = torch.float32 if full else "auto"
    torch.manual_seed(seed)  # of a new classifier
    try:
        if label_names is None:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                options.model,
                dtype=dtype,
                num_labels=len(label_names),
                id2label=dict(enumerate(label_names)),
                label2id={name: i for i, name in enumerate(label_names)},
            )
    except (OSError, ValueError) as error:
        raise OptionsError(f"--model {options.model}: {error}") from error
    if model.config.pad_token_id is None:
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    return model


def adapt(model: Any, options: MethodOptions, total_steps: int, seed: int) -> Any:
    """The model, adapted and with everything else frozen. `total_steps`: of the whole run.

    Raises:
        OptionsError: options that don't go together, or don't fit the model.
    """
    try:
        if options.method == "full":
            return model
        if options.method in ON_KERNELS:
            return hal_kernels.patch_model(model, config=hal_config(options, total_steps, seed))
        return _with_peft(model, options, total_steps, seed)
    except (TypeError, ValueError) as error:
        raise OptionsError(f"--method {options.method}: {error}") from error


def hal_config(options: MethodOptions, total_steps: int, seed: int) -> hal_kernels.HALConfig:
    """The options of `hal_kernels.patch_model`."""
    values: dict[str, Any] = {
        "rank": options.rank,
        "init_rank": options.init_rank,
        "targets": options.target_modules or "all-linear",
        "alpha": options.alpha,
        "dropout": options.dropout,
        "gamma": options.gamma,
        "interval": options.interval,
        "seed": seed,
    }
    if options.method == "hyperadalora":
        values |= {"hypernet": options.hypernet, "update": options.update}
    else:
        tinit, tfinal = _cubic(options, total_steps)
        values |= {
            "hypernet": "direct", "penalty": "frobenius", "allocation": "ema",
            "schedule": "cubic", "tinit": tinit, "tfinal": tfinal, "total_step": total_steps,
        }  # fmt: skip
    return hal_kernels.HALConfig(**values)


def _cubic(options: MethodOptions, total_steps: int) -> tuple[int, int]:
    tinit = total_steps // 10 if options.tinit is None else options.tinit
    tfinal = total_steps // 3 if options.tfinal is None else options.tfinal
    return tinit, tfinal


def _with_peft(model: Any, options: MethodOptions, total_steps: int, seed: int) -> Any:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    plain = hal_kernels.HALConfig(targets=options.target_modules or "all-linear")
    heads = saved_module_names(model, plain)
    common: dict[str, Any] = {
        # The same layers as with the other methods.
        "target_modules": list(target_layers(model, plain)),
        "modules_to_save": heads or None,
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "lora_dropout": options.dropout,
    }
    config: Any
    if options.method == "lora":
        config = LoraConfig(r=options.rank, lora_alpha=options.alpha, **common)  # type: ignore[arg-type]
    else:
        init_rank = options.init_rank or math.ceil(1.5 * options.rank)
        tinit, tfinal = _cubic(options, total_steps)
        config = AdaLoraConfig(
            init_r=init_rank,
            target_r=options.rank,
            # PEFT divides by the initial rank, hal_kernels by the target: this gives equal scaling.
            lora_alpha=options.alpha * init_rank / options.rank,  # type: ignore[arg-type]
            orth_reg_weight=options.gamma,
            deltaT=options.interval,
            tinit=tinit,
            tfinal=tfinal,
            total_step=total_steps,
            **common,
        )
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(model, config)
    return adapted


class AllocateRanks(TrainerCallback):
    """What PEFT's AdaLoRA wants called after every optimizer step, while gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.base_model.update_and_allocate(state.global_step + 1)


def ranks(model: Any, method: str) -> dict[str, int]:
    """Ranks by layer now; empty where the method allocates none."""
    if method in ON_KERNELS:
        return hal_kernels.rank_pattern(model)
    if method == "adalora-peft":
        from .demo_methods import adalora_ranks

        return adalora_ranks(model)
    return {}
