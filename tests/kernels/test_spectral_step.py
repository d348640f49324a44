"""The spectral step's three kernels against the formula. Few and low ranks: each rotation of each
sweep is interpreted."""

import importlib

import pytest
import torch
from ops.spectral_cases import NAMES, make, moments, off_orthonormal, update
from ops.util import assert_same

from .harness import DEVICE, Guarded, launches

operator = importlib.import_module("hal_kernels.ops.spectral_step")
kernels = importlib.import_module("hal_kernels.ops.spectral_step.triton")

LAYERS = [(24, 16, 3), (130, 16, 1), (24, 9, 0)]
LAUNCHES = ["gram", "solve", "write"]


def arguments(case, eta=0.1, scaling=1.0, decay=1.0, beta=0.9, gain=None, gain_rate=0.5):
    def numbers(value):
        value = torch.as_tensor(value, dtype=torch.float64, device=DEVICE)
        return value.expand(len(case.layers))

    p, q, *rest = (case.packed[name] for name in NAMES)
    slots = case.slots
    return (
        p, case.lam, q, *rest, case.mask, *map(numbers, (eta, scaling, decay)), gain, beta,
        gain_rate, list(slots.rows), list(slots.offsets), *slots.counts, *slots.sizes,
        slots.max_rank,
    )  # fmt: skip


def run(case, **options):
    """One step; nothing but three launches, each within its outputs."""
    inputs = arguments(case, **options)
    with launches(kernels) as log, Guarded() as guarded:
        candidates = kernels.step_(*inputs)
    assert log == LAUNCHES
    assert set(guarded.calls) <= {"copy_", "clone"}  # the numbers of all layers become dense
    return candidates


def check(case, bound=2e-6, **options):
    candidates = run(case, **options)
    for i, (*_, rank) in enumerate(case.layers):
        ref, expected = case.expected(i, **{"eta": 0.1, **options})
        out, own = case.layer(i), candidates[i, : 2 * rank]
        assert_same({"lam": out.lam, "dw": update(out)}, {"lam": ref.lam, "dw": update(ref)}, bound)
        assert_same(moments(out), moments(ref), 4 * bound)
        assert off_orthonormal(out.p) <= bound and off_orthonormal(out.q) <= bound
        assert_same({"": own}, {"": expected}, bound)
        assert (candidates[i, 2 * rank :] == 0).all()


def test_matches_the_reference():
    """Widths of one and of several blocks of columns, ranks that differ, or of zero."""
    case = make(LAYERS, mask=torch.tensor([0.0, 0.5, 1.0, -1.0], device=DEVICE))
    numbers = torch.tensor([0.1, 0.5, 1.0])
    check(case, eta=numbers, scaling=numbers + 1, decay=1 - numbers / 2, beta=0.8)
    assert (case.lam[case.mask <= 0] == 0).all()


@pytest.mark.parametrize("rank", kernels.RANKS[1:])
def test_ranks_that_are_padded(rank, monkeypatch):
    """Blocks of 16 and 32, whose products are summed in another way than those of 8."""
    monkeypatch.setattr(kernels, "RANKS", (rank,))
    check(make([(6, 5, 2)]), 4e-6)


@pytest.mark.slow
def test_the_highest_rank():
    """A rank between two powers of two, padded to the largest that registers hold."""
    check(make([(40, 26, 18)]), 4e-6)


def test_bfloat16():
    check(make([(24, 16, 2)], torch.bfloat16), 2e-2, eta=0.3, scaling=2.5, decay=0.9)


def test_the_gain():
    """Of what a step uses, and leaves: matrices without a finite gradient do not count."""
    case, gain = make([(24, 16, 2), (8, 6, 1)]), torch.tensor(0.3, device=DEVICE)
    case.before["gradient_p"][1].fill_(torch.nan)
    case.give({"gradient_p": case.before["gradient_p"]})
    expected = case.expected_gain(0.3, 7.0)
    run(case, eta=0.2, gain=gain, gain_rate=7.0)
    assert gain.item() == pytest.approx(expected.item(), rel=1e-6)
    ref, _ = case.expected(0, eta=0.2 * expected.exp().item())
    assert_same({"dw": update(case.layer(0))}, {"dw": update(ref)}, 4e-6)


def test_ranks_above_half_of_a_width():
    """O has no room beside P: fewer directions than 2r."""
    check(make([(3, 5, 2), (2, 2, 2)]), 4e-6)


def test_rank_deficient_gradients():
    """One direction, none on one side, and those of the factors themselves, in a first step."""
    case = make([(24, 16, 2), (16, 24, 2), (16, 16, 2)], lam="zeros", momentum=False)
    own = {f"gradient_{n}": [t.clone() for t in case.before[f"gradient_{n}"]] for n in "pq"}
    own["gradient_p"][0][1:] = own["gradient_p"][0][:1]
    own["gradient_q"][1].zero_()
    own |= {n: [*own[n][:2], case.before[n[-1]][2]] for n in own}
    case.before |= own
    case.give(own)
    run(case, eta=0.2)
    for i in range(3):
        out, (ref, _) = case.layer(i), case.expected(i, eta=0.2)
        assert_same({"dw": update(out)}, {"dw": update(ref)}, 1e-5)
        assert off_orthonormal(out.p) <= 1e-6 and off_orthonormal(out.q) <= 1e-6


def test_a_step_that_cancels_a_layer():
    case = make([(16, 12, 2)], lam="equal", momentum=False)
    case.give({f"gradient_{n}": case.before[n] for n in ("p", "q")})
    (candidates,) = run(case, eta=1.0)
    assert (candidates < 1e-6).all() and (case.lam.abs() < 1e-6).all()
    assert off_orthonormal(case.packed["p"][0]) <= 1e-6
    assert off_orthonormal(case.packed["q"][0]) <= 1e-6


def test_layers_that_stay_as_they_are():
    """Of seven only the first moves. Λ that is NaN has candidates too."""
    names = ("zeros", "gradient_p", "gradient_q", "momentum_q", "p", "lam")
    case = make([(8, 6, 2)] * 7)
    eta = torch.tensor([0.1] * 6 + [float("nan")])
    for i, name in enumerate(names, 1):
        if name == "zeros":
            for n in ("gradient_p", "gradient_q"):
                case.before[n][i] = torch.zeros_like(case.before[n][i])
        elif i < 6:
            case.before[name][i].view(-1)[0] = float("nan") if i % 2 else float("inf")
    case.before["lam"][5].fill_(float("nan"))
    case.packed = {n: case.pack(n, own) for n, own in case.before.items() if n != "lam"}
    case.lam = torch.cat(case.before["lam"])
    before = [t.clone() for t in case.tensors()]
    candidates = run(case, eta=eta)
    for now, then in zip(case.tensors(), before, strict=True):
        assert torch.equal(now[2:].nan_to_num(), then[2:].nan_to_num())
        assert (now[:2] != then[:2]).all()
    order = case.before["lam"][1].abs().sort(descending=True).values
    assert torch.equal(candidates[1, :2], order) and (candidates[1:, 2:] == 0).all()
    assert candidates[5, :2].isnan().all()
    ref, _ = case.expected(0, eta=0.1)
    assert_same({"dw": update(case.layer(0))}, {"dw": update(ref)}, 2e-6)


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        case = make([(768, 768, 4)] * 8)
        runs.append([run(case), *case.tensors()])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "layers, dtype", [([(40, 40, 33)], torch.float32), ([(9, 8, 2)], torch.float64)]
)
def test_what_the_default_implementation_computes(layers, dtype):
    case = make(layers, dtype)
    with launches(kernels) as log:
        operator._cuda(*arguments(case))
    assert log == []
    ref, _ = case.expected(0, eta=0.1)
    assert_same({"dw": update(case.layer(0))}, {"dw": update(ref)}, 2e-6)


def test_the_operator_runs_them():
    case = make([(9, 8, 1)])
    with launches(kernels) as log:
        operator._cuda(*arguments(case))
    assert log == LAUNCHES
    ref, _ = case.expected(0, eta=0.1)
    assert_same({"dw": update(case.layer(0))}, {"dw": update(ref)}, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_large(rank):
    layers = [(768, 768, rank)] * 8 + [(768, 3072, rank), (3072, 768, rank)]
    case = make(layers)
    check(case, 5e-6)
    for _ in range(50):
        for name in ("gradient_p", "gradient_q"):
            for tensor in case.packed[name]:
                tensor.normal_()
        run(case, eta=0.05)
    for i in range(len(layers)):
        assert off_orthonormal(case.layer(i).p) <= 1e-5


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    case = make([(768, 768, 4)] * 4)
    case.step(eta=0.1)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step(eta=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
