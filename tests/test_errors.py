"""Each wrong argument of each public function: the exception, and a text that names the argument,
what came and what was expected. A model given to the call is as it was before.
"""

import models
import pytest
import torch
from lifecycle import patched, unchanged
from torch import nn

import hal_kernels as hk


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


# -- options: the same text from HALConfig and from patch_model ------------------------------------

INT = r"{} is {}, expected an int"
LEAST = r"{} is {}, expected at least {}"

OPTIONS = [
    ("rank", 0, ValueError, LEAST.format("rank", 0, 1)),
    ("rank", -3, ValueError, LEAST.format("rank", -3, 1)),
    ("rank", 2.0, TypeError, INT.format("rank", r"2\.0")),
    ("rank", True, TypeError, INT.format("rank", "True")),
    ("rank", "3", TypeError, INT.format("rank", "'3'")),
    ("rank", None, TypeError, INT.format("rank", "None")),
    ("init_rank", 2, ValueError, r"init_rank is 2, expected at least rank = 3: ranks only shrink"),
    ("init_rank", 0, ValueError, LEAST.format("init_rank", 0, 1)),
    ("init_rank", 4.5, TypeError, INT.format("init_rank", r"4\.5")),
    ("targets", 5, TypeError, r"targets is 5, expected"),
    ("targets", None, TypeError, r"targets is None, expected"),
    ("targets", [1, 2], TypeError, r"targets.* (is|holds) .*1.*, expected"),
    ("targets", "(", ValueError, r"targets is '\(', .*(regular|pattern)"),
    ("exclude", 5, TypeError, r"exclude is 5, expected"),
    ("exclude", [None], TypeError, r"exclude.* (is|holds) .*None.*, expected"),
    ("exclude", "[", ValueError, r"exclude is '\[', .*(regular|pattern)"),
    ("modules_to_save", 5, TypeError, r"modules_to_save is 5, expected"),
    ("modules_to_save", [3], TypeError, r"modules_to_save.* (is|holds) .*3.*, expected"),
    ("modules_to_save", "*", ValueError, r"modules_to_save is '\*', .*(regular|pattern)"),
    ("hypernet", "rnn", ValueError, r"hypernet is 'rnn', expected one of \('bert', 'mlp'"),
    ("hypernet", ["bert"], ValueError, r"hypernet is \['bert'\], expected one of"),
    ("update", "add", ValueError, r"update is 'add', expected one of \('anchor'"),
    ("penalty", "l1", ValueError, r"penalty is 'l1', expected one of \('squared', 'frobenius'\)"),
    ("allocation", "random", ValueError, r"allocation is 'random', expected one of \('sens"),
    ("schedule", "linear", ValueError, r"schedule is 'linear', expected one of \('fixed'"),
    ("alpha", 0.0, ValueError, r"alpha is 0\.0, expected more than 0"),
    ("alpha", -1, ValueError, r"alpha is -1, expected more than 0"),
    ("alpha", float("nan"), ValueError, r"alpha is nan, expected more than 0"),
    ("alpha", float("inf"), ValueError, r"alpha is inf, expected"),
    ("alpha", 10**400, ValueError, r"alpha is an integer too large for a float"),
    ("alpha", "8", TypeError, r"alpha is '8', expected a number"),
    ("alpha", torch.tensor(8.0), TypeError, r"alpha is tensor\(8\.\), expected a number"),
    ("dropout", 1.0, ValueError, r"dropout is 1\.0, expected at least 0 and less than 1"),
    ("dropout", -0.1, ValueError, r"dropout is -0\.1, expected at least 0 and less than 1"),
    ("dropout", None, TypeError, r"dropout is None, expected a number"),
    ("gamma", -0.1, ValueError, r"gamma is -0\.1, expected at least 0"),
    ("gamma", True, TypeError, r"gamma is True, expected a number"),
    ("beta1", 0.0, ValueError, r"beta1 is 0\.0, expected more than 0 and less than 1"),
    ("beta1", 1.0, ValueError, r"beta1 is 1\.0, expected more than 0 and less than 1"),
    ("beta2", 1.5, ValueError, r"beta2 is 1\.5, expected more than 0 and less than 1"),
    ("beta2", "x", TypeError, r"beta2 is 'x', expected a number"),
    ("interval", 0, ValueError, LEAST.format("interval", 0, 1)),
    ("interval", 1e2, TypeError, INT.format("interval", r"100\.0")),
    ("prune_per_interval", 0, ValueError, LEAST.format("prune_per_interval", 0, 1)),
    ("prune_per_interval", "2", TypeError, INT.format("prune_per_interval", "'2'")),
    ("tinit", -1, ValueError, LEAST.format("tinit", -1, 0)),
    ("tinit", None, TypeError, INT.format("tinit", "None")),
    ("tfinal", -1, ValueError, LEAST.format("tfinal", -1, 0)),
    ("tfinal", 0.5, TypeError, INT.format("tfinal", r"0\.5")),
    ("total_step", 0, ValueError, LEAST.format("total_step", 0, 1)),
    ("total_step", "all", TypeError, INT.format("total_step", "'all'")),
    ("seed", -1, ValueError, LEAST.format("seed", -1, 0)),
    ("seed", 1.5, TypeError, INT.format("seed", r"1\.5")),
    ("seed", 2**70, ValueError, r"seed is \d+, expected"),
    ("dtype", torch.float16, ValueError, r"dtype is torch\.float16, expected one of"),
    ("dtype", torch.int8, ValueError, r"dtype is torch\.int8, expected one of \[torch\.float32"),
    ("dtype", "float32", ValueError, r"dtype is '?float32'?, expected one of \[torch\.float32"),
    ("dtype", None, ValueError, r"dtype is None, expected one of"),
    ("norm_first", 1, TypeError, r"norm_first is 1, expected (a )?bool"),
    ("hidden", 0, ValueError, LEAST.format("hidden", 0, 4)),
    ("hidden", -8, ValueError, LEAST.format("hidden", -8, 4)),
    ("hidden", 66, ValueError, r"hidden is 66, expected a multiple of its 4 heads"),
    ("hidden", 64.0, TypeError, INT.format("hidden", r"64\.0")),
    ("hidden", True, TypeError, INT.format("hidden", "True")),
    ("skip_nonfinite", "no", TypeError, r"skip_nonfinite is 'no', expected (a )?bool"),
]

OTHERS = ({"hypernet": "mlp"}, {"hypernet": "cnn"}, {"hypernet": "direct"}, {"update": "spectral"})
TOGETHER = [
    *(
        (options | {"hidden": 64}, r"hidden is 64, expected None with hypernet='(mlp|cnn|direct)'")
        for options in OTHERS
    ),
    ({"schedule": "cubic"}, r"total_step is None, expected a number of steps \(schedule="),
    (
        {"schedule": "cubic", "total_step": 10, "tinit": 6, "tfinal": 4},
        r"tinit is 6, expected less than total_step - tfinal = 6: nothing could be allocated",
    ),
    ({"total_step": 10, "tfinal": 20}, r"tinit is 0, expected less than total_step - tfinal = -10"),
]


def label(value):
    return repr(value)[:20] if not callable(value) else value.__name__


@pytest.mark.parametrize(("name", "value", "error", "message"), OPTIONS, ids=label)
def test_option(name, value, error, message):
    with pytest.raises(error, match=message):
        hk.HALConfig(**{name: value})
    model = models.net()
    with unchanged(model), pytest.raises(error, match=message):
        hk.patch_model(model, **{name: value})


@pytest.mark.parametrize(("options", "message"), TOGETHER)
def test_options_together(options, message):
    model = models.net()
    with pytest.raises(ValueError, match=message):
        hk.HALConfig(**options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        hk.patch_model(model, **options)


# -- arguments -------------------------------------------------------------------------------------


def in_block(model):
    with hk.disabled(model):
        pass


PATCHED = {
    "factors": hk.factors,
    "rank_pattern": hk.rank_pattern,
    "summary": hk.summary,
    "penalty": hk.penalty,
    "step": hk.step,
    "disabled": in_block,
    "merge": hk.merge,
    "compact": hk.compact,
    "save_adapter": lambda model: hk.save_adapter(model, "nowhere/at/all"),
    "export_lora": lambda model: hk.export_lora(model, "nowhere/at/all"),
}
ALL = PATCHED | {
    "patch_model": hk.patch_model,
    "unmerge": hk.unmerge,
    "load_adapter": lambda model: hk.load_adapter(model, "nowhere/at/all"),
}


@pytest.mark.parametrize("value", [None, 3, "bert", {}, nn.Linear])
@pytest.mark.parametrize("name", ALL)
def test_model_is_no_module(name, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"model is a {kind}, expected torch\.nn\.Module"):
        ALL[name](value)


def two_adapters():
    """Acting on the first one found would leave out the other without a word."""
    return nn.ModuleDict({"left": patched(), "right": patched()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (models.net, r"model is not patched: call hal_kernels\.patch_model\(model\) first"),
        (lambda: hk.merge(patched()), r"model is merged: call hal_kernels\.unmerge\(model\) first"),
        (two_adapters, r"left.*right"),
    ],
)
@pytest.mark.parametrize("name", PATCHED)
def test_model_without_its_one_adapter(name, make, message):
    model = make()
    with unchanged(model), pytest.raises(ValueError, match=message):
        PATCHED[name](model)


@pytest.mark.parametrize("name", ["save_adapter", "load_adapter", "export_lora"])
def test_path_is_no_path(name):
    model = patched()
    nothing = r"path is '(a\\x00b)?', expected a folder's path \('\.' is the current folder\)"
    for path, error, message in (
        *((path, TypeError, f"(?i)path.*{type(path).__name__}") for path in (None, 3, ["a"], b"a")),
        *((path, ValueError, nothing) for path in ("", "a\0b")),
    ):
        with unchanged(model), pytest.raises(error, match=message):
            getattr(hk, name)(model, path)


def test_export_names():
    model = patched()
    for name in ("task_type", "base_model_name_or_path"):
        with unchanged(model), pytest.raises(TypeError, match=f"{name} is 5, expected"):
            hk.export_lora(model, "nowhere/at/all", **{name: 5})


def test_load_from_nowhere(tmp_path):
    model = models.net()
    message = rf"{tmp_path} holds no adapter checkpoint \(adapter\.json is missing\)"
    with unchanged(model), pytest.raises(FileNotFoundError, match=message):
        hk.load_adapter(model, tmp_path)


# -- patch_model -----------------------------------------------------------------------------------

PATCHING = [
    ({"gama": 1}, TypeError, r"'gama' \(did you mean 'gamma'\?\); it has r"),
    (
        {"r": 4, "lora_alpha": 8, "xyz": 1}, TypeError,
        r"'lora_alpha' \(did you mean 'alpha'\?\), 'r' \(did you mean 'rank'\?\), 'xyz'; it has",
    ),
    (
        {"targets": "0"}, ValueError,
        r"targets is '0': .* matches all of its name; did you mean the list \['0'\]",
    ),
    ({"config": {}}, TypeError, r"config is a dict, expected HALConfig"),
    ({"rank": 4, "config": hk.HALConfig()}, ValueError, r"config comes with rank or other options"),
    ({"alpha": 2.0, "config": hk.HALConfig()}, ValueError, r"config comes with rank or other opt"),
    ({"rank": 17}, ValueError, r"rank is 17, expected at most 16 \(the"),
    (
        {"init_rank": 17}, ValueError,
        r"init_rank is 17, expected at most 16 \(the narrower side of the largest",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), PATCHING)
def test_patching(options, error, message):
    model = models.net()
    with unchanged(model), pytest.raises(error, match=message):
        hk.patch_model(model, **options)


@pytest.mark.parametrize("model", [nn.Linear(16, 24), nn.ReLU()], ids=str)
def test_patching_of_what_holds_no_linear_layer(model):
    message = rf"no linear layer of {type(model).__name__} matches"
    with unchanged(model), pytest.raises(ValueError, match=message):
        hk.patch_model(model)


# -- HALConfig -------------------------------------------------------------------------------------

CONFIGS = [
    (lambda: hk.HALConfig(3), TypeError, r"positional argument"),
    (lambda: hk.HALConfig(rnk=3), TypeError, r"rnk"),
    (
        lambda: hk.HALConfig.from_dict({"rnk": 3}), ValueError,
        r"unknown options: 'rnk' \(did you mean 'ra",
    ),
    (lambda: hk.HALConfig.from_dict({"dtype": "int4"}), ValueError, r"dtype is 'int4', expect"),
    (lambda: hk.HALConfig.from_dict({"rank": "3"}), TypeError, r"rank is '3', expected an int"),
    (
        lambda: hk.HALConfig(rank=9).for_layers({"a": 8, "b": 2}), ValueError,
        r"rank is 9, expected at most 8 \(the narrower side of the largest adapted layer\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CONFIGS)
def test_config(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- HALLinear -------------------------------------------------------------------------------------

LAYERS = [
    ("rank", 0, ValueError, r"rank is 0, expected 1 to 8 \(the layer is 12 -> 8\)"),
    ("rank", 9, ValueError, r"rank is 9, expected 1 to 8 \(the layer is 12 -> 8\)"),
    ("rank", 2.0, TypeError, r"rank is 2\.0, expected an int"),
    ("rank", True, TypeError, r"rank is True, expected an int"),
    ("alpha", 0, ValueError, r"alpha is 0, expected more than 0"),
    ("alpha", float("nan"), ValueError, r"alpha is nan, expected more than 0"),
    ("alpha", float("inf"), ValueError, r"alpha is inf, expected"),
    ("alpha", 10**400, ValueError, r"alpha is an integer too large for a float"),
    ("alpha", "8", TypeError, r"alpha is '8', expected a number"),
    ("dropout", 1.0, ValueError, r"dropout is 1\.0, expected at least 0 and less than 1"),
    ("dropout", -0.5, ValueError, r"dropout is -0\.5, expected at least 0 and less than 1"),
    ("dropout", "x", TypeError, r"dropout is 'x', expected a number"),
    ("factor_dtype", torch.int8, ValueError, r"factor_dtype is torch\.int8, expected a floating"),
    ("factor_dtype", "float32", TypeError, r"factor_dtype is 'float32', expected"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), LAYERS, ids=label)
def test_layer(name, value, error, message):
    with pytest.raises(error, match=message):
        hk.HALLinear(12, 8, **{name: value})
    linear = nn.Linear(12, 8)
    with unchanged(linear), pytest.raises(error, match=message):
        hk.HALLinear.from_linear(linear, **{name: value})


@pytest.mark.parametrize("value", [None, nn.Conv1d(4, 4, 1), torch.ones(3, 3)])
def test_from_linear_of_something_else(value):
    message = rf"linear is a {type(value).__name__}, expected torch\.nn\.Linear"
    with pytest.raises(TypeError, match=message):
        hk.HALLinear.from_linear(value)


def test_from_linear_of_an_adapted_layer():
    model = patched()
    for linear in (hk.HALLinear(12, 8), model.up[0]):
        with unchanged(linear), pytest.raises(ValueError, match="linear is adapted already"):
            hk.HALLinear.from_linear(linear)


def test_from_linear_of_a_quantized_layer():
    """Its forward would be lost: the int8 weight would be taken for the real one."""
    from test_patching import Int8Linear

    linear = Int8Linear(nn.Linear(12, 8))
    with unchanged(linear), pytest.raises(TypeError, match=r"linear is a Int8Linear, expected"):
        hk.HALLinear.from_linear(linear)


def test_input_of_the_wrong_width_or_dtype():
    layer = hk.HALLinear(12, 8)
    with pytest.raises(ValueError, match=r"x has shape \(2, 11\), expected \[\.\.\., 12\]"):
        layer(torch.ones(2, 11))
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64, weight torch\.float32"):
        layer(torch.ones(2, 12, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x"):
        layer(torch.ones(2, 12, dtype=torch.int64))


def test_a_layer_that_stands_alone_is_no_patched_model():
    layer = hk.HALLinear(12, 8)
    for name in set(PATCHED) - {"factors"}:
        with unchanged(layer), pytest.raises(ValueError, match="not patched"):
            PATCHED[name](layer)
