"""Gradients along the matrices of rank r, as `svd_linear` and `svd_adapter_add` both give them.

With h = dropout(x)·P and u = dy·Qᵀ, those of P and Q are c·uᵀdropout(x) and c·hᵀdy: whatever Λ is.
"""

import pytest
import torch

from .adapter_cases import DTYPES, LAYOUTS, AdapterCases, make_mask, seed
from .util import CountCalls, assert_same, bounds, laid_out, results

TANGENT = 2.0**-12  # a power of two, so small that 16-bit operands scaled by it would show


def tangent_results(inputs, dy, dtype=torch.float64, keep=None, tangent=TANGENT):
    """The two gradients as the formula stands, computed in `dtype`."""
    x, p, q, dy = (t.detach().to(dtype) for t in (inputs["x"], inputs["p"], inputs["q"], dy))
    x = x if keep is None else x * keep.to(dtype)
    x, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dy))
    return {"p": (dy @ q.t()).t() @ x * tangent, "q": (x @ p.t()).t() @ dy * tangent}


class TangentContract(AdapterCases):
    """Values with `tangent`, of a function that is otherwise the same."""

    def check_tangent(self, inputs, layout="contiguous", mask=None, dropout=0.0):
        dtype = inputs["x"].dtype
        dy = self.upstream(inputs) if layout == "sum" else self.upstream(inputs, layout)
        dy = torch.ones_like(dy[..., :1]).expand(dy.shape) if layout == "sum" else dy
        options = {"dropout": dropout, "seed": seed(8)} if dropout else {}
        wanted = [n for n in self.names if n != "lam" and inputs[n] is not None]
        out = results(self.call(mask, tangent=TANGENT, **options), inputs, dy, wanted)
        own = results(self.call(mask, **options), inputs, dy, wanted)
        same = [n for n in out if n not in ("p", "q")]
        assert_same({n: out[n] for n in same}, {n: own[n] for n in same}, 0.0)
        keep = None
        if dropout:
            keep = self.keep(inputs["x"].shape[:-1], inputs["x"].shape[-1], dropout, 8)
        ref = tangent_results(inputs, dy, keep=keep)
        coarse = max((dtype, inputs["p"].dtype), key=lambda d: torch.finfo(d).eps)
        plain = tangent_results(inputs, dy, coarse, keep) if coarse.itemsize == 2 else None
        assert_same({n: out[n] for n in ref}, ref, bounds(coarse, plain, ref))

    @pytest.mark.parametrize("rank", [0, 1, 3, 17, 64, 128])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tangent_gradients(self, dtype, rank):
        self.check_tangent(self.make((3, 11), 37, 29, rank, dtype))

    @pytest.mark.parametrize("rank", [5, 40])
    @pytest.mark.parametrize("lam", ["zeros", "some"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_tangent_gradients_where_singular_values_are_zero(self, lam, rank, dropout):
        """Also where they are only masked: K and L know nothing of Λ."""
        inputs = self.make((4, 30), rank=rank, dtype=torch.float64)
        self.check_tangent(inputs, mask=make_mask(lam, rank), dropout=dropout)
        inputs["lam"] = inputs["lam"] * make_mask(lam, rank)
        self.check_tangent(inputs, dropout=dropout)

    @pytest.mark.parametrize("leading", [(), (1,), (2, 1, 3), (2, 0)])
    def test_tangent_gradients_of_any_leading_dimensions(self, leading):
        self.check_tangent(self.make(leading))

    @pytest.mark.parametrize("layout", ["sum", *LAYOUTS])
    def test_tangent_gradients_of_any_layout(self, layout):
        inputs = self.make((4, 5))
        if layout != "sum":
            inputs["x"] = laid_out(inputs["x"], layout)
        self.check_tangent(inputs, layout)

    @pytest.mark.parametrize("rank", [3, 40])
    @pytest.mark.parametrize(
        "dtype, factors", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                           (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    )  # fmt: skip
    def test_tangent_gradients_come_in_the_factors_dtype(self, dtype, factors, rank):
        """A small c costs 16-bit activations no bits: it scales what they were multiplied to."""
        inputs = self.make((3, 11), rank=rank, dtype=dtype, factors=factors)
        self.check_tangent(inputs)
        dy, runs = self.upstream(inputs), []
        for tangent in (1.0, 2.0**-30):
            function = self.call(tangent=tangent)
            found = results(function, inputs, dy, ["p", "q"])
            runs.append({n: found[n].double() / tangent for n in ("p", "q")})
        assert_same(runs[1], runs[0], 0.0)

    def test_a_tangent_gradient_of_lam_does_not_exist(self):
        inputs = {n: t.requires_grad_() for n, t in self.make().items()}
        with CountCalls() as counter:
            out = self.call(tangent=TANGENT)(**inputs)
            (alone,) = torch.autograd.grad(
                out.sum(), [inputs["lam"]], allow_unused=True, retain_graph=True
            )
            every = torch.autograd.grad(out.sum(), [*inputs.values()], allow_unused=True)
        found = dict(zip(inputs, every, strict=True))
        assert alone is None
        assert [n for n, g in found.items() if g is None] == ["lam"]
        arguments = counter.operators[self.backward._qualified_op_name.split("::")[1]]
        _, dp, dlam, dq = self.backward(*arguments)
        assert dlam.numel() == 0 and dp.shape == inputs["p"].shape and dq.shape == inputs["q"].shape

    def test_a_layer_whose_lam_alone_is_trained_computes_no_factors(self):
        inputs = self.make()
        with CountCalls() as counter:
            out = self.call(tangent=TANGENT)(**{**inputs, "lam": inputs["lam"].requires_grad_()})
            torch.autograd.grad(out.sum(), inputs["lam"], allow_unused=True)
        arguments = counter.operators[self.backward._qualified_op_name.split("::")[1]]
        assert arguments[-3:] == (TANGENT, False, False)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck_of_tangent_gradients(self, dtype, dropout):
        inputs = self.make((2, 3), dtype=dtype, factors=torch.float32)
        arguments = self.arguments_backward(inputs, (True, True), dropout, TANGENT)
        torch.library.opcheck(self.backward.default, arguments)

    def test_compile_tangent_gradients(self):
        wanted = [n for n in self.names if n != "lam"]
        self.check_compiled(self.call(make_mask("some", 3), tangent=TANGENT), self.make(), wanted)

    @pytest.mark.parametrize("tangent", [-1.0, float("nan"), float("inf")])
    def test_bad_tangent(self, tangent):
        self.check_error(
            {"tangent": tangent}, ValueError, rf"tangent is {tangent}, expected at least 0"
        )

    def test_tangent_gradients_repeat_bit_for_bit(self):
        inputs = self.make((64,), 48, 32)
        dy, function = self.upstream(inputs), self.call(tangent=TANGENT)
        one, two = (results(function, inputs, dy, ["x", "p", "q"]) for _ in range(2))
        assert_same(two, one, 0.0)
