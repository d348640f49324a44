"""A loop of one's own on several processes, by accelerate.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --steps 100

Without a GPU the same command makes processes on the CPU, which gloo connects.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import hal_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="accelerate_loop_out")
    options = parser.parse_args()

    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    hal_kernels.patch_model(model, rank=3, interval=max(1, options.steps // 20))  # before prepare
    tokens = torch.randint(0, 64, (512, 16))
    labels = (tokens[:, 1] < 32).long()  # what there is to learn
    loader = DataLoader(TensorDataset(tokens, labels), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    adapter = accelerator.unwrap_model(model).hal
    while adapter.steps < options.steps:
        for batch, target in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=target).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if adapter.steps == options.steps:
                break
    masks = accelerator.gather(adapter.mask[None])
    assert (masks == masks[0]).all()  # every process has pruned the same directions
    if accelerator.is_main_process:
        hal_kernels.save_adapter(accelerator.unwrap_model(model), options.out)
        kept = sum(hal_kernels.rank_pattern(model).values())
        print(f"{accelerator.num_processes} processes: loss {loss.item():.4f}, {kept} directions")
    accelerator.wait_for_everyone()  # or one process may take its connections down too early
    accelerator.end_training()


if __name__ == "__main__":
    main()
