"""The hypernetworks: identity at the start, update rules, what is trained, seeds."""

import lifecycle
import models
import pytest
import torch
from hypernet_reference import generated
from torch import nn
from training import adam, assert_equal, batches, by_layer, gradients, state, train, trainable

import hal_kernels

ARCHITECTURES = ["bert", "mlp", "cnn"]
ORDERS = [*((h, False) for h in ARCHITECTURES), ("bert", True)]  # of LayerNorm: norm_first
UPDATES = ["anchor", "residual", "replace"]
MAKERS = [models.net, models.bert, models.llama, models.gpt2]

pytestmark = pytest.mark.usefixtures("small_hypernets")


def patched(make=models.net, **options):
    return hal_kernels.patch_model(make(), 2, **({"init_rank": 3, "seed": 0} | options))


# ---- identity at the start ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "hypernet, update, make, dtype",
    [
        *((h, u, models.net, torch.float32) for h in ARCHITECTURES for u in ("anchor", "residual")),
        *((None, None, make, torch.bfloat16) for make in MAKERS),
        *(("bert", "anchor", make, torch.bfloat16) for make in MAKERS),
        ("direct", "anchor", models.gpt2, torch.float32),
    ],
)
def test_identity_at_the_start(hypernet, update, make, dtype):
    """The patched model's logits are the base model's, bit for bit, in both modes."""
    model = make(dtype=dtype)
    inputs = models.batch(model)
    before = models.logits_of(model(**inputs))
    hal_kernels.patch_model(model, 3, hypernet=hypernet, update=update)
    assert torch.equal(models.logits_of(model(**inputs)), before)
    with torch.no_grad():
        assert torch.equal(models.logits_of(model.eval()(**inputs)), before)


@pytest.mark.parametrize("hypernet", ["bert", "mlp"])
def test_identity_and_training_at_full_size(hypernet, monkeypatch):
    """The other tests here run hypernetworks of the same structure with fewer parameters."""
    monkeypatch.undo()
    model = models.net()
    inputs = models.batch(model)
    before = models.logits_of(model(**inputs))
    hal_kernels.patch_model(model, 2, init_rank=3, hypernet=hypernet, seed=0)
    assert torch.equal(models.logits_of(model(**inputs)), before)
    losses = train(model, adam(model, 1e-4), [inputs] * 2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_initial_factors_are_near_orthonormal(hypernet):
    """Unit rows, in every layer its own; Λ is zero."""
    for f in hal_kernels.factors(patched(models.bert, hypernet=hypernet)).values():
        for rows in (f.p.t(), f.q):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
            overlap = rows @ rows.t() - torch.eye(3)
            assert overlap.abs().max() < 0.7  # 32 dimensions: 0.18 on average
        assert not f.lam.any()


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hypernet, norm_first, update", [("direct", False, "anchor")] + [
    (*o, u) for o in ORDERS for u in UPDATES
])  # fmt: skip
def test_every_parameter_gets_a_gradient(hypernet, norm_first, update):
    """Within two steps; the first one can't reach behind output projections that start at zero."""
    model = patched(hypernet=hypernet, update=update, norm_first=norm_first)
    optimizer = adam(model)
    seen = set()
    for inputs in batches(model, 2):
        models.loss_of(model(**inputs)).backward()
        seen |= {name for name, gradient in gradients(model).items() if gradient.any()}
        optimizer.step()
        optimizer.zero_grad()
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    if hypernet != "direct" and update != "replace":
        expected.remove("hal.hypernet.lam_in.weight")  # its input, Λ, is zero so far
    assert seen == expected


@pytest.mark.parametrize("hypernet", ARCHITECTURES)
def test_the_optimizer_holds_the_hypernetworks_alone(hypernet):
    """Factors, anchors, masks and scores are state: buffers, saved, moved, and never stepped."""
    model = patched(hypernet=hypernet, allocation="ema")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in names if not n.startswith("hal.hypernet.")} == {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    index = ("rows", "positions", "offsets")
    state_names = {n for n, _ in model.hal.named_buffers() if not n.startswith(index)}
    prefixes = ("", "anchor_", "importance_", "uncertainty_")
    factors = {p + name for name in ("p_16", "p_24", "lam", "q_16", "q_24") for p in prefixes}
    assert state_names == {"mask", "never_called"} | factors
    assert state_names <= set(model.hal.state_dict())


def test_direct_trains_the_factors():
    model = patched(hypernet="direct")
    names = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("hal.")}
    assert names == {"hal.p_16", "hal.p_24", "hal.lam", "hal.q_16", "hal.q_24"}


@pytest.mark.parametrize(
    ("hypernet", "update"),  # "residual" may blow up (docs/method.md)
    [("direct", "anchor"), ("bert", "anchor"), ("bert", "replace"), ("mlp", "replace"),
     ("cnn", "anchor")],
)  # fmt: skip
def test_training_lowers_the_loss(hypernet, update):
    model = patched(hypernet=hypernet, update=update, interval=4)
    data = [models.batch(model, 16)] * 20
    losses = train(model, adam(model, 1e-2 if hypernet == "direct" else 3e-3), data)
    assert losses[-1] < losses[0]
    assert all(t.isfinite().all() for t in state(model).values())


# ---- update rules, by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("hypernet, norm_first", ORDERS)
def test_update_rule(hypernet, norm_first, update):
    """factors_{i+1} = H(factors_i; Φ) for every layer by itself, over steps with pruning."""
    model = patched(
        lambda: models.net(dtype=torch.float64), hypernet=hypernet, update=update,
        norm_first=norm_first, dtype=torch.float64, interval=1, prune_per_interval=1,
    )  # fmt: skip
    optimizer = adam(model)
    adapter = model.hal
    for inputs in batches(model, 4):
        base = {"anchor": "anchor_", "residual": ""}.get(update)
        base = None if base is None else adapter.packed(base)
        with torch.no_grad():
            made = generated(adapter.hypernet, adapter.layout, adapter.packed(), adapter.mask, base)
        expected = by_layer(model, made)
        for name, f in hal_kernels.factors(model).items():
            for found, by_hand in zip((f.p.t(), f.lam, f.q), expected[name], strict=True):
                torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-12)
        train(model, optimizer, [inputs])
        # what this step's forward used, detached, is the state now
        assert not any(t.requires_grad for t in adapter.packed().tensors())
        for name, after in by_layer(model, adapter.packed()).items():
            for found, value in zip(after, expected[name], strict=True):
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


def test_the_anchor_never_moves():
    model = patched(hypernet="bert", interval=1)
    before = {n: b.clone() for n, b in model.hal.named_buffers() if n.startswith("anchor_")}
    train(model, adam(model), batches(model, 5))
    after = {n: b for n, b in model.hal.named_buffers() if n.startswith("anchor_")}
    assert_equal(after, before)


@pytest.mark.parametrize("hypernet", ARCHITECTURES)
def test_one_generation_serves_every_layer_and_micro_batch(hypernet):
    """Generation doesn't depend on the inputs: micro-batches of a step see the same factors."""
    model = patched(hypernet=hypernet)
    train(model, adam(model), batches(model, 2))
    before = hal_kernels.factors(model)
    for inputs in batches(model, 3):
        models.loss_of(model(**inputs)).backward()
        now = hal_kernels.factors(model)
        for name, f in now.items():
            assert all(torch.equal(a, b) for a, b in zip(f[:4], before[name][:4], strict=True))


@pytest.mark.parametrize("norm_first", [False, True])
def test_pruned_directions_do_not_influence_kept_ones(norm_first):
    """What a pruned row holds is irrelevant, in generation as well: compact may drop it."""
    model = patched(models.bert, hypernet="bert", norm_first=norm_first)
    train(model, adam(model), batches(model, 2))
    adapter = model.hal
    with torch.no_grad():
        adapter.mask[::3] = 0
        before = model.eval()(**models.batch(model)).logits
        for name, rows in (("p_32", adapter.rows_p), ("q_32", adapter.rows_q)):
            tensor = getattr(adapter, name)
            pruned = adapter.mask[rows[: tensor.shape[0]]] == 0
            tensor[pruned] = 7.0
        adapter.lam[adapter.mask == 0] = 7.0
        after = model(**models.batch(model)).logits
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


# ---- sizes -------------------------------------------------------------------------------------


def test_paper_sizes(monkeypatch):
    """One TinyBERT layer of hidden 312, 12 heads and FFN 1200 for each of P, Λ and Q [4.1.4]."""
    monkeypatch.undo()
    body = patched(hypernet="bert").hal.hypernet.body
    one = 312 * 312 * 4 + 4 * 312 + 2 * 312 * 1200 + 1200 + 312 + 4 * 312
    assert sum(p.numel() for p in body.parameters()) == 3 * one
    mlp = patched(hypernet="mlp").hal.hypernet.body
    hidden = [layer.out_features for layer in mlp.sets[0] if isinstance(layer, nn.Linear)][:-1]
    assert len(hidden) == 15 and set(hidden) == {256, 512, 1024}
    cnn = patched(hypernet="cnn").hal.hypernet.body
    convolutions = [m for m in cnn.sets[0].modules() if isinstance(m, nn.Conv1d)]
    assert sum(c.kernel_size[0] > 1 for c in convolutions) == 17  # and one linear layer: 18
    assert {c.out_channels for c in convolutions} == {64, 128, 256}


@pytest.mark.parametrize("norm_first", [False, True])
def test_hidden(tmp_path, norm_first):
    """Another width, with 4 heads and 4 times as wide an inner layer: trained, saved and loaded."""
    model = patched(hypernet="bert", hidden=8, norm_first=norm_first)
    body = model.hal.hypernet.body
    assert (body.heads, body.qkv_weight.shape, body.up_weight.shape) == (4, (3, 24, 8), (3, 32, 8))
    assert model.hal.hypernet.lam_embedding.shape[1] == 8
    data = [models.batch(model, 16)] * 2
    losses = train(model, adam(model), data)
    assert losses[1] < losses[0]
    hal_kernels.save_adapter(model, tmp_path)
    loaded = hal_kernels.load_adapter(models.net(), tmp_path)
    assert loaded.hal.config.hidden == 8
    assert_equal(state(loaded), state(model))
    assert train(loaded, adam(loaded), data) == train(model, adam(model), data)
    other = patched(hypernet="bert", norm_first=norm_first)
    with lifecycle.unchanged(other), pytest.raises(ValueError, match=r"hidden=8; .*, None$"):
        hal_kernels.load_adapter(other, tmp_path)


# ---- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hypernet", ["direct", *ARCHITECTURES])
def test_seed(hypernet):
    """Equal seeds, equal tensors; others, others; and torch's own generator isn't touched."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = state(patched(hypernet=hypernet, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(5)
    assert_equal(state(patched(hypernet=hypernet, seed=3)), first)
    other = state(patched(hypernet=hypernet, seed=4))
    assert not torch.equal(other["hal.p_16"], first["hal.p_16"])


def test_seed_leaves_the_gpus_generators_alone(monkeypatch):
    """torch.manual_seed would seed every GPU's as well, now or when CUDA starts."""
    seeded, model = [], models.net()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    hal_kernels.patch_model(model, 2, seed=3)
    assert not seeded


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_no_seed_draws_from_torchs_generator(hypernet):
    torch.manual_seed(11)
    first, second = (state(patched(hypernet=hypernet, seed=None)) for _ in range(2))
    torch.manual_seed(11)
    assert_equal(state(patched(hypernet=hypernet, seed=None)), first)
    assert not torch.equal(second["hal.p_16"], first["hal.p_16"])


@pytest.mark.parametrize("hypernet", ["direct", *ARCHITECTURES])
def test_runs_are_reproducible(hypernet):
    """Dropout included: equal seeds give equal losses, bit for bit."""
    runs = []
    for _ in range(2):
        model = patched(hypernet=hypernet, dropout=0.2, interval=1)
        torch.manual_seed(1)
        runs.append((train(model, adam(model), batches(model, 4)), state(model)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_trainable_count_does_not_grow_with_depth(monkeypatch):
    """The hypernetworks are shared: one more layer adds the embeddings of its directions only."""
    monkeypatch.undo()
    nets = [
        hal_kernels.patch_model(models.net(depth=d), 2, seed=0, hypernet="bert") for d in (1, 2, 4)
    ]
    counts = [sum(p.numel() for p in trainable(net)) for net in nets]
    per_block = 2 * 3 * 312  # a row of the embedding
    assert counts[1] - counts[0] == per_block
    assert counts[2] - counts[1] == 2 * per_block
