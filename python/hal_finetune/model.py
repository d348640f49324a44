"""The model that is fine-tuned: loaded, and adapted by one of the methods."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

import hal_kernels
from hal_kernels.integration import saved_module_names, starting_rate, target_layers

from .options import ON_KERNELS, DataOptions, MethodOptions, OptionsError
from .prompts import Prompted, encode


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, which pads with its end-of-text token if it has no other.

    Raises:
        OptionsError: it can't be loaded, or has neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # any kind: of the network, the hub, its files, tokenizers
        words = f"its tokenizer can't be loaded ({type(error).__name__}: {error})"
        raise OptionsError(f"--model {name}: {words}") from error
    if tokenizer.pad_token is None:  # decoder models
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise OptionsError(
            f"--model {name}: its tokenizer has neither a padding nor an end-of-text token: set "
            "its pad_token, and save it beside the model"
        )
    return tokenizer


def load_base(name: str, label_names: list[str] | None, *, dtype: str, seed: int) -> Any:
    """The pretrained model: a classifier of these labels, or a causal language model for None.

    Args:
        dtype: of its weights: "float32", …, or "auto", that of the checkpoint.
        seed: of a new classifier.

    Raises:
        OptionsError: it can't be loaded, or is of the wrong kind.
    """
    labels: dict[str, Any] = {}
    if label_names is not None:
        labels = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: i for i, name in enumerate(label_names)},
        }
    kind: Any = AutoModelForCausalLM if label_names is None else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    try:
        model = kind.from_pretrained(name, dtype=dtype, **labels)
    except Exception as error:  # any kind: of the network, the hub, its files, safetensors
        raise OptionsError(f"--model {name}: {_reason(error, label_names)}") from error
    if label_names is None and not _is_causal(model):
        raise OptionsError(
            f"--model {name}: a {model.config.model_type} that reads texts in both directions "
            "can't learn to write; take a causal language model (GPT-2, Llama, …)"
        )
    return model


def _reason(error: Exception, label_names: list[str] | None) -> str:
    """Why a model can't be loaded, in a sentence where transformers says a page or too little."""
    words = str(error) or repr(error)
    if words.startswith("Unrecognized configuration class"):
        use = "causal language model" if label_names is None else "text classifier"
        return f"transformers has no {use} of this architecture"
    if label_names is not None and "ignore_mismatched_sizes" in words:
        return (
            f"its shapes don't fit, as when it has a classifier of other labels than the data's "
            f"{len(label_names)} ({', '.join(map(repr, label_names[:9]))}); take the model that "
            "this one was fine-tuned from, or data with its labels"
        )
    return words


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Whether what comes later changes nothing at the first token."""
    if getattr(model, "is_quantized", False):  # its rounding may depend on all tokens
        return True
    training = model.training
    model.eval()
    texts = [torch.tensor([[5, *[token] * 7]], device=model.device) for token in (6, 7)]
    one, other = (model(input_ids=text % model.config.vocab_size).logits[0] for text in texts)
    model.train(training)
    return bool((one[0] - other[0]).abs().max() <= 1e-3 * (one[-1] - other[-1]).abs().max())


def expect_fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    options: DataOptions,
) -> None:
    """Raise OptionsError unless the model has an embedding of all in rows to train on."""
    longest = max(len(row["input_ids"]) for row in rows)
    known = set(tokenizer.all_special_ids)
    if longest > options.max_length or all(known.issuperset(row["input_ids"]) for row in rows):
        raise OptionsError(
            f"--max-length is {options.max_length}, and the tokenizer of --model {options.model} "
            "makes nothing but special tokens of the texts: expected a larger length, or a "
            "tokenizer that knows their words (are its files missing beside the model's?)"
        )
    top = max(tokenizer.pad_token_id, *(max(row["input_ids"]) for row in rows))
    size = model.get_input_embeddings().weight.shape[0]
    if top >= size:
        raise OptionsError(
            f"--model {options.model}: its tokenizer gives token {top}, expected less than {size}, "
            "of which it has embeddings: model and tokenizer don't belong together"
        )
    end = model.config.eos_token_id
    if getattr(model.config, "is_encoder_decoder", False):
        ends = {row["input_ids"].count(end) for row in rows}
        if len(ends) > 1 or 0 in ends:
            raise OptionsError(
                f"--model {options.model}: a {model.config.model_type} tells a text's class at its "
                f"end-of-text token ({end}), expected as many in every row; its tokenizer gives "
                f"{' or '.join(map(str, sorted(ends)))}: let it end every text with that token, "
                "and take it out of the texts"
            )
    positions = _positions(model)
    if positions is not None and longest > positions:
        raise OptionsError(
            f"--max-length is {options.max_length} and the longest row takes {longest} tokens, "
            f"expected at most {positions}, the positions of --model {options.model}"
        )


def expect_room(
    model: Any, tokenizer: Any, examples: Sequence[Prompted], options: DataOptions
) -> None:
    """Raise OptionsError unless an answer can follow each of the prompts."""
    positions = _positions(model)
    prompt = min(max(map(len, encode(tokenizer, examples))), options.max_length)
    if positions is not None and prompt + options.max_new_tokens > positions:
        raise OptionsError(
            f"--max-new-tokens is {options.max_new_tokens} and the longest prompt takes {prompt} "
            f"tokens, expected at most {positions} together, the positions of --model "
            f"{options.model} (see --max-length, too; --generate false writes no answers)"
        )


def _positions(model: Any) -> int | None:
    """How many positions a model has a table of; None: it has none, as with rotary embeddings."""
    sizes = [
        module.num_embeddings
        # RoBERTa counts from its padding index, BART from an offset.
        - (0 if module.padding_idx is None else module.padding_idx + 1)
        - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and re.search(r"(^|\.)(wpe|embed_positions|positions?_embed\w*)$", name)
    ]
    return min(sizes, default=None)


def adapt(
    model: Any, options: MethodOptions, *, classifies: bool, total_steps: int, seed: int
) -> Any:
    """The model, adapted and with everything else frozen.

    Args:
        classifies: it is a classifier, with a head to be trained in full.
        total_steps: of the whole run.

    Raises:
        OptionsError: options that don't go together, or don't fit the model.
    """
    try:
        if options.method == "full":
            return model
        if options.method in ON_KERNELS:
            return hal_kernels.patch_model(model, config=hal_config(options, total_steps, seed))
        return _with_peft(model, options, classifies, total_steps, seed)
    except (TypeError, ValueError) as error:
        raise OptionsError(f"--method {options.method}: {error}") from error


def learning_rate(model: Any, method: str) -> float:
    """The peak to take for an adapted model where none is given."""
    if method in ON_KERNELS:
        return starting_rate(model)
    return {"adalora-peft": 1e-2, "lora": 3e-4, "full": 2e-5}[method]


def hal_config(options: MethodOptions, total_steps: int, seed: int) -> hal_kernels.HALConfig:
    """The options of `hal_kernels.patch_model`."""
    same = ("rank", "init_rank", "alpha", "dropout", "gamma", "interval")
    values: dict[str, Any] = {name: getattr(options, name) for name in same}
    values |= {"targets": options.target_modules or "all-linear"}
    values |= {"total_step": total_steps, "seed": seed}
    if options.method == "hyperadalora":
        values |= {"hypernet": options.hypernet, "update": options.update}
    elif options.method in ("adalora", "adalora-peft"):
        values |= {
            "hypernet": "direct", "penalty": "frobenius", "allocation": "ema", "schedule": "cubic",
            "tinit": total_steps // 10 if options.tinit is None else options.tinit,
            "tfinal": total_steps // 3 if options.tfinal is None else options.tfinal,
        }  # fmt: skip
        if options.interval is None:
            values["interval"] = max(1, min(100, total_steps // 20))
    return hal_kernels.HALConfig(**values)


def _with_peft(
    model: Any, options: MethodOptions, classifies: bool, total_steps: int, seed: int
) -> Any:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    checked = hal_config(options, total_steps, seed)  # PEFT lets much pass
    layers = target_layers(model, checked)
    common: dict[str, Any] = {
        # The same layers as with the other methods.
        "target_modules": list(layers),
        "modules_to_save": saved_module_names(model, checked) or None,
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "lora_dropout": options.dropout,
    }
    config: Any
    if options.method == "lora":
        config = LoraConfig(r=options.rank, lora_alpha=options.alpha, **common)  # type: ignore[arg-type]
    else:
        init_rank = options.init_rank or math.ceil(1.5 * options.rank)
        if init_rank == options.rank:
            raise ValueError(
                f"init_rank is {init_rank}, expected more than rank: PEFT's AdaLoRA fails at its "
                "first allocation if there is nothing to prune (adalora does not)"
            )
        config = AdaLoraConfig(
            init_r=init_rank,
            target_r=options.rank,
            # PEFT divides by the initial rank, hal_kernels by the target: this gives equal scaling.
            lora_alpha=options.alpha * init_rank / options.rank,  # type: ignore[arg-type]
            orth_reg_weight=options.gamma,
            deltaT=checked.interval,  # type: ignore[arg-type]
            tinit=checked.tinit,
            tfinal=checked.tfinal,
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
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.grad is None:  # of a layer that no batch has called
                parameter.grad = torch.zeros_like(parameter)
        model.base_model.update_and_allocate(state.global_step + 1)


class Begins(TrainerCallback):
    """Notes that training begins: what went wrong before is of the checkpoint it goes on from.

    Raises:
        OptionsError: that checkpoint's adapter was made with other options than this run's.
    """

    def __init__(self, model: Any) -> None:
        self.begun = False
        self.asked = model.hal.config if hasattr(model, "hal") else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = getattr(getattr(kwargs["model"], "hal", None), "config", self.asked)
        for name in ("rank", "init_rank", "alpha", "dropout", "gamma", "interval"):
            was, now = getattr(found, name, None), getattr(self.asked, name, None)
            if was != now:
                flag = f"--{name.replace('_', '-')}"
                raise OptionsError(f"{flag} is {now}, and {was} in the run that is to go on")
        self.begun = True


def ranks(model: Any, method: str) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks by layer, at first and now; both empty where the method allocates none."""
    if method in ON_KERNELS:
        first = {layer.name: layer.init_rank for layer in model.hal.layout.layers}
        return first, hal_kernels.rank_pattern(model)
    return adalora_ranks(model) if method == "adalora-peft" else ({}, {})


def adalora_ranks(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """`ranks` of PEFT's AdaLoRA, which prunes by a pattern and leaves its tensors as they are."""
    kept = model.peft_config["default"].rank_pattern or {}
    first, now = {}, {}
    for name, parameter in model.base_model.model.named_parameters():
        layer, found, _ = name.partition(".lora_E.")
        if found:
            first[layer] = len(parameter)
            # Saving the model takes the adapter's name out of the pattern's keys.
            pattern = kept.get(name, kept.get(name.removesuffix(".default")))
            now[layer] = len(parameter) if pattern is None else sum(pattern)
    return first, now
