"""What a run leaves for people: plots of loss and ranks, and a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .plots import plot_losses, plot_rank_maps

LABELS = {
    "hyperadalora": "HyperAdaLoRA",
    "adalora": "AdaLoRA",
    "adalora-peft": "AdaLoRA (PEFT)",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


@dataclass
class Summary:
    """A finished run, as the card tells it."""

    method: str
    model: str
    data: str
    steps: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    trainable: int
    total: int
    history: list[dict[str, Any]]
    label_names: list[str] | None = None
    ranks_before: dict[str, int] = field(default_factory=dict)
    ranks_after: dict[str, int] = field(default_factory=dict)


def write(out: Path, summary: Summary) -> None:
    """loss.png, ranks.png (where ranks are allocated), results.json and README.md."""
    label = LABELS[summary.method]
    logged = [entry for entry in summary.history if "loss" in entry]
    if logged:
        # The last entry may end a shorter interval than the others.
        every = logged[0]["step"]
        losses = [entry.get("task_loss", entry["loss"]) for entry in logged]
        plot_losses({label: losses}, out / "loss.png", window=1, every=every)
    if summary.ranks_before:
        maps = {label: (summary.ranks_before, summary.ranks_after)}
        plot_rank_maps(maps, out / "ranks.png")
    results = {
        "method": summary.method, "model": summary.model, "data": summary.data,
        "steps": summary.steps, "metrics": summary.metrics, "settings": summary.settings,
        "trainable_parameters": summary.trainable, "ranks": summary.ranks_after,
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    (out / "README.md").write_text(_card(out, summary), encoding="utf-8")


def _card(out: Path, summary: Summary) -> str:
    on_kernels = summary.method in ("hyperadalora", "adalora")
    header = ModelCardData(
        base_model=None if Path(summary.model).exists() else summary.model,
        library_name="hal_kernels" if on_kernels else "transformers",
        tags=[summary.method, "generated_from_trainer"],
    )
    share = 100 * summary.trainable / summary.total
    lines = [
        "---", header.to_yaml(), "---", "",
        f"# {LABELS[summary.method]} of {summary.model}", "",
        f"Fine-tuned on {summary.data} for {summary.steps} optimizer steps by `hal-finetune`; "
        f"{summary.trainable:,} of {summary.total:,} parameters trained ({share:.2f} %).", "",
        "## Results", "", "| metric | value |", "| --- | --- |",
        *(f"| {name} | {value:.4g} |" for name, value in sorted(summary.metrics.items())), "",
    ]  # fmt: skip
    for name, words in (("loss.png", "Training loss"), ("ranks.png", "Ranks by layer")):
        if (out / name).exists():
            lines += [f"![{words}]({name})", ""]
    if summary.ranks_before:
        lines += [
            f"Rank budget: {sum(summary.ranks_before.values())} directions at first, "
            f"{sum(summary.ranks_after.values())} kept.", "",
        ]  # fmt: skip
    lines += ["## Use", "", "```python", *_usage(summary, on_kernels), "```", ""]
    lines += ["## Settings", "", "| option | value |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in summary.settings.items()]
    return "\n".join(lines) + "\n"


def _usage(summary: Summary, on_kernels: bool) -> list[str]:
    labels = summary.label_names
    kind = "AutoModelForCausalLM" if labels is None else "AutoModelForSequenceClassification"
    if summary.method == "full":
        return [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("model")']
    more = "" if labels is None else f", num_labels={len(labels)}"
    lines = [
        "import hal_kernels" if on_kernels else "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("{summary.model}"{more})',
    ]
    if on_kernels:
        lines.append('hal_kernels.load_adapter(model, "adapter")')
        return [*lines, '# without hal_kernels: peft.PeftModel.from_pretrained(model, "lora")']
    return [*lines, 'model = PeftModel.from_pretrained(model, "adapter")']
