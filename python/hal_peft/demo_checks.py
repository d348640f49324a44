"""What the demo does in processes of their own: measure peak memory, reload what it saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import hal_kernels

from .demo_data import Batch
from .demo_methods import Settings, build, load_base

_MEMORY_STEPS = 3
_MEMORY_LABELS = 8
_LORA_TOLERANCE = 1e-4
_ADAPTER, _LORA, _INPUTS, _RUN = "adapter", "lora", "check.safetensors", "check.json"


def peak_memory_mb(method: str, settings: Settings) -> float | None:
    """Peak resident memory of this process after a few training steps on full-length batches.

    None where the system does not say.
    """
    contender = build(method, settings, num_labels=_MEMORY_LABELS)
    shape = (settings.batch_size, settings.max_length)
    vocabulary = int(contender.model.config.vocab_size)
    for step in range(1, _MEMORY_STEPS + 1):
        batch = {
            "input_ids": torch.randint(vocabulary, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(_MEMORY_LABELS, shape[:1]),
        }
        contender.train_step(batch, step, budget=0)
    return _peak_resident_mb()


def _peak_resident_mb() -> float | None:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    # On Linux this one also counts what the parent held when it started this process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def save_for_check(
    model: Any, batch: Batch, settings: Settings, num_labels: int, out: Path
) -> None:
    """Save the trained adapter, its LoRA export, and a batch with the logits to be met again."""
    model.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    hal_kernels.save_adapter(model, out / _ADAPTER)
    hal_kernels.export_lora(model, out / _LORA)
    save_file({**inputs, "logits": logits.contiguous()}, out / _INPUTS)
    run = {
        "model": settings.model,
        "num_labels": num_labels,
        # Another head than the trained one started from: it must come out of the files.
        "seed": settings.seed + 1,
        # The order of summation, and so the last bit, depends on the number of threads.
        "threads": torch.get_num_threads(),
    }
    (out / _RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def verify(out: Path) -> list[tuple[str, bool]]:
    """Load both saved forms onto the base model; each check's outcome in words, and whether met."""
    run = json.loads((out / _RUN).read_text(encoding="utf-8"))
    inputs = load_file(out / _INPUTS)
    logits = inputs.pop("logits")
    torch.set_num_threads(run["threads"])

    model = load_base(run["model"], run["num_labels"], run["seed"])
    hal_kernels.load_adapter(model, out / _ADAPTER)
    loaded = model.eval()(**inputs).logits

    base = load_base(run["model"], run["num_labels"], run["seed"])
    lora = PeftModel.from_pretrained(base, str(out / _LORA))
    exported = lora.eval()(**inputs).logits

    count = f"{len(logits)} held-out inputs"
    equal = torch.equal(loaded, logits)
    distance = _distance(exported, logits)
    return [
        (
            f"load_adapter in a fresh process: logits of {count} "
            + ("equal bit for bit" if equal else f"differ by {_distance(loaded, logits):.1e}"),
            equal,
        ),
        (
            f"export_lora loaded by PEFT: logits of {count} differ by at most {distance:.1e} "
            f"(allowed {_LORA_TOLERANCE:.0e})",
            distance <= _LORA_TOLERANCE,
        ),
    ]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
