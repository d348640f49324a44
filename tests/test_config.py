"""HALConfig: defaults, checks, JSON. The table of wrong values is in test_errors.py."""

import dataclasses
import json

import models
import pytest
import torch

from hal_kernels import HALConfig, patch_model

OTHER = {
    "rank": 4, "init_rank": 7, "targets": ("query", "value"), "exclude": r".*pooler.*",
    "modules_to_save": ("head",), "hypernet": "cnn", "norm_first": True,
    "update": "residual", "alpha": 16.0,
    "dropout": 0.1, "gamma": 0.5, "penalty": "frobenius", "allocation": "ema",
    "schedule": "cubic", "interval": 10, "prune_per_interval": 5, "tinit": 20, "tfinal": 30,
    "total_step": 200, "beta1": 0.9, "beta2": 0.8, "dtype": torch.float64, "seed": 3,
    "skip_nonfinite": False, "rank_pattern": {"up.0": 9}, "alpha_pattern": {r".*\.1": 2.5},
}  # fmt: skip


def test_defaults():
    config = HALConfig()
    assert dataclasses.asdict(config) == {
        "rank": 3, "init_rank": None, "targets": "all-linear", "exclude": None,
        "modules_to_save": "auto", "hypernet": "direct",
        "norm_first": False, "hidden": None, "update": "spectral", "alpha": 8.0, "dropout": 0.0,
        "gamma": 0.1, "penalty": "squared",
        "allocation": "sensitivity", "schedule": "fixed", "interval": None,
        "prune_per_interval": None, "tinit": 0, "tfinal": 0, "total_step": None, "beta1": 0.85,
        "beta2": 0.85, "dtype": torch.float32, "seed": None, "skip_nonfinite": True,
        "rank_pattern": None, "alpha_pattern": None,
    }  # fmt: skip


def test_it_is_frozen_and_compares_by_value():
    config = HALConfig(**OTHER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 5
    assert config == HALConfig(**OTHER) and config != HALConfig()
    assert hash(config) == hash(HALConfig(**OTHER))


@pytest.mark.parametrize(
    "options",
    [
        {},
        OTHER,
        {"dtype": torch.bfloat16, "targets": ["a", "b"]},
        {"hypernet": "bert", "hidden": 64},
    ],
)
def test_json_round_trip(options):
    config = HALConfig(**options)
    values = json.loads(json.dumps(config.to_dict()))
    assert HALConfig.from_dict(values) == config
    assert values.keys() == {f.name for f in dataclasses.fields(HALConfig)}


def test_every_field_is_in_the_other_example():
    """So that the round trip above covers a field that is added later."""
    default = dataclasses.asdict(HALConfig())
    assert default.keys() == OTHER.keys() | {"hidden"}  # which goes with "bert" alone
    assert all(value != default[name] for name, value in OTHER.items())


def test_lists_become_tuples():
    config = HALConfig(targets=["a"], exclude=["b"], modules_to_save=["c"])
    assert (config.targets, config.exclude, config.modules_to_save) == (("a",), ("b",), ("c",))


def test_from_dict_fills_in_defaults_and_leaves_its_argument_alone():
    values = {"rank": 2, "dtype": "bfloat16"}
    config = HALConfig.from_dict(values)
    assert config == HALConfig(rank=2, dtype=torch.bfloat16)
    assert values == {"rank": 2, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("rank", "init_rank", "sides", "ranks", "budget"),
    [
        (3, None, (100, 100), [5, 5], 6),
        (2, None, (100,), [3], 2),
        (1, None, (100,), [2], 1),
        (4, None, (5, 100), [5, 6], 8),  # a narrow layer has its own limit
        (4, None, (3, 100, 1), [3, 6, 1], 8),
        (4, None, (4, 4), [4, 4], 8),
        (3, 8, (8, 7), [8, 7], 6),
        (3, 3, (8, 2), [3, 2], 5),
    ],
)
def test_init_rank(rank, init_rank, sides, ranks, budget):
    narrowest = dict(zip("abc", sides, strict=False))
    config = HALConfig(rank=rank, init_rank=init_rank).for_layers(narrowest)
    assert [config.init_rank_of(*item) for item in narrowest.items()] == ranks
    assert config.initial_rows(narrowest) == sum(ranks) and config.budget(narrowest) == budget


def test_scaling():
    assert HALConfig(rank=4, alpha=10.0).scaling == 2.5
    model = patch_model(models.net(), 4, alpha=10.0, hypernet="direct")
    assert model.hal.config.scaling == 2.5


def test_patch_model_takes_every_option():
    options = OTHER | {
        "targets": ("0", "1"),
        "exclude": "down.*",
        "modules_to_save": ("classifier",),
    }
    model = patch_model(models.net(), **options)
    assert model.hal.config == HALConfig(**options)


def test_whole_numbers_are_numbers():
    config = HALConfig(alpha=16, gamma=0, dropout=0)
    assert config.scaling == 16 / 3 and config.gamma == 0
