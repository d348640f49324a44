"""The SVD adapter added to an output: see `AdapterContract` for what is tested."""

import pytest
import torch

from hal_kernels.ops import svd_adapter_add, svd_adapter_add_reference

from .adapter_cases import FACTORS
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

    def test_compile_with_x_as_the_base_output(self):
        inputs = self.make(d_out=12)
        del inputs["y"]
        self.check_compiled(lambda x, **factors: svd_adapter_add(x, x, **factors), inputs)

    @pytest.mark.parametrize(
        "changes, exception, message",
        [
            ({"y": lambda t: t[1:]}, ValueError, r"y has leading dimensions \(4,\), expected \(5,"),
            ({"y": lambda t: t[0]}, ValueError, r"y has leading dimensions \(\), expected \(5,\)"),
            ({"y": lambda t: t[:, 1:]}, ValueError, r"q has shape \(3, 7\), expected \(3, 6\)"),
            ({"x": lambda t: t[:, 1:]}, ValueError, r"p has shape \(3, 12\), expected \(3, 11\)"),
            ({"x": lambda t: t[0, 0], "y": lambda t: t[0]}, ValueError, r"x has shape \(\), exp"),
            ({"x": lambda t: t[0], "y": lambda t: t[0, 0]}, ValueError, r"y has shape \(\), exp"),
        ],
    )
    def test_bad_base_output(self, changes, exception, message):
        self.check_error(changes, exception, message)
