"""The SVD adapter added to an output: see `AdapterContract` for what is tested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import svd_adapter_add, svd_adapter_add_reference

from .adapter_cases import BAD_ARGUMENTS, FACTORS
from .adapter_contract import AdapterContract
from .util import assert_same, bounds, relative_error, results


class TestSvdAdapterAdd(AdapterContract):
    operator = staticmethod(svd_adapter_add)
    reference = staticmethod(svd_adapter_add_reference)
    names = ("y", "x", *FACTORS)
    base = ("y",)
    rows = ("y", "x")

    def test_reference_adds_the_dense_update(self):
        """The formula itself: y + s·x(P diag(Λ) Q)."""
        i = self.make(dtype=torch.float64)
        expected = i["y"] + 0.5 * i["x"] @ (i["p"].t() @ i["lam"].diag() @ i["q"])
        assert relative_error(svd_adapter_add_reference(**i, scaling=0.5), expected) <= 1e-14

    def test_leaves_the_base_output_alone(self):
        inputs = self.make()
        before = inputs["y"].clone()
        out = self.call()(**inputs)
        assert torch.equal(inputs["y"], before)
        assert out.data_ptr() != inputs["y"].data_ptr()

    @pytest.mark.parametrize(
        "y, x",
        [
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.float32),
        ],
    )
    def test_x_of_another_dtype(self, y, x):
        """Computed in y's dtype, as plain PyTorch would after ``x.to(y.dtype)``."""
        inputs = self.make(dtype=torch.float32)
        inputs["y"], inputs["x"] = inputs["y"].to(y), inputs["x"].to(x)
        dy = self.upstream(inputs).to(y)
        out = results(self.call(), inputs, dy)
        ref = results(self.formula(), inputs, dy, cast=torch.float64)
        plain = results(self.formula(dtype=y), inputs, dy)
        assert out["out"].dtype == y
        assert_same(out, ref, bounds(max(y, x, key=lambda d: torch.finfo(d).eps), plain, ref))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        """Under autocast the base layer's output is 16 bits wide and its input float32."""
        inputs = self.make((3, 5))
        inputs["y"] = inputs["y"].to(dtype)

        def under(function):
            def run(**leaves):
                with torch.autocast(inputs["x"].device.type, dtype):
                    return function(**leaves)

            return run

        dy = self.upstream(inputs).to(dtype)
        out = results(under(self.call()), inputs, dy)
        ref = results(self.formula(), inputs, dy, cast=torch.float64)
        plain = results(under(self.formula()), inputs, dy)
        assert out["out"].dtype == dtype
        assert_same(out, ref, bounds(dtype, plain, ref))

    def test_compile_with_x_as_the_base_output(self):
        inputs = self.make(d_out=12)
        del inputs["y"]
        self.check_compiled(lambda x, **factors: svd_adapter_add(x, x, **factors), inputs)

    @given(st.data())
    def test_random_shapes_and_options(self, data):
        self.check_random_shapes_and_options(data)

    @pytest.mark.parametrize("changes, exception, message", BAD_ARGUMENTS)
    def test_bad_arguments(self, changes, exception, message):
        self.check_error(changes, exception, message)

    @pytest.mark.parametrize(
        "changes, exception, message",
        [
            ({"y": None}, TypeError, r"y is a NoneType, expected a torch.Tensor"),
            ({"y": lambda t: t.char()}, TypeError, r"y has dtype torch.int8, expected a floating"),
            ({"y": lambda t: t[1:]}, ValueError, r"y has leading dimensions \(4,\), expected \(5,"),
            ({"y": lambda t: t[0]}, ValueError, r"y has leading dimensions \(\), expected \(5,\)"),
            ({"y": lambda t: t[:, 1:]}, ValueError, r"q has shape \(3, 7\), expected \(3, 6\)"),
            ({"x": lambda t: t[:, 1:]}, ValueError, r"p has shape \(3, 12\), expected \(3, 11\)"),
            ({"x": lambda t: t[0, 0], "y": lambda t: t[0]}, ValueError, r"x has shape \(\), exp"),
            ({"x": lambda t: t[0], "y": lambda t: t[0, 0]}, ValueError, r"y has shape \(\), exp"),
            ({"y": lambda t: t.to("meta")}, ValueError, r"y is on meta, expected cpu"),
        ],
    )
    def test_bad_base_output(self, changes, exception, message):
        self.check_error(changes, exception, message)
