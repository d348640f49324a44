"""HALLinear by itself, without a patched model."""

import copy

import pytest
import torch
from lifecycle import pickled
from torch import nn
from torch.nn import functional as F

import hal_kernels
from hal_kernels import HALLinear


def layer(rank=3, *, dtype=torch.float64, stirred=True, **options):
    """A 12 -> 8 layer whose adapter has an effect."""
    made = HALLinear(12, 8, rank=rank, dtype=dtype, factor_dtype=dtype, **options)
    if stirred:
        nn.init.normal_(made.lam)
    return made


def formula(made, x):
    h = (x @ made.p.t()) * (made.lam * made.mask)
    return F.linear(x, made.weight, made.bias) + made.scaling * (h @ made.q)


def test_it_is_a_linear_layer():
    made = HALLinear(12, 8, bias=False, dtype=torch.float16)
    assert isinstance(made, nn.Linear)
    assert (made.in_features, made.out_features, made.bias) == (12, 8, None)
    assert made.weight.shape == (8, 12) and made.weight.dtype == torch.float16
    assert "bias" in HALLinear(12, 8).state_dict()


def test_from_linear_shares_weight_and_bias():
    linear = nn.Linear(12, 8).eval()
    before = linear.weight.clone()
    made = HALLinear.from_linear(linear, 2, alpha=4.0, dropout=0.1)
    assert made.weight is linear.weight and made.bias is linear.bias
    assert torch.equal(linear.weight, before)
    assert not made.weight.requires_grad and not made.bias.requires_grad
    assert not made.training and type(linear) is nn.Linear
    assert made.scaling == 2.0 and made.dropout == 0.1
    assert HALLinear.from_linear(nn.Linear(12, 8, bias=False)).bias is None


def test_parameters_and_buffers():
    made = layer(3)
    shapes = {n: tuple(p.shape) for n, p in made.named_parameters() if p.requires_grad}
    assert shapes == {"p": (3, 12), "lam": (3,), "q": (3, 8)}
    assert [n for n, _ in made.named_buffers()] == ["mask"] and made.mask.tolist() == [1, 1, 1]
    assert HALLinear(12, 8).p.dtype == torch.float32
    assert HALLinear(12, 8, factor_dtype=torch.bfloat16).q.dtype == torch.bfloat16
    torch.testing.assert_close(made.p.norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_starts_as_the_layer_it_was_made_of(dtype):
    linear, x = nn.Linear(12, 8, dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)
    assert torch.equal(HALLinear.from_linear(linear)(x), linear(x))


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (0, 12)])
def test_forward_is_the_formula(shape):
    made, x = layer(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), formula(made, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_formula():
    made, twin = layer(), None
    made.mask[1] = 0
    twin = copy.deepcopy(made)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    made(x).sin().sum().backward()
    formula(twin, y).sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name in ("p", "lam", "q"):
        torch.testing.assert_close(getattr(made, name).grad, getattr(twin, name).grad)
    assert made.weight.grad is None and made.bias.grad is None


def test_the_mask_prunes():
    made, x = layer(), torch.randn(4, 12, dtype=torch.float64)
    made.mask[1] = 0
    smaller = copy.deepcopy(made)
    for name in ("p", "lam", "q"):
        kept = getattr(made, name).detach()[[0, 2]]
        setattr(smaller, name, nn.Parameter(kept))
    smaller.mask = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(made(x), smaller(x), rtol=1e-12, atol=1e-12)
    made.mask.zero_()
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))


def test_a_pruned_direction_has_no_gradient():
    made = layer()
    made.mask[1] = 0
    made(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
    for grad in (made.lam.grad, made.p.grad, made.q.grad):
        assert not grad[1].any() and grad[0].any() and grad[2].any()


def test_dropout_in_training_only():
    made, x = layer(dropout=0.5), torch.randn(4, 12, dtype=torch.float64)
    assert not torch.equal(made(x), made(x))
    made.eval()
    torch.testing.assert_close(made(x), formula(made, x), rtol=1e-12, atol=1e-12)
    quiet = layer(dropout=0.0).train()
    assert torch.equal(quiet(x), quiet(x))


def test_dropout_keeps_the_mean_and_leaves_the_base_path_alone():
    made, x = layer(dropout=0.25), torch.randn(1, 12, dtype=torch.float64)
    mean = made(x.expand(20_000, 12)).mean(0)
    spread = (formula(made, x) - F.linear(x, made.weight, made.bias)).norm()
    assert (mean - formula(made, x)).norm() < 0.05 * spread
    made.lam.data.zero_()
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))


def test_state_dict_round_trip():
    made, other = layer(), layer()
    made.mask[2] = 0
    assert list(made.state_dict()) == ["weight", "bias", "p", "lam", "q", "mask"]
    other.load_state_dict(pickled(made.state_dict()))
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(other(x), made(x))


def test_weights_of_a_plain_layer_load_into_it():
    linear, made = nn.Linear(12, 8), HALLinear(12, 8)
    found = made.load_state_dict(linear.state_dict(), strict=False)
    assert set(found.missing_keys) == {"p", "lam", "q", "mask"} and not found.unexpected_keys
    x = torch.randn(3, 12)
    assert torch.equal(made(x), linear(x))


def test_copies():
    made, x = layer(), torch.randn(3, 12, dtype=torch.float64)
    for twin in (copy.deepcopy(made), pickled(made)):
        assert type(twin) is HALLinear and torch.equal(twin(x), made(x))
        twin.lam.data.add_(1.0)
        assert not torch.equal(twin(x), made(x))


def test_repr():
    assert repr(HALLinear(12, 8, rank=2)) == (
        "HALLinear(in_features=12, out_features=8, bias=True, rank=2)"
    )


def test_to_another_dtype():
    made = layer().to(torch.float32)
    assert {t.dtype for t in made.state_dict().values()} == {torch.float32}
    assert made(torch.randn(2, 12)).dtype == torch.float32


def test_autocast():
    made, x = layer(dtype=torch.float32), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x), rtol=0.05, atol=0.05)


def test_it_fits_a_target():
    """A least-squares target that differs by rank 2: the adapter finds it, the weight stays."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    delta = torch.randn(8, 2) @ torch.randn(2, 12) / 6
    x = torch.randn(64, 12)
    y = F.linear(x, linear.weight + delta, linear.bias).detach()
    made, before = HALLinear.from_linear(linear, 4, alpha=4.0), linear.weight.clone()
    optimizer = torch.optim.Adam([made.p, made.lam, made.q], lr=0.05)
    start = F.mse_loss(made(x), y).item()
    for _ in range(200):
        loss = F.mse_loss(made(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1e-3 * start
    assert torch.equal(made.weight, before)


def orthogonality(made):
    p, q = (t.detach().double().requires_grad_() for t in (made.p, made.q))
    residuals = (f @ f.t() - torch.eye(len(f), dtype=torch.float64) for f in (p, q))
    value = sum(r.square().sum() for r in residuals)
    return value.detach(), torch.autograd.grad(value, (p, q))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_its_own_penalty(dtype, bound):
    """Beside the loss of two micro-batches, whose gradients it is added to each time."""
    made, twin = layer(dtype=dtype), None
    nn.init.normal_(made.p), nn.init.normal_(made.q)
    twin = copy.deepcopy(made)
    value, gradients = orthogonality(made)
    for x in torch.randn(2, 4, 12, dtype=dtype):
        loss = made(x).square().sum()
        assert made.penalty.dtype == dtype
        torch.testing.assert_close(made.penalty.double(), value, rtol=bound, atol=0)
        (loss + 0.5 * made.penalty).backward()
        twin(x).square().sum().backward()
    for name, gradient in zip("pq", gradients, strict=True):
        own = getattr(made, name).grad - getattr(twin, name).grad
        torch.testing.assert_close(own.double(), gradient, rtol=0, atol=100 * bound)
    torch.testing.assert_close(made.lam.grad, twin.lam.grad)


def test_the_penalty_is_that_of_the_present_factors():
    """Before any forward, in evaluation, and after a step."""
    made = layer()
    start = made.penalty
    torch.testing.assert_close(start.detach(), orthogonality(made)[0])
    assert torch.equal(made.eval().penalty, start)
    with torch.no_grad():
        made(torch.randn(2, 12, dtype=torch.float64))
        assert not made.penalty.requires_grad
        made.p *= 2
    assert made.penalty > start
    torch.testing.assert_close(made.penalty.detach(), orthogonality(made)[0])
    model = hal_kernels.patch_model(nn.Sequential(nn.Linear(12, 8)), 2, targets=["0"])
    with pytest.raises(RuntimeError, match=r"hal_kernels\.penalty\(model\)"):
        _ = model[0].penalty


class LoraLinear(nn.Module):
    """What other PEFT code does: wrap a layer, name its adapters, merge by hand."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict({"default": HALLinear.from_linear(base, 2)})
        self.enabled = True

    def forward(self, x):
        return self.adapters["default"](x) if self.enabled else self.base_layer(x)

    def merge(self):
        (f,) = hal_kernels.factors(self.adapters["default"]).values()
        with torch.no_grad():
            self.base_layer.weight += f.delta()
        self.enabled = False


def test_inside_a_layer_of_other_peft_code():
    base, x = nn.Linear(12, 8), torch.randn(3, 12)
    plain = base(x)
    wrapped = LoraLinear(base)
    nn.init.normal_(wrapped.adapters["default"].lam)
    adapted = wrapped(x)
    assert not torch.equal(adapted, plain)
    wrapped.enabled = False
    assert torch.equal(wrapped(x), plain)
    wrapped.merge()
    torch.testing.assert_close(wrapped(x), adapted, rtol=1e-5, atol=1e-5)
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained == [f"adapters.default.{x}" for x in ("p", "lam", "q")]


def test_factors_of_a_layer():
    made = layer()
    made.mask[0] = 0
    (f,) = hal_kernels.factors(made).values()
    assert (f.p.shape, f.lam.shape, f.q.shape, f.mask.shape) == ((12, 3), (3,), (3, 8), (3,))
    assert f.scaling == made.scaling == 8 / 3
    x = torch.randn(4, 12, dtype=torch.float64)
    expected = F.linear(x, made.weight + f.delta(), made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    f.lam.fill_(2.0)  # a view
    assert made.lam.tolist() == [2.0] * 3


def test_seeded_by_the_global_generator():
    torch.manual_seed(4)
    first = HALLinear(12, 8)
    torch.manual_seed(4)
    second = HALLinear(12, 8)
    assert torch.equal(first.p, second.p) and torch.equal(first.q, second.q)
