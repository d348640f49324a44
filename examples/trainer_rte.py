"""transformers' Trainer on RTE: patch the model, and train as ever.

    python examples/trainer_rte.py rte_train.jsonl.gz rte_dev.jsonl --model roberta-base

Each line of the files holds sentence1, sentence2 and label.
"""

import argparse
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

import hal_kernels
from hal_finetune.data import encode, load
from hal_finetune.options import DataOptions
from hal_peft.trainer import AdapterTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train_file")
    parser.add_argument("dev_file")
    parser.add_argument("--model", default="roberta-base")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, help="use that many rows of each file")
    parser.add_argument("--out", default="trainer_rte_out")
    options = parser.parse_args()

    data = load(DataOptions(train_file=options.train_file, eval_file=options.dev_file), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, dev = (encode(tokenizer, s[: options.rows], 256) for s in (data.train, data.held_out))
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    hal_kernels.patch_model(model, rank=3, interval=max(1, options.steps // 20))

    arguments = TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
    )
    # transformers' own Trainer does as well; this one saves the adapter alone, and logs the
    # penalty and the task's loss apart.
    trainer = AdapterTrainer(
        model,
        arguments,
        train_dataset=train,  # type: ignore[arg-type]
        eval_dataset=dev,  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
    )
    trainer.train()
    print(trainer.evaluate())
    hal_kernels.save_adapter(model, Path(options.out) / "adapter")
    hal_kernels.export_lora(model, Path(options.out) / "lora", task_type="SEQ_CLS")


if __name__ == "__main__":
    main()
