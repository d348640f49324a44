"""The kernels run under Triton's interpreter here, or compiled where there is a GPU.

On a GPU every test of this folder carries the marker `gpu`; without one those that carry it by
themselves (shapes too large to be interpreted, say) are skipped.
"""

import math
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not GPU and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Spare the interpreter half of its time.

    At each call of a device function it makes triton.language its own, which it has done for the
    kernel around that call; and for each value it makes a shape of constexprs, a type's name, and a
    dictionary of all dtypes.
    """
    if GPU:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    known, blocks, shapes, scalars = set(), {}, {}, {}
    np_dtype = interpreter._get_np_dtype

    def call(self, *args, **kwargs):
        if self.fn not in known:
            known.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def make_tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = (
                tl.tuple([tl.constexpr(s) for s in shape]),
                tl.constexpr(math.prod(shape)),
            )
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def make_block_type(self, element_ty, shape):
        shape = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        if shape not in blocks:
            blocks[shape] = tl.tuple(list(shape)), tl.core.validate_block_shape(shape)
        self.element_ty, (self.shape, self.numel) = element_ty, blocks[shape]

    def quick_np_dtype(type):
        scalar = type.scalar if type.is_block() else type
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in scalars:
            scalars[scalar.name] = np_dtype(scalar)
        return scalars[scalar.name]

    name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", quick_np_dtype)
        patch.setattr(tl.tensor, "__init__", make_tensor)
        patch.setattr(tl.block_type, "__init__", make_block_type)
        patch.setattr(tl.block_type, "name", name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreted_bfloat16():
    """Mend the interpreter's bfloat16, which it keeps as uint16.

    It multiplies those in a dot, which takes float32 here instead; and it truncates float32, where
    a GPU rounds to the nearest.
    """
    if GPU:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, precision, imprecise):
        def widened(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            data = _convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
            return TensorHandle(data, tl.float32)

        return dot(self, widened(a), widened(b), d, precision, imprecise)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16).reshape(src.data.shape), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        yield
