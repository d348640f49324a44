"""HyperAdaLoraConfig: its options, what it refuses, and which layers it means."""

import dataclasses

import peft
import pytest
import torch
import transformers as hf
from peft import mapping
from torch import nn

import hal_kernels
from hal_peft import HyperAdaLoraConfig
from hal_peft.register import register

from . import zoo

BERT, MLP, LLAMA = (zoo.BY_NAME[name] for name in ("bert", "mlp", "llama"))
LONG = {**zoo.ENDS, "num_hidden_layers": 3}


def test_registered():
    """In PEFT's tables under the name that a saved config has; twice is once."""
    register()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["HYPERADALORA"] is HyperAdaLoraConfig
    config = peft.get_peft_config({"peft_type": "HYPERADALORA", "r": 4})
    assert isinstance(config, HyperAdaLoraConfig) and config.r == 4
    assert "HYPERADALORA" not in list(peft.PeftType)
    status = MLP.adapted().get_model_status()
    assert status.peft_types == {"default": "HYPERADALORA"}
    assert (status.enabled, status.active_adapters) == (True, ["default"])


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "1.0", "0.21.0.dev0"])
def test_other_versions_of_peft(version):
    with pytest.raises(ImportError, match=rf"supports peft >= 0\.21\.0, < 0\.22, found {version}"):
        register(version)


def test_every_option_reaches_hal_kernels():
    """No field is forgotten on its way, in either direction."""
    defaults = {field.name: field.default for field in dataclasses.fields(hal_kernels.HALConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(HyperAdaLoraConfig)}
    renamed = {"rank", "init_rank", "targets", "exclude", "alpha", "dropout"}
    assert defaults.keys() - ours.keys() == renamed
    config = HyperAdaLoraConfig(
        r=4, init_r=6, lora_alpha=12, lora_dropout=0.1, dtype="bfloat16", hypernet="bert",
        hidden=64, update="residual", norm_first=True, gamma=0.2,
        penalty="frobenius", allocation="magnitude", interval=9,
        prune_per_interval=3, seed=5, skip_nonfinite=False, rank_pattern={"a": 5},
        alpha_pattern={"b": 2.0},
    )  # fmt: skip
    assert config.hal_config() == hal_kernels.HALConfig(
        rank=4, init_rank=6, alpha=12, dropout=0.1, dtype=torch.bfloat16, hypernet="bert",
        hidden=64, update="residual", norm_first=True, gamma=0.2,
        penalty="frobenius", allocation="magnitude", interval=9,
        prune_per_interval=3, seed=5, skip_nonfinite=False, rank_pattern={"a": 5},
        alpha_pattern={"b": 2.0}, modules_to_save=None,
    )  # fmt: skip
    for name in (defaults.keys() & ours.keys()) - {"dtype", "modules_to_save"}:
        assert ours[name] == defaults[name], name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r is 0, expected at least 1"),
        ({"r": 8, "init_r": 4}, ValueError, r"init_r is 4, expected at least"),
        ({"lora_alpha": 0}, ValueError, r"lora_alpha is 0, expected more than 0"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout is 1\.0, expected"),
        ({"hypernet": "gpt"}, ValueError, r"hypernet is 'gpt', expected one of"),
        ({"update": "zero"}, ValueError, r"update is 'zero', expected one of"),
        ({"dtype": "float16"}, ValueError, r"dtype is 'float16', expected one of"),
        ({"schedule": "cubic"}, ValueError, r"total_step is None, expected a number of steps"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] is 0"),
        ({"layers_to_transform": [0]}, ValueError, r"layers_to_transform comes with target_modul"),
        (
            {"target_modules": ["q"], "layers_pattern": "layers"},
            ValueError,
            r"layers_pattern comes without layers_to_transform",
        ),
        ({"lora_aplha": 3}, TypeError, r"unexpected keyword argument 'lora_aplha'"),
        ({"task_type": "SEQ"}, ValueError, r"Invalid task type: 'SEQ'"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        HyperAdaLoraConfig(**options)


def test_unknown_key_of_a_saved_config(tmp_path):
    """PEFT's way with configs of later versions: a warning."""
    HyperAdaLoraConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"gamma"', '"gama"'))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['gama'\]"):
        assert peft.PeftConfig.from_pretrained(tmp_path).r == 5


def unchanged_by(case, error, message, **options):
    """Adding this adapter raises and leaves the model as it was."""
    base = case.base()
    text, flags = str(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=message):
        peft.get_peft_model(base, case.config(**options))
    assert str(base) == text and [p.requires_grad for p in base.parameters()] == flags
    assert not base._forward_hooks and not base._forward_pre_hooks


def test_refused_layers_change_nothing():
    unchanged_by(MLP, ValueError, r"^r is 17, expected at most 16", r=17)
    unchanged_by(MLP, ValueError, r"^init_r is 17, expected at most 16", init_r=17)
    unchanged_by(
        MLP, ValueError, r"gives 'up\.0' rank 17, expected at most", rank_pattern={"up.0": 17}
    )
    unchanged_by(MLP, TypeError, r"'up' is a ModuleList, expected a linear", target_modules=["up"])
    unchanged_by(
        BERT, TypeError, r"'.*word_embeddings' is a Embedding", target_modules=["word_embeddings"]
    )
    base = zoo.BY_NAME["tied"].base()
    base.lin = nn.LazyLinear(16)
    with pytest.raises(ValueError, match="'lin' has an uninitialized weight"):
        peft.get_peft_model(base, HyperAdaLoraConfig(target_modules=["lin"]))


def test_refused_second_adapter_changes_nothing():
    model = MLP.adapted(modules_to_save=None)
    zoo.perturb(model)
    batch = MLP.batch(model)
    expected, text = zoo.logits(model, batch), str(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^r is 17, expected at most 16"):
        model.add_adapter("other", MLP.config(r=17, modules_to_save=None, inference_mode=True))
    assert str(model) == text and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(zoo.logits(model, batch), expected) and list(model.peft_config) == [
        "default"
    ]


def test_pattern_keys_that_match_nothing_warn():
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*\['upp'\]"):
        model = MLP.adapted(rank_pattern={"upp": 6, "up.1": 5})
    assert model.rank_pattern() == {"up.0": 3, "up.1": 5, "down.0": 3, "down.1": 3}
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys did not match .*\['x'\]"):
        model = MLP.adapted(alpha_pattern={"x": 6, r"down\.\d": 1.0})
    scalings = {name: f.scaling for name, f in model.factors().items()}
    assert scalings == {"up.0": 4.0, "up.1": 4.0, "down.0": 0.5, "down.1": 0.5}


def test_layers_to_transform():
    names = LLAMA.adapted(
        target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
    ).base_model.targeted_module_names
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    same = LLAMA.adapted(
        target_modules=["q_proj", "up_proj"], layers_to_transform=1, layers_pattern="layers"
    )
    assert same.base_model.targeted_module_names == names
    for wrong in ({"layers_to_transform": 5}, {"layers_to_transform": 1, "layers_pattern": "h"}):
        with pytest.raises(ValueError, match="not found in the base model"):
            LLAMA.adapted(target_modules=["q_proj"], **wrong)


def test_default_targets():
    """Of get_peft_model: all but the head; None: what PEFT's AdaLoRA takes."""
    model = peft.get_peft_model(LLAMA.base(), HyperAdaLoraConfig(hypernet="direct"))
    linears = {n for n, m in LLAMA.base().named_modules() if isinstance(m, nn.Linear)}
    assert set(model.base_model.targeted_module_names) == linears - {"lm_head"}
    model = LLAMA.adapted(target_modules=None)
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {
        "q_proj", "v_proj"
    }  # fmt: skip
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        MLP.adapted(target_modules=None)


def test_attention_that_reads_a_weight():
    """nn.MultiheadAttention never calls its output projection: "all-linear" leaves it out."""
    base = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    model = peft.get_peft_model(base, HyperAdaLoraConfig(r=2, hypernet="direct"))
    assert model.base_model.targeted_module_names == ["linear1", "linear2"]
    assert model.peft_config["default"].target_modules == {"linear1", "linear2"}
    with torch.no_grad():
        before = model(x)
        zoo.perturb(model)
        assert not torch.equal(model(x), before)  # no fused kernel passes the adapter by
    with pytest.raises(TypeError, match=r"'self_attn\.out_proj' is a NonDynamically"):
        peft.get_peft_model(
            nn.TransformerEncoderLayer(16, 2, 24), HyperAdaLoraConfig(target_modules=["out_proj"])
        )


def test_all_linear_is_saved_in_short():
    """Where PEFT's LoRA shortens a list of names: in models of some layers."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 10)
    model = peft.get_peft_model(stack, HyperAdaLoraConfig(r=2, hypernet="direct"))
    assert model.peft_config["default"].target_modules == {"linear1", "linear2"}
    assert len(model.base_model.targeted_module_names) == 20
    long = zoo.made(type(LLAMA.base()), lambda: hf.LlamaConfig(**zoo.DECODER | LONG))()
    model = peft.get_peft_model(long, HyperAdaLoraConfig(r=2, hypernet="direct"))
    assert model.peft_config["default"].target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:hal_peft. autocast_adapter_dtype is False, but")
@pytest.mark.parametrize(
    ("layers", "adapters"),
    [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64), (torch.float16, None)],
)
def test_dtype_of_the_layers(layers, adapters):
    """autocast_adapter_dtype=False asks for it; what adapters can't be is said."""
    model = peft.get_peft_model(MLP.base(dtype=layers), MLP.config(), autocast_adapter_dtype=False)
    adapter = zoo.adapter_of(model)
    expected = adapters or torch.float32
    assert {p.dtype for p in adapter.parameters()} == {adapter.config.dtype} == {expected}
    assert model.peft_config["default"].dtype == str(expected).removeprefix("torch.")
    zoo.train(model, MLP.batch(model), optimizer=torch.optim.SGD)
    if adapters is None:
        with pytest.warns(UserWarning, match=r"adapters can't be torch\.float16 as the layers are"):
            model.add_adapter("other", MLP.config(), autocast_adapter_dtype=False)


def test_the_callback_of_adalora():
    """Scripts that call it after every step go on working."""
    model = MLP.adapted()
    assert model.base_model.update_and_allocate(1) is None


def test_factors_keep_their_dtype():
    for dtype in ("float64", "bfloat16"):
        model = peft.get_peft_model(MLP.base(), MLP.config(dtype=dtype, hypernet="bert"))
        adapter = zoo.adapter_of(model)
        assert {str(p.dtype) for p in adapter.parameters()} == {f"torch.{dtype}"}


def test_seed():
    """The same seed draws the same factors and leaves the global generator alone."""
    state = torch.get_rng_state()
    one, same, other = (MLP.adapted(seed=seed, modules_to_save=None) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    p = [m.factors()["up.0"].p for m in (one, same, other)]
    assert torch.equal(p[0], p[1]) and not torch.equal(p[0], p[2])
