"""The SVD linear layer against its formula: see `AdapterContract` for what is tested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import svd_linear, svd_linear_reference

from .adapter_cases import BAD_ARGUMENTS, FACTORS, make_mask
from .adapter_contract import AdapterContract
from .util import EXACT, assert_same, bounds, laid_out, relative_error, results


class TestSvdLinear(AdapterContract):
    operator = staticmethod(svd_linear)
    reference = staticmethod(svd_linear_reference)
    names = ("x", "weight", "bias", *FACTORS)
    base = ("weight", "bias")
    rows = ("x",)

    def test_reference_is_the_merged_layer(self):
        """The formula itself: y = x(W + s·Qᵀdiag(Λ)Pᵀ)ᵀ + b."""
        i = self.make(dtype=torch.float64)
        merged = i["weight"] + 0.5 * i["q"].t() @ i["lam"].diag() @ i["p"]
        expected = i["x"] @ merged.t() + i["bias"]
        assert relative_error(svd_linear_reference(**i, scaling=0.5), expected) <= 1e-14

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_without_bias(self, dtype):
        self.check({**self.make(dtype=dtype), "bias": None})

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_layout_of_the_weight(self, layout, dtype):
        """A transposed view is what transformers' Conv1D has for a weight."""
        inputs = self.make(dtype=dtype)
        inputs["weight"] = laid_out(inputs["weight"], layout)
        self.check(inputs)

    def test_gradient_of_a_transposed_parameter(self):
        """Conv1D's own weight is [d_in, d_out]; its gradient passes through the view."""
        inputs = self.make()
        stored = inputs.pop("weight").t().contiguous()

        def call(stored, **rest):
            return svd_linear(weight=stored.t(), **rest)

        def formula(stored, **rest):
            return svd_linear_reference(weight=stored.t(), **rest)

        inputs = {"stored": stored, **inputs}
        dy = self.upstream(inputs)
        ref = results(formula, inputs, dy, cast=torch.float64)
        assert_same(results(call, inputs, dy), ref, EXACT[torch.float32])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False])
    def test_autocast(self, dtype, bias):
        """float32 inputs: the output has autocast's dtype, the gradients are float32."""
        inputs = self.make((3, 5))
        inputs["bias"] = inputs["bias"] if bias else None
        mask = make_mask("some", 3)

        def under(function):
            def run(**leaves):
                with torch.autocast(inputs["x"].device.type, dtype):
                    return function(**leaves)

            return run

        dy = self.upstream({**inputs, "x": inputs["x"].to(dtype)})
        out = results(under(self.call(mask)), inputs, dy)
        ref = results(self.formula(mask), inputs, dy, cast=torch.float64)
        plain = results(under(self.formula(mask)), inputs, dy)
        assert out["out"].dtype == dtype
        assert_same(out, ref, bounds(dtype, plain, ref))

    def test_autocast_leaves_float64_alone(self):
        inputs = self.make(dtype=torch.float64)
        with torch.autocast(inputs["x"].device.type, torch.bfloat16):
            self.check(inputs)

    def test_compile_under_autocast(self):
        def function(**inputs):
            with torch.autocast(inputs["x"].device.type, torch.bfloat16):
                return self.call()(**inputs)

        self.check_compiled(function, self.make(), ["x", *FACTORS])

    @pytest.mark.slow
    def test_compile_with_inductor(self):
        self.check_compiled(self.call(make_mask("some", 3)), self.make(), backend="inductor")

    @given(st.data())
    def test_random_shapes_and_options(self, data):
        self.check_random_shapes_and_options(data)

    @pytest.mark.parametrize("changes, exception, message", BAD_ARGUMENTS)
    def test_bad_arguments(self, changes, exception, message):
        self.check_error(changes, exception, message)

    @pytest.mark.parametrize(
        "changes, exception, message",
        [
            ({"weight": None}, TypeError, r"weight is a NoneType, expected a torch.Tensor"),
            ({"weight": lambda t: t.char()}, TypeError, r"weight has dtype torch.int8, expected"),
            ({"weight": lambda t: t[0]}, ValueError, r"weight has shape \(12,\), expected \[d_out"),
            ({"weight": lambda t: t.t()}, ValueError, r"x has shape \(5, 12\), expected .*7\]"),
            ({"x": lambda t: t[:, 1:]}, ValueError, r"x has shape \(5, 11\), expected .*12\]"),
            ({"x": lambda t: t[0, 0]}, ValueError, r"x has shape \(\), expected .*12\]"),
            ({"bias": lambda t: t[1:]}, ValueError, r"bias has shape \(6,\), expected \(7,\)"),
            ({"bias": [0.0]}, TypeError, r"bias is a list"),
            ({"x": lambda t: t.half()}, TypeError, r"x has dtype torch.float16, weight torch.fl"),
            ({"weight": lambda t: t.double()}, TypeError, r"x has dtype .*, weight torch.float64"),
            ({"bias": lambda t: t.half()}, TypeError, r"x has dtype .*bias torch.float16"),
            ({"weight": lambda t: t.to("meta")}, ValueError, r"weight is on meta, expected"),
            ({"bias": lambda t: t.to("meta")}, ValueError, r"bias is on meta, expected"),
        ],
    )
    def test_bad_base_layer(self, changes, exception, message):
        self.check_error(changes, exception, message)
