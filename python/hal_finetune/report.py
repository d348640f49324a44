"""What a run leaves for people: plots of loss and ranks, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .data import hub_path
from .options import ON_KERNELS
from .plots import plot_losses, plot_ranks

LABELS = {
    "hyperadalora": "HyperAdaLoRA",
    "adalora": "AdaLoRA",
    "adalora-peft": "AdaLoRA (PEFT)",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


def write(
    out: Path,
    results: dict[str, Any],
    *,
    history: list[dict[str, Any]],
    ranks_before: dict[str, int],
    label_names: list[str] | None,
) -> None:
    """loss.png, ranks.png (where ranks are allocated), results.json and README.md.

    Args:
        results: what results.json holds: method, model, data, steps, metrics, settings, parameters,
            trainable_parameters, and ranks by layer.
        history: Trainer's log.
        ranks_before: ranks by layer at the start; empty where none are allocated.
        label_names: of a classifier; None: the model writes.
    """
    label = LABELS[results["method"]]
    logged = [entry for entry in history if "loss" in entry]
    if logged:
        # The last entry may end a shorter interval than the others.
        losses = [entry.get("task_loss", entry["loss"]) for entry in logged]
        every = logged[0]["step"]
        evaluated = [
            (entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry
        ]
        plot_losses(
            {label: losses}, out / "loss.png", every=every, mean_of=every, evaluated=evaluated
        )
    if ranks_before:
        plot_ranks(label, ranks_before, results["ranks"], out / "ranks.png")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    card = "\n".join(_card(out, results, ranks_before, label_names)) + "\n"
    (out / "README.md").write_text(card, encoding="utf-8")


def _card(
    out: Path,
    results: dict[str, Any],
    ranks_before: dict[str, int],
    label_names: list[str] | None,
) -> list[str]:
    method, model = results["method"], results["model"]
    settings = results["settings"]
    named = filter(None, (settings.get("dataset"), settings.get("eval_dataset")))
    library = {"full": "transformers"} | dict.fromkeys(ON_KERNELS, "hal_kernels")
    header = ModelCardData(
        base_model=None if Path(model).exists() else model,
        base_model_relation="finetune" if method == "full" else "adapter",
        datasets=list(dict.fromkeys(map(hub_path, named))) or None,
        library_name=library.get(method, "peft"),
        pipeline_tag="text-generation" if label_names is None else "text-classification",
        tags=[method, "generated_from_trainer"],
    )
    trained, total = results["trainable_parameters"], results["parameters"]
    lines = [
        "---", header.to_yaml(), "---", "", f"# {LABELS[method]} of {model}", "",
        f"Fine-tuned on {results['data']} for {results['steps']} optimizer steps by "
        f"`hal-finetune`; {trained:,} of {total:,} parameters trained "
        f"({100 * trained / total:.2f} %).", "",
        "## Results", "", "| metric | value |", "| --- | --- |",
        *(f"| {name} | {value:.4g} |" for name, value in sorted(results["metrics"].items())), "",
    ]  # fmt: skip
    for name, words in (("loss.png", "Loss"), ("ranks.png", "Ranks by layer")):
        if (out / name).exists():
            lines += [f"![{words}]({name})", ""]
    if ranks_before:
        first, kept = sum(ranks_before.values()), sum(results["ranks"].values())
        lines += [f"Rank budget: {first} directions at first, {kept} kept.", ""]
    lines += ["## Use", "", "```python", *_usage(method, model, label_names), "```", ""]
    lines += ["## Settings", "", "| option | value |", "| --- | --- |"]
    return lines + [f"| {name} | {value} |" for name, value in settings.items()]


def _usage(method: str, model: str, labels: list[str] | None) -> list[str]:
    kind = "AutoModelForCausalLM" if labels is None else "AutoModelForSequenceClassification"
    more = "" if labels is None else f", num_labels={len(labels)}"
    saved, base = ("model", '"model"') if method == "full" else ("adapter", f'"{model}"{more}')
    lines = [
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{saved}")',
        f"model = {kind}.from_pretrained({base})",
    ]
    if method in ON_KERNELS:
        load = 'hal_kernels.load_adapter(model, "adapter")'
        without = '# without hal_kernels: peft.PeftModel.from_pretrained(model, "lora")'
        return ["import hal_kernels", *lines, load, without]
    if method == "full":
        return lines
    load = 'model = PeftModel.from_pretrained(model, "adapter")'
    return ["from peft import PeftModel", *lines, load]
