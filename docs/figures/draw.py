"""Draws the README's step.png and house.md's house.png: python docs/figures/draw.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, FORWARD, BACKWARD = "#1b1b1b", "#f1f3f5", "#1f4e79", "#a23b1e"


def canvas(width: float, height: float) -> Axes:
    """Axes of `width` × `height` units, ten to an inch."""
    _, axes = plt.subplots(figsize=(width / 10, height / 10), dpi=160)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return axes


def save(axes: Axes, name: str) -> None:
    axes.figure.savefig(Path(__file__).with_name(f"{name}.png"), bbox_inches="tight")


def box(axes: Axes, x: float, y: float, w: float, h: float, title: str, text: str) -> None:
    shape = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0.4", facecolor=SOFT, edgecolor=INK, lw=1
    )
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h - 1.8, title, ha="center", va="center", fontsize=9, weight="bold")
    axes.text(x + w / 2, y + (h - 3) / 2, text, ha="center", va="center", fontsize=7.6)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, color: str,
    at: tuple[float, float], dashed: bool = False,
) -> None:  # fmt: skip
    """An arrow, with its text centred `at` a point."""
    style = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.3, color=color, ls=style
        )
    )
    axes.text(*at, text, fontsize=7.4, color=color, ha="center", va="center")


def step() -> None:
    """One training step."""
    axes = canvas(100, 43)
    for x, y, w, h, title, text in (
        (1, 24, 20, 12, "Packed factors",
         "P, Λ, Q of all layers\none tensor per width\nΛ_eff = Λ ⊙ mask"),
        (39, 24, 20, 12, "Adapted layers",
         "y = xWᵀ + b\n+ s·((xP) ⊙ Λ_eff) Q\none operator each"),
        (79, 24, 19, 12, "Loss", "the task's own"),
        (1, 3, 20, 10, "Allocator", "every ΔT steps: prune the\nlowest |σ·∇σ| of all layers"),
        (39, 3, 20, 10, "Spectral step",
         "momentum, equal lengths,\nbest matrix of rank r;\nall layers in one call"),
        (79, 3, 19, 10, "Learned gain", "do gradients agree\nwith the last steps?"),
    ):  # fmt: skip
        box(axes, x, y, w, h, title, text)
    arrow(axes, (21.5, 31), (38.5, 31), "views", FORWARD, (30, 32.5))
    arrow(axes, (59.5, 31), (78.5, 31), "logits", FORWARD, (69, 32.5))
    arrow(axes, (78.5, 27), (59.5, 27), "∂", BACKWARD, (69, 28.5), dashed=True)
    arrow(axes, (49, 23.5), (49, 13.5), "K = PGᵀ, L = QG", BACKWARD, (57, 18.5), dashed=True)
    arrow(axes, (78.5, 8), (59.5, 8), "× learning rate = η", BACKWARD, (69, 9.5))
    arrow(axes, (38.5, 11), (21.5, 25), "P⁺, Λ⁺, Q⁺", BACKWARD, (34.5, 18.5))
    arrow(axes, (38.5, 5.5), (21.5, 5.5), "∇σ", BACKWARD, (30, 7))
    arrow(axes, (11, 13.5), (11, 23.5), "mask", BACKWARD, (7.5, 18.5))
    axes.text(22, 40.5, "forward", fontsize=8, color=FORWARD)
    axes.plot([29, 35], [41, 41], color=FORWARD, lw=1.3)
    axes.text(40, 40.5, "backward", fontsize=8, color=BACKWARD)
    axes.plot([48, 54], [41, 41], color=BACKWARD, lw=1.3, ls="--")
    axes.text(59, 40.5, "optimizer step", fontsize=8, color=BACKWARD)
    axes.plot([71, 77], [41, 41], color=BACKWARD, lw=1.3)
    save(axes, "step")


def house() -> None:
    """Who imports whom: every arrow points down."""
    axes = canvas(100, 74)
    for x, y, w, title, text in (
        (1, 60, 28, "hal_finetune", "the command: data, templates,\ntraining, evaluation"),
        (36, 60, 28, "hal_peft", "HyperAdaLoRA as a PEFT method,\na trainer for Trainer's users"),
        (71, 60, 28, "examples, bench, tools",
         "demo and loops; measurements;\nahead-of-time report, tuner"),
        (1, 42, 98, "hal_kernels: what a user calls",
         "patch_model (patching, targets, config)   ·   "
         "save_adapter, load_adapter (saving, checkpoint)\n"
         "merge, compact, export_lora, rank_pattern, …: one file each"
         "   ·   integration: the same for packages"),
        (1, 24, 63, "hal_kernels/nn: what a model holds",
         "linear: HALLinear, any other layer   ·   shared_input: q, k, v in one pass\n"
         "adapter: packed factors, hooks   ·   spectral, hypernet, allocation: what moves them"),
        (71, 24, 28, "stepping", "torch's optimizer hooks tell\nthe adapter of a step"),
        (36, 3, 28, "ops/<operator>/", "formula, checks, autograd,\nreference, plain PyTorch"),
        (1, 3, 28, "csrc", "the native operators\nfor CPUs, in C++"),
        (71, 3, 28, "ops/<operator>/triton",
         "the kernels for GPUs;\nkernels/: tiles, launches, dropout"),
    ):  # fmt: skip
        box(axes, x, y, w, 10, title, text)
    for x in (15, 50, 85):
        arrow(axes, (x, 59.3), (x, 52.9), "", FORWARD, (x, 56))
    arrow(axes, (29.8, 65), (35.2, 65), "", FORWARD, (33, 66))
    arrow(axes, (32, 41.3), (32, 34.9), "", FORWARD, (32, 38))
    arrow(axes, (85, 41.3), (85, 34.9), "", FORWARD, (85, 38))
    arrow(axes, (70.2, 29), (64.8, 29), "", FORWARD, (67, 30))
    said = "public functions check their arguments,\nlayers call what is behind the checks"
    arrow(axes, (50, 23.3), (50, 13.9), said, FORWARD, (68, 18.6))
    arrow(axes, (35.2, 8), (29.8, 8), "CPU", FORWARD, (32.5, 9.6))
    arrow(axes, (64.8, 8), (70.2, 8), "CUDA", FORWARD, (67.5, 9.6))
    save(axes, "house")


step()
house()
