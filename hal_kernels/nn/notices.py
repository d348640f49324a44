"""What would otherwise go wrong in silence: noticed while training, and warned of once."""

import sys
import warnings
from collections import deque
from collections.abc import Sequence
from types import FrameType

_SKIPPED = (
    "an optimizer step is left out because its gradients hold NaN or Inf; if it happens often, "
    "lower the learning rate, or train a float16 model in bfloat16 or under torch.amp.GradScaler"
)
_MOSTLY_SKIPPED = (
    "more than half of the last 20 optimizer steps were left out because their gradients hold NaN "
    "or Inf, so the model hardly trains: lower the learning rate, or train a float16 model in "
    "bfloat16 or under torch.amp.GradScaler"
)
_NO_PENALTY = (
    "this step's loss had no orthogonality penalty: call model.train() before training (models "
    "that from_pretrained returns are in eval mode), add hal_kernels.penalty(model) to a loss that "
    "is computed outside the model, or do without by gamma=0"
)
_LEFT_OUT = (
    "an optimizer trains parameters of the patched model, but none holds the adapter's, which so "
    "stays as it is: make the optimizer after the adapter, from all parameters that require "
    "gradients (or freeze the adapter with requires_grad_(False))"
)


class Notices:
    """What was noticed of one adapter's training."""

    def __init__(self) -> None:
        self.penalized = False  # a loss had the penalty since the last optimizer step
        self.optimized = False  # something steps the adapter's parameters, or it was warned of
        self._skipped: deque[bool] = deque(maxlen=20)
        self._issued: set[str] = set()

    def gradients_checked(self, *, finite: bool) -> None:
        self._skipped.append(not finite)
        if not finite:
            self.warn(_SKIPPED)
        if sum(self._skipped) > 10:
            self.warn(_MOSTLY_SKIPPED)

    def step_taken(self, gamma: float) -> None:
        if gamma > 0 and not self.penalized:
            self.warn(_NO_PENALTY)
        self.penalized, self.optimized = False, True

    def left_out(self) -> None:
        self.warn(_LEFT_OUT)
        self.optimized = True

    def warn(self, text: str) -> None:
        """Once, at the innermost line that is neither torch's nor ours."""
        if text in self._issued:
            return
        self._issued.add(text)
        level = 1
        frame: FrameType | None = sys._getframe()
        while frame is not None and _package(frame) in ("hal_kernels", "torch"):
            level, frame = level + 1, frame.f_back
        warnings.warn(f"hal_kernels: {text}", stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message, the first few of many."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
