"""Instruction tuning of a Llama on Alpaca's format, with TRL's SFTTrainer.

    python examples/sft_alpaca.py alpaca.jsonl --model meta-llama/Llama-3.2-1B

Without --model a tiny Llama of random weights reads bytes, which shows the way and learns little.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import SFTConfig, SFTTrainer

import hal_kernels
from hal_finetune.prompts import instruction
from hal_finetune.rows import read_records


def tiny_llama() -> tuple[Any, Any]:
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSONL (or .gz): instruction, input, output")
    parser.add_argument("--model", help="name or path of a causal language model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, help="use that many rows")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", default="sft_alpaca_out")
    options = parser.parse_args()

    if options.model is None:
        model, tokenizer = tiny_llama()
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    records = itertools.islice(read_records(options.file), options.rows)
    examples = [instruction(row) for row, _ in records]
    data = Dataset.from_list([{"prompt": e.prompt, "completion": e.answer} for e in examples])

    hal_kernels.patch_model(model, rank=3, interval=max(1, options.steps // 20))
    arguments = SFTConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        max_length=options.max_length,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available(),
    )
    SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    hal_kernels.save_adapter(model, Path(options.out) / "adapter")
    hal_kernels.export_lora(model, Path(options.out) / "lora", task_type="CAUSAL_LM")
    print(hal_kernels.rank_pattern(model))


if __name__ == "__main__":
    main()
