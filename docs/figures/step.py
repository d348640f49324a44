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


box(1, 24, 15, 12, "State", "factors of step i\nP, Λ, Q of all layers\n(buffers)")
box(
    25,
    24,
    17,
    12,
    "Hypernetworks Φ",
    "H_P, H_Λ, H_Q: shared\nby all layers, one call\n(what Adam trains)",
)
box(51, 24, 18, 12, "Packed factors", "one tensor per width\nΛ_eff = Λ ⊙ mask\nlayers hold views")
box(79, 24, 19, 12, "Adapted layers", "y = xWᵀ + b\n+ s·((xP) ⊙ Λ_eff) Q\none operator each")
box(51, 3, 18, 10, "Allocator", "every ΔT steps: prune the\nlowest |σ·∇σ| of all layers")
box(79, 3, 19, 10, "Loss", "task loss\n+ γ·orthogonality penalty")

arrow((16.5, 31), (24.5, 31), "", FORWARD, (20, 33))
arrow((42.5, 31), (50.5, 31), "generate", FORWARD, (46.5, 32.5))
arrow((69.5, 31), (78.5, 31), "P, Λ_eff, Q", FORWARD, (74, 32.5))
arrow((91, 23.5), (91, 13.5), "logits", FORWARD, (94, 18.5))
arrow((84, 13.5), (84, 23.5), "∂", BACKWARD, (82.6, 18.5), dashed=True)
arrow((78.5, 27), (69.5, 27), "gradients", BACKWARD, (74, 25.4), dashed=True)
arrow((50.5, 27), (42.5, 27), "∂Φ", BACKWARD, (46.5, 25.4), dashed=True)
arrow((57, 23.5), (57, 13.5), "∂Λ_eff\n(unmasked)", BACKWARD, (52.5, 18.5), dashed=True)
arrow((63, 13.5), (63, 23.5), "mask", FORWARD, (65.6, 18.5))
arrow((58, 36.5), (9, 36.5), "after optimizer.step(): detached factors become the state",
      INK, (33.5, 41.8), bend=0.10)  # fmt: skip
axes.text(1, 9, "forward", fontsize=8, color=FORWARD)
axes.plot([9, 15], [9.5, 9.5], color=FORWARD, lw=1.3)
axes.text(1, 6, "backward", fontsize=8, color=BACKWARD)
axes.plot([9, 15], [6.5, 6.5], color=BACKWARD, lw=1.3, ls="--")
axes.text(1, 2.6, 'hypernet="direct": P, Λ, Q are the parameters, and there is no Φ', fontsize=7.6)

figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")
