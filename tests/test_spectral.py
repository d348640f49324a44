"""update="spectral": factors that move by themselves, at the optimizer's learning rate."""

import copy

import models
import pytest
import torch
from lifecycle import patched, predict, prune, unchanged
from training import assert_close, assert_equal, batches, budget_used, kept, state, train, trainable

import hal_kernels
from hal_kernels.nn.allocation import lam_gradient
from hal_kernels.nn.spectral import RATE, TANGENT


def spectral(model=None, rank=2, **options):
    model = models.net() if model is None else model
    return hal_kernels.patch_model(model, rank, **{"update": "spectral", "seed": 0} | options)


def adamw(model, lr=1e-3, **options):
    return torch.optim.AdamW(trainable(model), lr=lr, **{"weight_decay": 0.0} | options)


def deltas(model):
    return {name: f.delta() for name, f in hal_kernels.factors(model).items()}


def orthonormal(model):
    for f in hal_kernels.factors(model).values():
        for rows in (f.p.t(), f.q):
            eye = torch.eye(len(rows), dtype=rows.dtype)
            torch.testing.assert_close(rows @ rows.t(), eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [models.net, models.llama, models.gpt2])
def test_training_needs_nothing_else(make):
    """The loss falls, P and Q stay orthonormal, and the optimizer holds no state of theirs."""
    model = spectral(make(), 3, total_step=30)
    optimizer = adamw(model, lr=1.2e-3)  # narrow layers take short steps
    losses = train(model, optimizer, [models.batch(model, 16)] * 30)
    assert losses[-1] < 0.95 * losses[0]
    orthonormal(model)
    assert budget_used(model) == 3 * len(model.hal.layout.layers)
    own = {id(p) for p in model.hal.parameters()}
    assert not own & {id(p) for p in optimizer.state}
    assert all(p.grad is None for p in model.hal.parameters())


def test_the_first_step_is_the_best_approximation_of_the_gradients_own():
    """ΔW after one step beside the formula, with Λ = 0: the longest of −η/2·(O_KᵀP + QᵀO_L)."""
    model = spectral(models.net(dtype=torch.float64), dtype=torch.float64, init_rank=2)
    before = {n: (f.p.t().clone(), f.q.clone()) for n, f in hal_kernels.factors(model).items()}
    plain, inputs = models.net(dtype=torch.float64), models.batch(model)
    models.loss_of(plain(**inputs)).backward()
    train(model, adamw(model), [inputs])
    for name, found in deltas(model).items():
        (p, q), gradient = before[name], plain.get_submodule(name).weight.grad
        sides = p @ gradient.t(), q @ gradient
        o_k, o_l = (
            u @ vh for u, _, vh in (torch.linalg.svd(m, full_matrices=False) for m in sides)
        )
        eta = RATE * 1e-3 * max(gradient.shape) ** 0.5
        whole = -eta / 2 * (o_k.t() @ p + q.t() @ o_l)
        u, s, vh = torch.linalg.svd(whole)
        torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-9, atol=1e-12)
        assert torch.linalg.matrix_norm(found, 2) <= eta * (1 + 1e-9)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_every_optimizer_gives_the_same_step(optimizer):
    model, other = spectral(), spectral()
    train(model, adamw(model), batches(model, 3))
    head = [p for p in trainable(other) if not any(p is own for own in other.hal.parameters())]
    groups = [{"params": list(other.hal.parameters())}, {"params": head}]
    # The head goes by AdamW in both, so that the gradients are the same.
    first, second = optimizer(groups[:1], lr=1e-3), torch.optim.AdamW(head, lr=1e-3, weight_decay=0)
    for inputs in batches(other, 3):
        models.loss_of(other(**inputs)).backward()
        for one in (first, second):
            one.step()
            one.zero_grad()
    assert_equal(state(other), state(model))


def test_the_learning_rate_is_the_optimizers():
    model = spectral()
    optimizer = adamw(model, lr=0.0)
    before = state(model)
    train(model, optimizer, batches(model, 2))
    for name in ("lam", "p_16", "p_24"):
        torch.testing.assert_close(model.hal.state_dict()[name], before[f"hal.{name}"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.param_groups[0]["lr"] = 2e-3
    schedule.base_lrs = [2e-3]
    old = deltas(model)
    train(model, optimizer, batches(model, 1))
    for name, new in deltas(model).items():
        length = torch.linalg.matrix_norm(new - old[name], 2)
        eta = RATE * 2e-3 * max(new.shape) ** 0.5 * model.hal.log_gain.exp()
        assert 0.0 < length <= 1.001 * eta


def test_weight_decay_acts_on_delta():
    model = patched(update="spectral", hypernet="direct")
    with torch.no_grad():
        model.hal.lam.fill_(0.5)
    decayed = copy.deepcopy(model)
    for one, decay in ((model, 0.0), (decayed, 0.5)):
        train(one, adamw(one, lr=1e-4, weight_decay=decay), batches(one, 1))
    for name, plain in deltas(model).items():
        torch.testing.assert_close(
            deltas(decayed)[name], plain * (1 - 0.5e-4), rtol=1e-3, atol=1e-6
        )


def test_clipping_by_the_norm_sees_the_head_alone():
    """K and L are larger than a head's gradient; c keeps them out of the norm."""
    model, clipped = spectral(models.bert()), spectral(models.bert())

    def clip():
        norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
        alone = torch.nn.utils.get_total_norm([p.grad for p in clipped.classifier.parameters()])
        torch.testing.assert_close(norm, alone, rtol=1e-5, atol=0)
        assert norm < 1.0  # or the head itself would be clipped
        assert clipped.hal.p_32.grad.norm() / TANGENT > 1e-3

    train(model, adamw(model), batches(model, 3))
    train(clipped, adamw(clipped), batches(model, 3), clip)
    assert_equal(state(clipped), state(model))


def test_steps_weigh_alike_in_the_momenta_whatever_scales_their_gradients():
    """As clipping does, where the head's own gradient is clipped."""
    model, scaled = (spectral(models.net(dtype=torch.float64), dtype=torch.float64) for _ in "ab")

    def scale():
        for parameter in scaled.hal.parameters():
            parameter.grad.mul_(0.3**scaled.hal.steps)

    train(model, adamw(model), batches(model, 5))
    train(scaled, adamw(scaled), batches(model, 5), scale)
    assert_close(deltas(scaled), deltas(model), 1e-9)


def test_several_groups():
    model = spectral()
    p, *others = model.hal.parameters()
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-3}, {"params": others}], lr=2e-3)
    models.loss_of(model(**models.batch(model))).backward()
    with unchanged(model), pytest.raises(ValueError, match=r"groups with different options"):
        optimizer.step()


def test_micro_batches_add_up():
    model, whole = (spectral(models.net(dtype=torch.float64), dtype=torch.float64) for _ in "ab")
    one = models.batch(model, 8)
    halves = [{k: v[part] for k, v in one.items()} for part in (slice(4), slice(4, None))]
    for m, micro in ((model, halves), (whole, [one])):
        optimizer = adamw(m)
        for _ in range(3):
            for inputs in micro:
                (models.loss_of(m(**inputs)) / len(micro)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, deltas(whole)[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("allocation", ["sensitivity", "magnitude"])
@pytest.mark.parametrize("schedule", ["fixed", "cubic"])
def test_ranks_are_allocated(allocation, schedule):
    model = spectral(
        init_rank=4, allocation=allocation, schedule=schedule, interval=2, total_step=24
    )
    train(model, adamw(model), batches(model, 26))
    assert budget_used(model) == 8
    mask = model.hal.mask > 0
    assert not model.hal.lam[~mask].any() and model.hal.lam[mask].all()
    orthonormal(model)
    expected = predict(model)
    hal_kernels.compact(model)
    torch.testing.assert_close(predict(model), expected)
    train(model, adamw(model), batches(model, 2))
    orthonormal(model)


def test_score_is_that_of_lambda():
    """|Λ·dΛ| with dΛ from K and Q, beside the gradient that direct factors get."""
    model = patched(models.net(), update="spectral", hypernet="direct", init_rank=3)
    direct = patched(models.net(), hypernet="direct", init_rank=3, gamma=0.0)
    direct.hal.load_state_dict(
        {k: v for k, v in model.hal.state_dict().items() if k in direct.hal.state_dict()}
    )
    lam = torch.linspace(0.1, 1.0, model.hal.lam.numel())
    scores = {}
    for one in (model, direct):
        with torch.no_grad():
            one.hal.lam.copy_(lam)
        models.loss_of(one(**models.batch(one))).backward()
        if one is direct:
            scores["direct"] = one.hal.lam.grad
        else:
            optimizer = adamw(one)  # whose own hook runs after those of all optimizers
            optimizer.register_step_pre_hook(
                lambda *_: scores.update(spectral=lam_gradient(model.hal))
            )
            optimizer.step()
    torch.testing.assert_close(scores["spectral"], scores["direct"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("lr", "sign"), [(1e-4, 1), (0.1, -1)])
def test_steps_too_short_grow_and_too_long_ones_shrink(lr, sign):
    model = spectral()
    train(model, adamw(model, lr), [models.batch(model, 16)] * 10)
    assert sign * model.hal.log_gain > 0.05


def test_a_checkpoint_without_a_gain(tmp_path):
    """As the first ones were."""
    model = spectral()
    train(model, adamw(model), batches(model, 3))
    save = model.hal.state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model.hal, "state_dict", lambda: {k: v for k, v in save().items() if k != "log_gain"}
        )
        hal_kernels.save_adapter(model, tmp_path)
    loaded = hal_kernels.load_adapter(models.net(), tmp_path)
    assert loaded.hal.log_gain == 0 and model.hal.log_gain != 0
    torch.testing.assert_close(predict(loaded), predict(model), rtol=0, atol=0)


def test_life_after_training(tmp_path):
    peft = pytest.importorskip("peft")
    model = spectral(models.bert(), 3, init_rank=4, interval=1)
    base = predict(model)
    train(model, adamw(model), batches(model, 8))
    expected = predict(model)
    with hal_kernels.disabled(model):
        assert torch.equal(predict(model), base)
    torch.testing.assert_close(predict(copy.deepcopy(model)), expected)
    hal_kernels.export_lora(model, tmp_path)
    torch.testing.assert_close(
        predict(peft.PeftModel.from_pretrained(models.bert(), tmp_path)), expected
    )
    torch.testing.assert_close(predict(hal_kernels.merge(model)), expected)
    torch.testing.assert_close(predict(hal_kernels.unmerge(model)), expected)


def test_loss_outside_the_model():
    """The penalty of what is orthonormal is zero, and its gradient takes no part."""
    model, plain = spectral(gamma=3.0), spectral(gamma=3.0)
    for one in (model, plain):
        optimizer = adamw(one)
        for inputs in batches(one, 3):
            loss = models.loss_of(one(**inputs))
            if one is model:
                extra = hal_kernels.penalty(one)
                assert extra == 0.0
                loss = loss + extra
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize(("options", "message"), [
    ({"hypernet": "bert"}, r"hypernet is 'bert', expected 'direct' or None with update=\"spec"),
    ({"allocation": "ema"}, r"allocation is 'ema', expected 'sensitivity' or 'magnitude'"),
])  # fmt: skip
def test_what_does_not_go_with_it(options, message):
    model = models.net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        spectral(model, **options)


def test_step_is_refused():
    model = spectral()
    models.loss_of(model(**models.batch(model))).backward()
    with unchanged(model), pytest.raises(ValueError, match=r"takes its learning rate from the tor"):
        hal_kernels.step(model)


def test_masks_of_a_pruned_model_hold():
    model = spectral(init_rank=3, interval=10**6)
    train(model, adamw(model), batches(model, 2))
    prune(model, 0, 5)
    train(model, adamw(model), batches(model, 3))
    assert [i for i, k in enumerate(kept(model)) if not k] == [0, 5]
    assert not model.hal.lam[[0, 5]].any()


SWITCHES = [
    {"hypernet": "bert", "rank_pattern": {"up.0": 4}},
    {"hypernet": "mlp", "update": "replace", "allocation": "ema"},
    {"hypernet": "direct", "alpha": 3.0},
]


@pytest.mark.parametrize(
    ("into", "options"),
    [("patched", SWITCHES[0]), *(("unpatched", one) for one in SWITCHES)],
    ids=str,
)
def test_another_update_s_checkpoint_goes_on(into, options, small_hypernets, tmp_path):
    options = {"init_rank": 3, "interval": 4} | options
    model = patched(models.net(), **options)
    train(model, adamw(model), batches(model, 6))
    assert (model.hal.mask == 0).any()
    hal_kernels.save_adapter(model, tmp_path)
    other = models.net()
    if into == "patched":
        spectral(other, init_rank=3, rank_pattern=options.get("rank_pattern"))
        with pytest.raises(ValueError, match="update='spectral'"):
            hal_kernels.load_adapter(other, tmp_path)
    hal_kernels.load_adapter(other, tmp_path, update="spectral")
    torch.testing.assert_close(predict(other), predict(model))
    assert hal_kernels.rank_pattern(other) == hal_kernels.rank_pattern(model)
    orthonormal(other)
    train(other, adamw(other, lr=1.2e-3), [models.batch(other, 16)] * 30)
    assert other.hal.steps == 36
    assert budget_used(other) == 2 * len(other.hal.layout.layers)
    orthonormal(other)


def test_a_spectral_checkpoint_is_one_already(tmp_path):
    model = spectral()
    train(model, adamw(model), batches(model, 2))
    hal_kernels.save_adapter(model, tmp_path)
    other = hal_kernels.load_adapter(models.net(), tmp_path, update="spectral")
    assert_equal(state(other), state(model))


def test_no_other_update_is_switched_to(tmp_path):
    with pytest.raises(ValueError, match="update is 'replace', expected 'spectral'"):
        hal_kernels.load_adapter(models.net(), tmp_path, update="replace")
