"""State that each thread has for itself."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .packed import Generation

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """`mine`: an object of every thread's own, made by `make()`.

    Passes of one model may run in several threads at once: a training loop and a server that
    answers, and autograd's own threads, which run checkpointed layers again. Copies and pickles
    start anew. (Attributes of this object itself would be lost where torch.compile sets them.)
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make, self.mine = make, make()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.make,)


class Pass:
    """The forward pass of the model under way in a thread."""

    def __init__(self) -> None:
        self.depth = 0  # nested calls of the model's forward
        self.live: Generation | None = None
        self.begins_step = False  # it is an accumulation window's first
