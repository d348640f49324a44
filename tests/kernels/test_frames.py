"""What a reader walks through between a layer's forward and the kernel that computes it.

`pytest -s` prints it: one line a Python frame.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload

from hal_kernels import HALLinear
from hal_kernels.ops.svd_linear import triton as kernels

from .harness import DEVICE
from .svd_cases import dispatched, gpu_like


class Reached(Exception):
    pass


def path_from_layer(frame):
    """File and function of each frame from HALLinear.forward to `frame`, both of them counted."""
    found = []
    while frame.f_code is not HALLinear.forward.__code__:
        found.append(frame)
        frame = frame.f_back
    names = [f"{Path(f.f_code.co_filename).name}: {f.f_code.co_qualname}" for f in [*found, frame]]
    print("", *reversed(names), sep="\n  ")
    return names


@pytest.fixture
def layer():
    return HALLinear(32, 16, device=DEVICE)


def test_frames_to_the_operator(layer):
    """Below the last one, torch's dispatcher calls csrc."""
    seen = []

    def profile(frame, event, _):
        called = event == "call" and frame.f_code is OpOverload.__call__.__code__
        if called and frame.f_locals["self"].namespace == "hal":
            seen.append(path_from_layer(frame))

    x = torch.randn(4, 32, device=DEVICE)
    layer(x)
    sys.setprofile(profile)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert [len(names) for names in seen] == [4]


def test_frames_to_a_launch(layer, monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            seen.append(path_from_layer(sys._getframe(1)))
            raise Reached

    monkeypatch.setattr(kernels, "shrink_kernel", Kernel())
    gpu_like(monkeypatch, gemm_slowdown=1e9)  # no fused launch
    with dispatched("svd_linear"), pytest.raises(Reached):
        layer(torch.randn(4, 32, device=DEVICE))
    assert [len(names) for names in seen] == [8]
