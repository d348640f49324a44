"""rank_pattern and alpha_pattern: initial ranks and scalings of single layers."""

import models
import pytest
import torch
from training import trainable

import hal_kernels


def patched(**options):
    defaults = {"hypernet": "direct", "init_rank": 3, "seed": 0}
    return hal_kernels.patch_model(models.net(), 2, **defaults | options)


PATTERN = {"up.0": 6, r"down\..*": 4}
STARTS = {"up.0": 6, "up.1": 3, "down.0": 4, "down.1": 4}


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_initial_ranks_and_the_budget(hypernet):
    """All directions beyond rank × layers are pruned in the end, wherever they start."""
    model = patched(hypernet=hypernet, rank_pattern=PATTERN, interval=1, prune_per_interval=3)
    assert hal_kernels.rank_pattern(model) == STARTS
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    extra = sum(STARTS.values()) - 2 * len(STARTS)
    for step in range(1, 6):
        models.loss_of(model(**models.batch(model, seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = sum(hal_kernels.rank_pattern(model).values())
        assert kept == sum(STARTS.values()) - min(3 * step, extra)
    assert kept == 2 * len(STARTS)


def test_scaling_of_one_layer(tmp_path):
    model = patched(alpha=8.0, alpha_pattern={"up.1": 2.0})
    assert {n: f.scaling for n, f in hal_kernels.factors(model).items()} == {
        "up.0": 4.0, "up.1": 1.0, "down.0": 4.0, "down.1": 4.0
    }  # fmt: skip
    for f in hal_kernels.factors(model).values():
        f.lam.normal_()
    x = models.batch(model)["x"]
    layer, f = model.up[1], hal_kernels.factors(model)["up.1"]
    expected = x @ (layer.weight + (f.q.t() * f.lam) @ f.p.t()).t() + layer.bias  # s = 1
    torch.testing.assert_close(model.eval().up[1](x), expected)
    output = model(x)["logits"]
    hal_kernels.save_adapter(model, tmp_path)
    loaded = hal_kernels.load_adapter(models.net(), tmp_path).eval()
    assert torch.equal(loaded(x)["logits"], output)
    torch.testing.assert_close(hal_kernels.merge(model)(x)["logits"], output)


def test_siblings_of_different_scaling():
    """q, k and v compute as one only with one scaling; else each by itself, with its own."""
    model = models.bert().eval()
    batch = {"input_ids": models.batch(model)["input_ids"]}
    hal_kernels.patch_model(model, 2, hypernet="direct", alpha_pattern={"key": 1.0}, seed=0)
    for f in hal_kernels.factors(model).values():
        f.lam.normal_()
    output = model(**batch).logits
    torch.testing.assert_close(hal_kernels.merge(model)(**batch).logits, output)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank_pattern": {"up.7": 3}}, ValueError, r"rank_pattern: 'up\.7' matches no adapted"),
        ({"alpha_pattern": {"upp": 3}}, ValueError, r"alpha_pattern: 'upp' matches no adapted"),
        ({"rank_pattern": {"up.0": 17}}, ValueError, r"'up\.0' rank 17, expected at most 16"),
        ({"rank_pattern": {"up.0": 0}}, ValueError, r"rank_pattern\['up\.0'\] is 0"),
        ({"rank_pattern": {"up.0": 2.0}}, TypeError, r"rank_pattern\['up\.0'\] is 2\.0"),
        ({"alpha_pattern": {"up.0": -1}}, ValueError, r"alpha_pattern\['up\.0'\] is -1"),
        ({"alpha_pattern": ["up.0"]}, TypeError, r"alpha_pattern is \['up\.0'\], expected a map"),
        ({"rank_pattern": {3: 3}}, TypeError, r"rank_pattern holds the key 3"),
        ({"rank_pattern": {"(": 3}}, ValueError, r"rank_pattern holds the key '\(', expected"),
        (
            {"rank_pattern": {"(?i)up": 3}},
            ValueError,
            r"rank_pattern holds the key '\(\?i\)up', expected .*global flags",
        ),
        ({"rank_pattern": {".*": 1}}, ValueError, r"start with 4 directions, expected at least"),
    ],
)
def test_refused(options, error, message):
    model = models.net()
    with pytest.raises(error, match=message):
        hal_kernels.patch_model(model, 2, hypernet="direct", **options)
    assert not hasattr(model, "hal")
