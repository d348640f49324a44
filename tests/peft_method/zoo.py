"""Tiny models of many architectures under PEFT, with batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import models
import peft
import torch
import training
import transformers as hf
from ops.util import relative_error  # noqa: F401  (the tests have it from here)
from torch import nn

import hal_peft

SMALL = models.SIZES
DECODER = SMALL | {"num_key_value_heads": 1, "use_cache": False}
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what PEFT is told of it."""

    name: str
    make: Callable[..., nn.Module]
    batch: Callable[[nn.Module], dict[str, Any]]
    task: str | None = None
    modules_to_save: tuple[str, ...] = ()
    targets: Any = "all-linear"
    some_target: str = ""  # a name ending of some of its linear layers

    def __str__(self) -> str:
        return self.name

    def config(self, **options: Any) -> hal_peft.HyperAdaLoraConfig:
        defaults = {
            "r": 2, "hypernet": "direct", "task_type": self.task, "target_modules": self.targets,
            "modules_to_save": list(self.modules_to_save) or None, "seed": 0,
        }  # fmt: skip
        return hal_peft.HyperAdaLoraConfig(**defaults | options)

    def adapted(self, *, dtype: torch.dtype = torch.float32, **options: Any) -> peft.PeftModel:
        return peft.get_peft_model(self.base(dtype=dtype), self.config(**options))

    def base(self, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in evaluation mode; the same weights every time."""
        return self.make(dtype=dtype).eval()


def tokens(model: nn.Module) -> dict[str, Any]:
    return models.batch(model, 2)


def cast(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.to(next(p for p in model.parameters() if p.is_floating_point()).dtype)


def pixels(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return {"pixel_values": cast(model, images), "labels": torch.tensor([0, 2])}


def two_texts(model: nn.Module) -> dict[str, Any]:
    ids = models.batch(model, 2)["input_ids"]
    return {"input_ids": ids, "labels": ids.flip(1)}


def sound(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 16, generator=generator)
    return {"input_features": cast(model, features), "labels": two_texts(model)["labels"]}


def vector(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, models.WIDTH, generator=generator)
    return {"x": cast(model, x), "labels": torch.tensor([0, 1, 2, 0])}


def made(kind: Any, config: Any) -> Callable[..., nn.Module]:
    def make(*, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (kind(config()) if config else kind()).to(dtype)

    return make


class Wired(nn.Module):
    """A custom classifier: subclasses say how x becomes features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(models.WIDTH, models.CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.features(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Shared(Wired):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(models.WIDTH, models.WIDTH)
        self.second = self.first

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Twice(Wired):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(models.WIDTH, models.WIDTH, bias=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.tanh(self.lin(x)))


class Containers(Wired):
    """Linear layers in a ModuleList, a ModuleDict and a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ModuleList(nn.Linear(models.WIDTH, models.WIDTH) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(models.WIDTH, 20)})
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(20, models.WIDTH))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.many:
            x = torch.tanh(layer(x))
        return self.last(self.named["a"](x))


class Tied(nn.Module):
    """A bag-of-words language model whose head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, models.WIDTH)
        self.lin = nn.Linear(models.WIDTH, models.WIDTH)
        self.head = nn.Linear(models.WIDTH, models.VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.lin(self.embed(ids)))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": loss, "logits": logits}


def ids(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, models.VOCABULARY, (2, 5), generator=generator)
    return {"ids": found, "labels": found.flip(1)}


def _deberta() -> Any:
    return hf.DebertaV2Config(
        **SMALL, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=32, pooler_dropout=0.0,
    )  # fmt: skip


def _t5() -> Any:
    return hf.T5Config(
        vocab_size=models.VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip


def _vit() -> Any:
    return hf.ViTConfig(**SMALL, image_size=8, patch_size=4)


def _whisper() -> Any:
    return hf.WhisperConfig(
        vocab_size=models.VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=8, max_target_positions=16,
        decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, dropout=0.0,
        suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
    )  # fmt: skip


CASES = [
    Case("bert", models.bert, tokens, "SEQ_CLS", some_target="query"),
    Case(
        "roberta",
        made(hf.RobertaForSequenceClassification, lambda: hf.RobertaConfig(**SMALL)),
        tokens, "SEQ_CLS", some_target="query",
    ),
    Case(
        "deberta", made(hf.DebertaV2ForSequenceClassification, _deberta), tokens, "SEQ_CLS",
        some_target="query_proj",
    ),
    Case("gpt2", models.gpt2, tokens, "CAUSAL_LM", some_target="c_attn"),
    Case("llama", models.llama, tokens, "CAUSAL_LM", some_target="q_proj"),
    Case(
        "qwen2", made(hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**DECODER | ENDS)), tokens,
        "CAUSAL_LM", some_target="q_proj",
    ),
    Case(
        "mistral", made(hf.MistralForCausalLM, lambda: hf.MistralConfig(**DECODER | ENDS)), tokens,
        "CAUSAL_LM", some_target="q_proj",
    ),
    Case(
        "t5", made(hf.T5ForConditionalGeneration, _t5), two_texts, "SEQ_2_SEQ_LM", some_target="q"
    ),
    Case(
        "vit", made(hf.ViTForImageClassification, _vit), pixels, modules_to_save=("classifier",),
        some_target="q_proj",
    ),
    Case(
        "whisper", made(hf.WhisperForConditionalGeneration, _whisper), sound, some_target="q_proj"
    ),
    Case("mlp", models.net, vector, modules_to_save=("classifier",), some_target="up.0"),
    Case("shared", made(Shared, None), vector, targets=["first"], some_target="first"),
    Case("twice", made(Twice, None), vector, targets=["lin"], some_target="lin"),
    Case(
        "containers", made(Containers, None), vector, modules_to_save=("head",),
        some_target="named.a",
    ),
    Case("tied", made(Tied, None), ids, targets=["lin"], some_target="lin"),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def adapter_of(model: nn.Module, name: str = "default") -> Any:
    return model.base_model.hal_adapters[name]


def logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


def perturb(model: peft.PeftModel, name: str = "default", size: float = 0.5) -> None:
    """Give an adapter singular values, as training would, and a ΔW of about the weights' size."""
    adapter = adapter_of(model, name)
    with torch.no_grad():
        adapter.lam.normal_(std=size)
        if not adapter.direct:  # where it is an input only
            for name, parameter in adapter.hypernet.named_parameters():
                if "_out." in name and name.endswith("weight"):  # of 312 inputs of that scale
                    std = size / 180 if name.startswith("lam") else 0.0015
                    parameter.normal_(std=std)
    adapter.forget()


def train(
    model: peft.PeftModel,
    batch: dict[str, Any],
    steps: int = 2,
    optimizer: Any = torch.optim.AdamW,
    lr: float = 1e-2,
) -> None:
    """Some optimizer steps; the model is left in evaluation mode."""
    training.train(model.train(), optimizer(training.trainable(model), lr=lr), [batch] * steps)
    model.eval()
