"""Inputs, formula and checks of the two operators that apply the SVD adapter.

`AdapterCases` makes them from what an operator's test class says of its operator.
"""

import pytest
import torch

import hal_kernels.ops  # noqa: F401  (registers torch.ops.hal)

from .util import DEVICE, assert_same, bounds, laid_out, results, values

FACTORS = ("p", "lam", "q")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (0, 1, 3, 8, 16, 17, 64, 128)
LAYOUTS = ("transposed", "sliced", "rows_sliced", "permuted", "expanded", "all_expanded")
SCALING = 0.75  # exact in every dtype, and not 1


def make_mask(kind: str, rank: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = {"ones": torch.ones, "zeros": torch.zeros}.get(kind, torch.ones)(rank, device=DEVICE)
    if kind == "some":
        mask[1::2] = 0
    return mask


def seed(name: int) -> torch.Tensor:
    return torch.tensor(name, device=DEVICE)


class AdapterCases:
    # Set by the operator's test class.
    operator = None  # the public function
    reference = None  # its *_reference
    names = ()  # arguments with a gradient, in order; the factors are the last three
    base = ()  # those of them that are the base layer's (not x, not factors)
    rows = ()  # those of them that have T rows
    packet = torch.ops.hal.svd_linear
    backward = torch.ops.hal.svd_linear_backward

    def make(self, leading=(5,), d_in=12, d_out=7, rank=3, dtype=torch.float32, factors=None):
        """Inputs by name: activations of order 1, weights that keep them so."""
        factors = factors or dtype
        sign = torch.ones(rank, device=DEVICE, dtype=torch.float64)
        sign[::3] = -1
        every = {
            "x": values(*leading, d_in, dtype=dtype),
            "y": values(*leading, d_out, dtype=dtype),
            "weight": (values(d_out, d_in) / d_in**0.5).to(dtype),
            "bias": values(d_out, dtype=dtype),
            "p": (values(rank, d_in) / max(d_in, 1) ** 0.5).to(factors),
            "lam": ((0.5 + torch.rand(rank, device=DEVICE)) * sign).to(factors),
            "q": (values(rank, d_out) / max(d_out, 1) ** 0.5).to(factors),
        }
        return {name: every[name] for name in self.names}

    def upstream(self, inputs, layout="contiguous"):
        d_out = inputs["q"].shape[1]
        return laid_out(values(*inputs["x"].shape[:-1], d_out, dtype=inputs["x"].dtype), layout)

    def call(self, mask=None, scaling=SCALING, **options):
        """The operator as a function of its differentiable inputs."""

        def function(**inputs):
            return type(self).operator(**inputs, mask=mask, scaling=scaling, **options)

        return function

    def formula(self, mask=None, scaling=SCALING, dtype=None, keep=None):
        """The reference as such a function; run in `dtype`; `keep` is the dropout mask."""

        def function(x, lam, **rest):
            if mask is not None:
                lam = lam * mask.to(lam.dtype)
            rest.update(x=x, lam=lam)
            if dtype is not None:
                rest = {n: t if t is None else t.to(dtype) for n, t in rest.items()}
            if keep is None:
                return type(self).reference(**rest, scaling=scaling)
            base = type(self).reference(**rest, scaling=0.0)
            h = (rest["x"] * keep.to(rest["x"].dtype)) @ rest["p"].t()
            return base + scaling * (h * rest["lam"]) @ rest["q"]

        return function

    def check(self, inputs, mask=None, upstream="contiguous", scaling=SCALING, wanted=None, **more):
        """Output and gradients against the reference in float64, of the rounded inputs."""
        dy = None if upstream == "sum" else self.upstream(inputs, upstream)
        function = self.call(mask, scaling)
        return self.compare(function, inputs, dy, mask, scaling, wanted=wanted, **more)

    def compare(
        self, function, inputs, dy, mask=None, scaling=SCALING, keep=None, wanted=None, bound=None
    ):
        """As `check`, for a function and an upstream gradient already made."""
        dtype = inputs["x"].dtype
        out = results(function, inputs, dy, wanted)
        exact = self.formula(mask, scaling, keep=keep)
        ref = results(exact, inputs, dy, wanted, cast=torch.float64)
        plain = None
        if dtype.itemsize == 2:
            plain = results(self.formula(mask, scaling, dtype, keep), inputs, dy, wanted)
        assert_same(out, ref, bound or bounds(dtype, plain, ref))
        return out

    def keep(self, leading, width, dropout, name, dtype=torch.float64):
        """The dropout mask itself: what comes out for x = 1, P = Q = identity and no base."""
        inputs = self.make(leading, width, width, width, dtype)
        for tensor in inputs.values():
            tensor.zero_()
        inputs["x"].fill_(1)
        inputs["lam"].fill_(1)
        inputs["p"].fill_diagonal_(1)
        inputs["q"].fill_diagonal_(1)
        return self.call(scaling=1.0, dropout=dropout, seed=seed(name))(**inputs)

    def check_compiled(self, function, inputs, wanted=None, **options):
        torch._dynamo.reset()
        options = {"backend": "aot_eager", "fullgraph": True, **options}
        compiled = torch.compile(function, **options)
        dy = self.upstream(inputs)
        assert_same(
            results(compiled, inputs, dy, wanted), results(function, inputs, dy, wanted), 1e-6
        )
        return compiled

    def check_error(self, changes, exception, message):
        arguments = self.make()
        for name, change in changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
        with pytest.raises(exception, match=message):
            type(self).operator(**arguments)


# Changes to good arguments, the exception and its message: for both operators. What is no tensor,
# or of a dtype or device that no operator takes, is given to each argument in test_arguments.py.
BAD_ARGUMENTS = [
    ({"x": [1.0]}, TypeError, r"x is a list, expected a torch.Tensor"),
    ({"x": lambda t: t.long()}, TypeError, r"x has dtype torch.int64, expected a floating"),
    ({"x": lambda t: t.to(torch.complex64)}, TypeError, r"x has dtype torch.complex64"),
    ({"lam": lambda t: t.bool()}, TypeError, r"lam has dtype torch.bool"),
    ({"p": lambda t: t[:, 1:]}, ValueError, r"p has shape \(3, 11\), expected .*12.*\[r, d_in\]"),
    ({"p": lambda t: t[0]}, ValueError, r"p has shape \(12,\), expected"),
    ({"p": lambda t: t[None]}, ValueError, r"p has shape \(1, 3, 12\), expected"),
    ({"lam": lambda t: t[1:]}, ValueError, r"lam has shape \(2,\), expected \(3,\) \(\[r\]\)"),
    ({"lam": lambda t: t[:, None]}, ValueError, r"lam has shape \(3, 1\), expected \(3,\)"),
    ({"q": lambda t: t[1:]}, ValueError, r"q has shape \(2, 7\), expected \(3, 7\)"),
    ({"q": lambda t: t[:, 1:]}, ValueError, r"q has shape \(3, 6\), expected \(3, 7\)"),
    ({"q": lambda t: t.t()}, ValueError, r"q has shape \(7, 3\), expected \(3, 7\)"),
    ({"mask": torch.ones(2)}, ValueError, r"mask has shape \(2,\), expected \(3,\)"),
    ({"mask": torch.ones(1)}, ValueError, r"mask has shape \(1,\), expected \(3,\)"),
    ({"mask": torch.ones(3, device="meta")}, ValueError, r"mask is on meta, expected"),
    ({"dropout": 1.0}, ValueError, r"dropout is 1.0, expected at least 0 and less than 1"),
    ({"dropout": -0.1}, ValueError, r"dropout is -0.1, expected"),
    ({"dropout": 0.5, "seed": torch.tensor([3, 4])}, ValueError, r"seed has shape \(2,\)"),
    ({"dropout": 0.5, "seed": torch.tensor(3.5)}, TypeError, r"seed has dtype torch.float32"),
]
