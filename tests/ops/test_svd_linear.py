"""The SVD linear layer against its formula: see `AdapterContract` for what is tested."""

import pytest
import torch

from hal_kernels.ops import svd_linear, svd_linear_reference

from .adapter_cases import FACTORS, make_mask
from .adapter_contract import AdapterContract
from .util import DEVICE, EXACT, assert_same, autocast, laid_out, relative_error, results


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

    def test_autocast_leaves_float64_alone(self):
        with torch.autocast(DEVICE.partition(":")[0], torch.bfloat16):
            self.check(self.make(dtype=torch.float64))

    def test_compile_under_autocast(self):
        self.check_compiled(autocast(self.call(), torch.bfloat16), self.make(), ["x", *FACTORS])

    @pytest.mark.slow
    def test_compile_with_inductor(self):
        self.check_compiled(self.call(make_mask("some", 3)), self.make(), backend="inductor")

    @pytest.mark.parametrize(
        "changes, exception, message",
        [
            ({"weight": lambda t: t[0]}, ValueError, r"weight has shape \(12,\), expected \[d_out"),
            ({"weight": lambda t: t.t()}, ValueError, r"x has shape \(5, 12\), expected .*7\]"),
            ({"x": lambda t: t[:, 1:]}, ValueError, r"x has shape \(5, 11\), expected .*12\]"),
            ({"x": lambda t: t[0, 0]}, ValueError, r"x has shape \(\), expected .*12\]"),
            ({"bias": lambda t: t[1:]}, ValueError, r"bias has shape \(6,\), expected \(7,\)"),
            ({"x": lambda t: t.half()}, TypeError, r"x has dtype torch.float16, weight torch.fl"),
            ({"weight": lambda t: t.double()}, TypeError, r"x has dtype .*, weight torch.float64"),
            ({"bias": lambda t: t.half()}, TypeError, r"x has dtype .*bias torch.float16"),
        ],
    )
    def test_bad_base_layer(self, changes, exception, message):
        self.check_error(changes, exception, message)
