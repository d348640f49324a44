"""Draws step.png, the figure of one training step in the README: python docs/figures/step.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, FORWARD, BACKWARD = "#1b1b1b", "#f1f3f5", "#1f4e79", "#a23b1e"

figure, axes = plt.subplots(figsize=(10, 4.3), dpi=160)
axes.set_xlim(0, 100)
axes.set_ylim(0, 43)
axes.axis("off")


def box(x: float, y: float, w: float, h: float, title: str, text: str, fill: str = SOFT) -> None:
    shape = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0.4", facecolor=fill, edgecolor=INK, lw=1
    )
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h - 1.8, title, ha="center", va="center", fontsize=9, weight="bold")
    axes.text(x + w / 2, y + (h - 3) / 2, text, ha="center", va="center", fontsize=7.6)


def arrow(
    start: tuple[float, float], end: tuple[float, float], text: str, color: str,
    at: tuple[float, float], dashed: bool = False, bend: float = 0.0,
) -> None:  # fmt: skip
    style = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.3, color=color, ls=style,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip
    axes.text(*at, text, fontsize=7.4, color=color, ha="center", va="center")


box(
    1, 24, 20, 12, "Packed factors", "P, Λ, Q of all layers\none tensor per width\nΛ_eff = Λ ⊙ mask"
)
box(39, 24, 20, 12, "Adapted layers", "y = xWᵀ + b\n+ s·((xP) ⊙ Λ_eff) Q\none operator each")
box(79, 24, 19, 12, "Loss", "the task's own")
box(1, 3, 20, 10, "Allocator", "every ΔT steps: prune the\nlowest |σ·∇σ| of all layers")
box(
    39,
    3,
    20,
    10,
    "Spectral step",
    "momentum, equal lengths,\nbest matrix of rank r;\nall layers in one call",
)
box(79, 3, 19, 10, "Learned gain", "do gradients agree\nwith the last steps?")

arrow((21.5, 31), (38.5, 31), "views", FORWARD, (30, 32.5))
arrow((59.5, 31), (78.5, 31), "logits", FORWARD, (69, 32.5))
arrow((78.5, 27), (59.5, 27), "∂", BACKWARD, (69, 28.5), dashed=True)
arrow((49, 23.5), (49, 13.5), "K = PGᵀ, L = QG", BACKWARD, (57, 18.5), dashed=True)
arrow((78.5, 8), (59.5, 8), "× learning rate = η", BACKWARD, (69, 9.5))
arrow((38.5, 11), (21.5, 25), "P⁺, Λ⁺, Q⁺", BACKWARD, (34.5, 18.5))
arrow((38.5, 5.5), (21.5, 5.5), "∇σ", BACKWARD, (30, 7))
arrow((11, 13.5), (11, 23.5), "mask", BACKWARD, (7.5, 18.5))
axes.text(22, 40.5, "forward", fontsize=8, color=FORWARD)
axes.plot([29, 35], [41, 41], color=FORWARD, lw=1.3)
axes.text(40, 40.5, "backward", fontsize=8, color=BACKWARD)
axes.plot([48, 54], [41, 41], color=BACKWARD, lw=1.3, ls="--")
axes.text(59, 40.5, "optimizer step", fontsize=8, color=BACKWARD)
axes.plot([71, 77], [41, 41], color=BACKWARD, lw=1.3)

figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")
