"""Tiny models shared by the tests, and batches for them. Weights depend on the seed alone."""

from typing import Any

import torch
from torch import nn

VOCABULARY = 64
CLASSES = 3
WIDTH = 16
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "problem_type": "single_label_classification",  # else the first forward settles it
}  # fmt: skip


class Net(nn.Module):
    """Residual MLP classifier: `depth` blocks of two linear layers, 16 -> hidden -> 16.

    Returns ``{"logits": ...}``, with labels ``{"loss": ..., "logits": ...}``.
    """

    def __init__(self, depth: int = 2, hidden: int = 24) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, WIDTH) for _ in range(depth))
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return x + self.down[index](torch.tanh(self.up[index](x)))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(len(self.up)):
            x = self.block(index, x)
        return x

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.features(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Holder(nn.Module):
    """x -> {"logits": …} through whatever layers it is given."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x, labels=None):
        for name, layer in self.named_children():
            if name != "hal":
                x = layer(x)
        if labels is None:
            return x
        return {"logits": x, "loss": nn.functional.cross_entropy(x, labels)}


def net(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    """A `Net` in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**options).to(dtype)


def bert(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A two-layer BERT sequence classifier without dropout, in training mode."""
    from transformers import BertConfig, BertForSequenceClassification

    return _made(BertForSequenceClassification, BertConfig(**(SIZES | options)), seed, dtype)


def llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A two-layer Llama language model, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "use_cache": False,
    }  # fmt: skip
    return _made(LlamaForCausalLM, LlamaConfig(**(sizes | options)), seed, dtype)


def gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A two-layer GPT-2 language model (Conv1D layers, tied head) without dropout, training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return _made(GPT2LMHeadModel, GPT2Config(**(sizes | options)), seed, dtype)


def _made(kind: Any, config: Any, seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).to(dtype).train()


def batch(model: nn.Module, size: int = 4, *, seed: int = 0, length: int = 6) -> dict[str, Any]:
    """Keyword arguments for one training forward of any of the models above, labels included."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    if not hasattr(model, "config"):
        dtype = next(model.parameters()).dtype
        return {"x": torch.randn(size, WIDTH, generator=generator).to(dtype), "labels": labels}
    tokens = torch.randint(0, VOCABULARY, (size, length), generator=generator)
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    return {"input_ids": tokens, "labels": tokens if causal else labels}


def logits_of(output: Any) -> torch.Tensor:
    """The logits of any of these models' outputs."""
    return output["logits"]


def loss_of(output: Any) -> torch.Tensor:
    """The loss of any of these models' outputs."""
    return output["loss"]
