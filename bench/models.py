"""The base models that steps are measured on: real configurations, random weights.

Speed and memory depend on shapes alone, so nothing is downloaded. Weights are bf16 for the large
models, and fp32 for the others as in the paper's runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

DECODER = r".*layers\..*(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass(frozen=True)
class Base:
    """A sequence classifier: its configuration, the layers to adapt, the head that is trained."""

    name: str
    config: Callable[[], Any]
    targets: str
    head: str
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False

    def build(self, device: torch.device) -> nn.Module:
        """The model, drawn from one seed and in training mode (no dropout: runs are compared)."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        with device:
            model: nn.Module = AutoModelForSequenceClassification.from_config(
                self.config(), dtype=self.dtype
            )
        if self.checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return model.train()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.build(torch.device("meta")).parameters())

    def require_memory(self, device: torch.device) -> None:
        """Refuse a model whose weights alone do not fit.

        Raises:
            SystemExit: they need more than what is free on `device` (of the host's for a CPU).
        """
        need = self.parameters * self.dtype.itemsize
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        if need > free:
            raise SystemExit(
                f"{self.name}: the weights need {need / 2**30:.1f} GiB in {self.dtype}, "
                f"{device.type} has {free / 2**30:.1f} GiB free; cut it with --layers, or take "
                "another --model"
            )


def roberta_base(
    *, layers: int = 12, width: int = 768, vocabulary: int = 50265, length: int = 512
) -> Base:
    """RoBERTa-base: six linear layers a block. Other widths keep heads of 64 and 4 × width."""

    def config() -> Any:
        from transformers import RobertaConfig

        return RobertaConfig(
            vocab_size=vocabulary, max_position_embeddings=length + 2, type_vocab_size=1,
            num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
            num_attention_heads=width // 64, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip

    targets = r".*encoder\.layer\..*(query|key|value|dense)"
    return Base("roberta-base", config, targets, "classifier")


def deberta_v3_base(*, layers: int = 12) -> Base:
    """DeBERTa-v3-base: disentangled attention, whose projections serve positions as well."""

    def config() -> Any:
        from transformers import DebertaV2Config

        return DebertaV2Config(
            vocab_size=128100, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12,
            intermediate_size=3072, type_vocab_size=0, relative_attention=True,
            position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_biased_input=False, layer_norm_eps=1e-7,
            pooler_hidden_size=768, pooler_hidden_act="gelu", pooler_dropout=0.0, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip

    targets = r".*encoder\.layer\..*(query_proj|key_proj|value_proj|dense)"
    return Base("deberta-v3-base", config, targets, "classifier")


def llama_31_8b(*, layers: int = 32) -> Base:
    def config() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
            rms_norm_eps=1e-5, use_cache=False, pad_token_id=0, num_labels=2,
        )  # fmt: skip

    return Base("llama-3.1-8b", config, DECODER, "score", torch.bfloat16)


def qwen25_7b(*, layers: int = 28) -> Base:
    return _qwen("qwen2.5-7b", layers, hidden=3584, intermediate=18944, heads=28, kv_heads=4)


def qwen25_14b(*, layers: int = 48) -> Base:
    return _qwen("qwen2.5-14b", layers, hidden=5120, intermediate=13824, heads=40, kv_heads=8)


def _qwen(
    name: str, layers: int, *, hidden: int, intermediate: int, heads: int, kv_heads: int
) -> Base:
    def config() -> Any:
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=152064, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=131072, use_cache=False, pad_token_id=0, num_labels=2,
        )  # fmt: skip

    return Base(name, config, DECODER, "score", torch.bfloat16)


BASES: dict[str, Callable[..., Base]] = {
    "roberta-base": roberta_base,
    "deberta-v3-base": deberta_v3_base,
    "llama-3.1-8b": llama_31_8b,
    "qwen2.5-7b": qwen25_7b,
    "qwen2.5-14b": qwen25_14b,
}
