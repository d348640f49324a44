"""What `svd_linear` and `svd_adapter_add` both promise, written once.

A test class of each operator inherits these tests and adds what is particular to it.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from .adapter_cases import (
    BAD_ARGUMENTS,
    DTYPES,
    FACTORS,
    LAYOUTS,
    RANKS,
    SCALING,
    AdapterCases,
    make_mask,
    seed,
)
from .tangent_contract import TangentContract
from .util import (
    EXACT,
    CountCalls,
    allocations,
    assert_same,
    autocast,
    bounds,
    laid_out,
    results,
    values,
)


class FormulaContract(AdapterCases):
    """Values and gradients, against the reference."""

    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_the_reference(self, dtype, rank):
        inputs = self.make((3, 11), 37, 29, rank, dtype)
        self.check(inputs, make_mask("some", rank))

    @pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)])
    def test_any_leading_dimensions(self, leading):
        out = self.check(self.make(leading))
        assert out["out"].shape == (*leading, 7)

    @pytest.mark.parametrize("d_in, d_out", [(1, 1), (1, 9), (9, 1), (64, 33)])
    def test_any_widths(self, d_in, d_out):
        self.check(self.make((6,), d_in, d_out, 2))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_layout_of_activations(self, layout, dtype):
        inputs = self.make((4, 5), dtype=dtype)
        for name in self.rows:
            inputs[name] = laid_out(inputs[name], layout)
            assert not inputs[name].is_contiguous()
        self.check(inputs)

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
    def test_any_layout_of_factors(self, layout):
        inputs = self.make()
        for name in ("p", "q"):
            inputs[name] = laid_out(inputs[name], layout)
        inputs["lam"] = laid_out(inputs["lam"], "sliced")
        self.check(inputs)

    @pytest.mark.parametrize("layout", ["sum", *LAYOUTS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_layout_of_the_upstream_gradient(self, layout, dtype):
        self.check(self.make((4, 5), dtype=dtype), upstream=layout)

    @pytest.mark.parametrize("kind", ["none", "ones", "some", "zeros"])
    @pytest.mark.parametrize("scaling", [1.0, 2.5, 0.0, -1.0])
    def test_mask_and_scaling(self, kind, scaling):
        self.check(self.make(), make_mask(kind, 3), scaling=scaling)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
    def test_mask_of_any_dtype(self, dtype):
        self.check(self.make(), make_mask("some", 3).to(dtype))

    @pytest.mark.parametrize(
        "dtype, factors",
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float64),
            (torch.float64, torch.float32),
        ],
    )
    def test_factors_of_another_dtype(self, dtype, factors):
        """Gradients come in the factors' dtype (`results` checks it), computed in x's precision."""
        inputs = self.make((3, 5), dtype=dtype, factors=factors)
        dy = self.upstream(inputs)
        out = results(self.call(), inputs, dy)
        ref = results(self.formula(), inputs, dy, cast=torch.float64)
        plain = results(self.formula(dtype=dtype), inputs, dy)
        coarse = max((dtype, factors), key=lambda d: torch.finfo(d).eps)
        allowed = bounds(coarse, plain, ref)
        assert out["out"].dtype == dtype
        assert_same(out, ref, allowed)
        if (dtype, factors) == (torch.float32, torch.bfloat16):
            # bfloat16 numbers are exact in float32: the output has no excuse to be coarser.
            assert_same({"out": out["out"]}, {"out": ref["out"]}, EXACT[dtype])

    @settings(suppress_health_check=[HealthCheck.differing_executors])  # two operators' classes
    @given(st.data())
    def test_random_shapes_and_options(self, data):
        torch.manual_seed(data.draw(st.integers(0, 2**32)))
        leading = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
        d_in, d_out = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
        rank = data.draw(st.integers(0, 5))
        inputs = self.make(leading, d_in, d_out, rank, torch.float64)
        if "bias" in inputs and data.draw(st.booleans()):
            inputs["bias"] = None
        for name in self.rows:
            layouts = ["contiguous", "transposed", "sliced", "expanded"][: 3 if 0 in leading else 4]
            inputs[name] = laid_out(inputs[name], data.draw(st.sampled_from(layouts)))
        available = [n for n in self.names if inputs[n] is not None]
        wanted = data.draw(st.lists(st.sampled_from(available), min_size=1, unique=True))
        mask = make_mask(data.draw(st.sampled_from(["none", "ones", "some", "zeros"])), rank)
        upstream = data.draw(st.sampled_from(["contiguous", "sum", "sliced"]))
        scaling = data.draw(st.sampled_from([1.0, 0.5, -3.0]))
        # Sums of two or three random terms may cancel: 1e-11 leaves four digits to that.
        self.check(inputs, mask, upstream, scaling, wanted, bound=1e-11)

    @pytest.mark.parametrize("leading", [(5,), (2, 3)])
    def test_output_may_be_changed_in_place(self, leading):
        """As nn.ReLU(inplace=True) does behind a linear layer."""
        inputs = self.make(leading, dtype=torch.float64)
        dy = self.upstream(inputs)

        def doubled(function):
            return lambda **leaves: function(**leaves).mul_(2).relu_()

        out = results(doubled(self.call()), inputs, dy)
        ref = results(doubled(self.formula()), inputs, dy)
        assert_same(out, ref, EXACT[torch.float64])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        """Inputs are float32, a base layer's output 16 bits wide; gradients are as their inputs."""
        inputs, mask = self.make((3, 5)), make_mask("some", 3)
        if "y" in inputs:
            inputs["y"] = inputs["y"].to(dtype)
        dy = self.upstream(inputs).to(dtype)
        for given_in in (inputs, inputs | {"bias": None}) if "bias" in inputs else (inputs,):
            out = results(autocast(self.call(mask), dtype), given_in, dy)
            ref = results(self.formula(mask), given_in, dy, cast=torch.float64)
            plain = results(autocast(self.formula(mask), dtype), given_in, dy)
            assert out["out"].dtype == dtype
            assert_same(out, ref, bounds(dtype, plain, ref))

    @pytest.mark.parametrize("changes, exception, message", BAD_ARGUMENTS)
    def test_bad_arguments(self, changes, exception, message):
        self.check_error(changes, exception, message)

    def test_inference_mode(self):
        inputs = self.make()
        with torch.inference_mode():
            out = self.call()(**inputs)
        assert torch.equal(out, self.call()(**inputs))

    def test_gradient_of_lam_before_and_after_the_mask(self):
        """A mask given in masks the gradient; multiplied outside, the full dΛ_eff is there."""
        inputs, mask = self.make(rank=5), make_mask("some", 5)
        dy = self.upstream(inputs)
        outside = results(self.call(), {**inputs, "lam": inputs["lam"] * mask}, dy)["lam"]
        x, p, q = (inputs[n].double() for n in ("x", "p", "q"))
        expected = SCALING * ((x @ p.t()) * (dy.double() @ q.t())).sum(0)
        assert_same({"lam": outside}, {"lam": expected}, EXACT[torch.float32])
        assert (outside[mask == 0] != 0).all()
        given_in = results(self.call(mask), inputs, dy)["lam"]
        assert_same({"lam": given_in}, {"lam": expected * mask}, EXACT[torch.float32])
        assert (given_in[mask == 0] == 0).all()

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_gradients_only_where_asked(self, dropout):
        """Each subset of inputs gets the gradients it would get beside all the others."""
        inputs = self.make(rank=2)
        dy, function = self.upstream(inputs), self.call(dropout=dropout, seed=seed(4))
        every = results(function, inputs, dy)
        for wanted in subsets(self.names):
            some = results(function, inputs, dy, wanted)
            assert_same(some, {n: every[n] for n in ("out", *wanted)}, EXACT[torch.float32])

    @pytest.mark.parametrize("needs_dx", [True, False])
    @pytest.mark.parametrize("needs_factors", [True, False])
    def test_backward_computes_only_what_is_asked(self, needs_dx, needs_factors):
        inputs = self.make()
        wanted = ["x"] * needs_dx + ["lam"] * needs_factors + list(self.base)
        with CountCalls() as counter:
            results(self.call(), inputs, self.upstream(inputs), wanted)
        arguments = counter.operators[self.backward._qualified_op_name.split("::")[1]]
        assert arguments[-2:] == (needs_dx, needs_factors)
        dx, *factors = self.backward(*arguments)
        assert dx.numel() == (inputs["x"].numel() if needs_dx else 0)
        for name, gradient in zip(FACTORS, factors, strict=True):
            assert gradient.numel() == (inputs[name].numel() if needs_factors else 0)

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_gradcheck(self, dropout):
        inputs = self.make((2, 2), 4, 3, 2, torch.float64)
        function = self.call(make_mask("ones", 2), dropout=dropout, seed=seed(1))
        leaves = [inputs[n].requires_grad_() for n in self.names]
        assert torch.autograd.gradcheck(
            lambda *t: function(**dict(zip(self.names, t, strict=True))), leaves
        )

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_backward_under_autocast(self, dropout):
        """Autocast around a backward pass does not reach into it: its dtypes are forward's."""
        inputs = self.make()
        dy, function = self.upstream(inputs), self.call(dropout=dropout, seed=seed(1))
        leaves = [inputs[n].requires_grad_() for n in self.names]
        out = function(**inputs)
        expected = torch.autograd.grad(out, leaves, dy, retain_graph=True)
        with torch.autocast(inputs["x"].device.type, torch.bfloat16):
            gradients = torch.autograd.grad(out, leaves, dy)
        assert_same(dict(enumerate(gradients)), dict(enumerate(expected)), EXACT[torch.float32])

    @pytest.mark.parametrize("linear", [True, False])
    @pytest.mark.parametrize("name", ["x", *FACTORS])
    def test_double_backward_is_an_error(self, name, linear):
        """Of a loss that is linear in y, too: dx depends on the factors all the same."""
        inputs = self.make()
        inputs[name].requires_grad_()
        out = self.call()(**inputs)
        loss = (out if linear else out.square()).sum()
        (gradient,) = torch.autograd.grad(loss, inputs[name], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


class DropoutContract(AdapterCases):
    """One mask for forward and backward, made of the seed."""

    def test_dropout_mask_is_random(self):
        keep, other = (self.keep((1500,), 64, 0.25, name) for name in (5, 6))
        assert set(keep.unique().tolist()) == {0.0, 1 / 0.75}
        kept = (keep != 0).double()
        # Five standard deviations of a mean of n Bernoulli(3/4) numbers.
        for dim, n in ((0, 1500), (1, 64), ((0, 1), 96000)):
            assert (kept.mean(dim) - 0.75).abs().max() < 5 * (0.75 * 0.25 / n) ** 0.5
        # Independent masks agree in 1/16 + 9/16 of the places: another seed's, the next block's.
        for one, two in ((keep, other), (keep[:476], keep[1024:]), (keep[:, 1:], keep[:, :-1])):
            agree = (one == two).double()
            assert (agree.mean() - 0.625).abs() < 5 * (0.625 * 0.375 / agree.numel()) ** 0.5

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dropout_mask_depends_on_seed_and_shape_alone(self, dtype):
        expected = self.keep((1200,), 16, 0.5, 7)
        assert torch.equal(self.keep((3, 400), 16, 0.5, 7, dtype).double().flatten(0, 1), expected)

    @pytest.mark.parametrize("leading", [(0,), (9,), (2, 512), (1025,), (5, 500)])
    def test_dropout_matches_the_formula_with_its_mask(self, leading):
        """Forward and backward use one mask, whatever number of row blocks it is made in."""
        inputs, mask = self.make(leading, 6, 5, 3, torch.float64), make_mask("some", 3)
        keep = self.keep(leading, 6, 0.3, 8)
        function = self.call(mask, dropout=0.3, seed=seed(8))
        self.compare(function, inputs, self.upstream(inputs), mask, keep=keep)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_dropout_of_any_layout(self, layout):
        inputs = self.make((4, 30), 6, 5, 3, torch.float64)
        for name in self.rows:
            inputs[name] = laid_out(inputs[name], layout)
        keep = self.keep((4, 30), 6, 0.3, 9)
        function = self.call(dropout=0.3, seed=seed(9))
        self.compare(function, inputs, self.upstream(inputs, layout), keep=keep)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dropout_of_any_dtype(self, dtype):
        inputs = self.make((1100,), 16, 12, 3, dtype)
        keep = self.keep((1100,), 16, 0.5, 10)
        function = self.call(dropout=0.5, seed=seed(10))
        self.compare(function, inputs, self.upstream(inputs), keep=keep)

    def test_equal_seeds_give_equal_results(self):
        inputs = self.make((1100,))
        dy = self.upstream(inputs)
        one, same, other = (
            results(self.call(dropout=0.5, seed=seed(n)), inputs, dy) for n in (1, 1, 2)
        )
        assert_same(same, one, 0.0)
        assert not torch.equal(other["out"], one["out"])
        assert not torch.equal(other["p"], one["p"])

    def test_dropout_follows_manual_seed(self):
        inputs = self.make()
        dy, function = self.upstream(inputs), self.call(dropout=0.5)
        runs = []
        for name in (1, 1, 2):
            torch.manual_seed(name)
            runs.append(results(function, inputs, dy))
        one, same, other = runs
        assert_same(same, one, 0.0)
        assert not torch.equal(other["out"], one["out"])
        assert not torch.equal(results(function, inputs, dy)["out"], other["out"])

    def test_no_dropout_needs_no_seed_and_draws_none(self):
        inputs = self.make()
        before = torch.get_rng_state()
        out = self.call(dropout=0.0)(**inputs)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(self.call(dropout=0.0, seed=seed(3))(**inputs), out)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_regenerates_the_mask(self, reentrant):
        inputs = self.make((1100,))
        dy, function = self.upstream(inputs), self.call(dropout=0.5)

        def checkpointed(**leaves):
            return checkpoint(
                lambda *t: function(**dict(zip(leaves, t, strict=True))),
                *leaves.values(),
                use_reentrant=reentrant,
            )

        runs = []
        for run in (function, checkpointed):
            torch.manual_seed(11)
            runs.append(backward_results(run, inputs, dy))
        assert_same(runs[1], runs[0], 0.0)


class LibraryContract(AdapterCases):
    """torch.library, torch.compile, memory."""

    def arguments(self, inputs, dropout=0.0):
        """What the public function passes to the registered operator."""
        base = inputs["y"] if "y" in inputs else inputs["bias"]
        factors = [inputs[n] for n in FACTORS]
        named = seed(2) if dropout else None
        return inputs["x"], inputs.get("weight"), base, *factors, SCALING, dropout, named

    def arguments_backward(self, inputs, needs, dropout=0.0, tangent=0.0):
        x, weight, _, *rest = self.arguments(inputs, dropout)
        h = values(x[..., 0].numel(), inputs["p"].shape[0])
        return self.upstream(inputs), x, h, weight, *rest, tangent, *needs

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dtype": torch.bfloat16, "factors": torch.float32, "dropout": 0.5},
            {"leading": (2, 0)},
            {"leading": (2, 3), "layout": "permuted", "rank": 1},
        ],
        ids=["float32", "bfloat16-dropout", "empty", "permuted"],
    )
    def test_opcheck(self, options):
        options = dict(options)
        dropout, layout = options.pop("dropout", 0.0), options.pop("layout", "contiguous")
        inputs = self.make(**options)
        inputs["x"] = laid_out(inputs["x"], layout)
        torch.library.opcheck(self.packet.default, self.arguments(inputs, dropout))

    @pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_opcheck_backward(self, needs, dropout):
        arguments = self.arguments_backward(self.make((2, 3)), needs, dropout)
        torch.library.opcheck(self.backward.default, arguments)

    def test_compile(self):
        self.check_compiled(self.call(make_mask("some", 3)), self.make())

    def test_compile_with_dropout_of_a_frozen_layer(self):
        function = self.call(dropout=0.5, seed=seed(3))
        self.check_compiled(function, self.make((1100,)), ["x", *FACTORS])

    def test_compile_draws_a_new_seed_at_each_call(self):
        inputs = self.make()
        compiled = torch.compile(self.call(dropout=0.5), backend="aot_eager", fullgraph=True)
        assert not torch.equal(compiled(**inputs), compiled(**inputs))

    def test_compile_with_dynamic_shapes(self):
        function = self.call()
        compiled = self.check_compiled(function, self.make((4, 5)), dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for leading in ((3, 7), (6, 2)):
                inputs = self.make(leading)
                dy = self.upstream(inputs)
                assert_same(results(compiled, inputs, dy), results(function, inputs, dy), 1e-6)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_activation_sized_temporary(self, dtype, dropout):
        """Of T·d elements, forward allocates the output alone and backward dx alone."""
        rows, d_in, d_out = 4096, 72, 64
        inputs = self.make((4, rows // 4), d_in, d_out, 3, dtype, torch.float32)
        wanted = ("x", *FACTORS)
        leaves = [inputs[n].requires_grad_() for n in wanted]
        function = self.call(dropout=dropout, seed=seed(1))
        dy, out = self.upstream(inputs), function(**inputs)
        big = rows * min(d_in, d_out) * dtype.itemsize

        def backward(*leaves):
            return allocations(lambda: torch.autograd.grad(out, leaves, dy, retain_graph=True))

        forward = allocations(lambda: function(**inputs))
        assert [n for n in forward if n >= big] == [rows * d_out * dtype.itemsize]
        expected = [rows * d_in * dtype.itemsize]
        assert [n for n in backward(*leaves) if n >= big] == expected
        # What is not the output stays small in sum, too: h, u and blocks of rows.
        assert max(n for n in forward if n < big) <= 1024 * d_in * 4

    def test_backward_without_dx_allocates_no_activation(self):
        inputs = self.make((4096,), 72, 64)
        leaves = [inputs[n].requires_grad_() for n in FACTORS]
        out, dy = self.call()(**inputs), self.upstream(inputs)
        sizes = allocations(lambda: torch.autograd.grad(out, leaves, dy))
        assert max(sizes) <= 4096 * 3 * 4

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_saves_only_inputs_and_rank_sized_rows(self, dropout):
        inputs = self.make((50,), 40, 30)
        for tensor in inputs.values():
            tensor.requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            self.call(dropout=dropout)(**inputs)
        own = {t.untyped_storage().data_ptr() for t in inputs.values()}
        extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
        assert len(extra) < len(saved)
        assert sorted(t.numel() for t in extra) == ([1, 150] if dropout else [150])


class AdapterContract(FormulaContract, DropoutContract, LibraryContract, TangentContract):
    pass


def subsets(names):
    return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


def backward_results(function, inputs, dy):
    """As `results`, through `.backward()`: reentrant checkpoints know no other way."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    out = function(**leaves)
    out.backward(dy)
    return {"out": out.detach(), **{n: t.grad for n, t in leaves.items()}}
