"""patch_model: which layers it takes, and what it changes about a model."""

import models
import pytest
import torch
from lifecycle import patched, predict, stir, unchanged
from torch import nn
from torch.nn import functional as F
from training import adam, batches, train, trainable

import hal_kernels
from hal_kernels import HALLinear, patch_model, rank_pattern

ALL = ["up.0", "up.1", "down.0", "down.1"]


def names(model, **options):
    """Names of the layers that patching adapts."""
    patch_model(model, 2, hypernet="direct", **options)
    return list(rank_pattern(model))


def matters(model, name):
    """Whether the adapter of one layer shows in the model's output."""
    before = predict(model)
    lam = hal_kernels.factors(model)[name].lam
    kept = lam.clone()
    lam.fill_(2.0)
    model.hal.forget()
    changed = not torch.equal(predict(model), before)
    lam.copy_(kept)
    model.hal.forget()
    return changed


# -- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"targets": "all-linear"}, ALL),
        ({"targets": ["up.1", "down.0"]}, ["up.1", "down.0"]),
        ({"targets": ("0",)}, ["up.0", "down.0"]),
        ({"targets": {"1"}}, ["up.1", "down.1"]),
        ({"targets": r"up\.\d"}, ["up.0", "up.1"]),
        ({"targets": "up.0"}, ["up.0"]),
        ({"targets": r".*\.1"}, ["up.1", "down.1"]),
        ({"exclude": ["up.0", "down.1"]}, ["up.1", "down.0"]),
        ({"exclude": r"up\..*"}, ["down.0", "down.1"]),
        ({"exclude": ["nowhere"]}, ALL),
        ({"targets": ["0", "1"], "exclude": ["up.0"]}, ["up.1", "down.0", "down.1"]),
        ({"modules_to_save": ()}, [*ALL, "classifier"]),
        ({"modules_to_save": None}, [*ALL, "classifier"]),
        ({"modules_to_save": ["up.0"]}, ["up.1", "down.0", "down.1", "classifier"]),
        ({"modules_to_save": ["up"]}, ["down.0", "down.1", "classifier"]),
    ],
)
def test_targets(options, expected):
    assert names(models.net(), **options) == expected


def test_an_ending_must_be_whole_names():
    model = models.net()
    model.sup = nn.ModuleList([nn.Linear(16, 16)])
    assert names(model, targets=["up.0"]) == ["up.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["up.0", "query"]}, r"targets: 'query' matches no module"),
        ({"targets": r"block\d"}, r"targets is 'block\\\\d': no linear layer of Net matches"),
        ({"targets": []}, r"targets is \(\): no linear layer of Net matches"),
        ({"exclude": ".*"}, r"no linear layer of Net matches \(exclude is '\.\*'\)"),
        ({"targets": ["classifier"]}, r"targets: 'classifier' matches no module"),
    ],
)
def test_targets_that_match_nothing(options, message):
    model = models.net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        patch_model(model, **options)


def test_target_that_is_no_linear_layer():
    model = models.net()
    with unchanged(model), pytest.raises(TypeError, match=r"targets: 'up' is a ModuleList, expec"):
        patch_model(model, targets=["up", "down.0"])


def test_modules_to_save_are_trained_in_full_and_only_the_outermost_is_named():
    model = models.net()
    model.classifier = nn.ModuleDict({"classifier": nn.Linear(16, 3)})
    model.empty = nn.ModuleDict({"score": nn.Tanh()})
    patch_model(model, 2, hypernet="direct")
    assert list(model.hal.saved_modules) == ["classifier"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.classifier.weight", "classifier.classifier.bias"}
    assert head < trained
    assert all(name.startswith("hal.") for name in trained - head)


class Language(nn.Module):
    """A head known by its name, or, called otherwise, by its tied weight alone."""

    def __init__(self, head, tied=False):
        super().__init__()
        self.embed, self.body = nn.Embedding(8, 16), nn.Linear(16, 16)
        setattr(self, head, nn.Linear(16, 8, bias=False))
        if tied:
            getattr(self, head).weight = self.embed.weight


LLAMA = [
    f"model.layers.{i}.{part}" for i in range(2) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda: models.llama(tie_word_embeddings=True), {}, LLAMA),
        (lambda: models.llama(tie_word_embeddings=False), {}, LLAMA),
        (lambda: models.llama(tie_word_embeddings=True), {"targets": ["lm_head"]}, ["lm_head"]),
        (lambda: Language("decoder", tied=True), {}, ["body"]),
        (lambda: Language("lm_head"), {}, ["body"]),
    ],
)
def test_output_heads_are_left_out_unless_named(make, options, expected):
    assert names(make(), **options) == expected


# -- layers ----------------------------------------------------------------------------------------


def test_multihead_attention_is_left_out_and_refused_by_name():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.proj = nn.Linear(16, 16)

    assert names(Attending()) == ["proj"]
    model = Attending()
    message = r"targets: 'attention\.out_proj' is a NonDynamicallyQuantizableLinear, expected"
    with unchanged(model), pytest.raises(TypeError, match=message):
        patch_model(model, targets=["out_proj"])


def test_transformer_encoder_uses_its_adapters_in_evaluation_too():
    """torch's fast path reads linear1.weight and never calls linear1."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    patch_model(model, 2, hypernet="direct")
    stir(model)
    x = torch.randn(3, 5, 16)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected.detach())


def test_sequential_itself_can_be_patched():
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    x = torch.randn(2, 16)
    expected = model(x)
    assert names(model) == ["0", "2"]
    assert torch.equal(model(x), expected)
    stir(model)
    assert not torch.equal(model(x), expected)


def test_conv1d_layers_are_adapted():
    model = models.gpt2()
    base = predict(model)
    found = names(model)
    assert len(found) == 8 and "lm_head" not in found
    assert torch.equal(predict(model), base)
    assert all(matters(model, name) for name in found)


def test_shared_module_called_twice():
    layer = nn.Linear(16, 16)

    class Twice(models.Holder):
        def forward(self, x, labels=None):
            x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
            logits = self.classifier(x)
            return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    model = patched(Twice(layer=layer).double(), dtype=torch.float64, gamma=0.0)
    inputs = models.batch(models.net(dtype=torch.float64))
    f = hal_kernels.factors(model)["layer"]
    p, lam, q = (t.detach().clone().requires_grad_() for t in (f.p, f.lam, f.q))
    weight = layer.weight + f.scaling * ((p * lam) @ q).t()
    h = inputs["x"]
    for _ in range(2):
        h = torch.tanh(F.linear(h, weight, layer.bias))
    expected = F.cross_entropy(model.classifier(h), inputs["labels"])
    expected.backward()
    loss = model(**inputs)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.hal.lam.grad, lam.grad)
    torch.testing.assert_close(model.hal.p_16.grad, p.grad.t())
    torch.testing.assert_close(model.hal.q_16.grad, q.grad)


def test_module_under_two_names_has_one_adapter():
    layer = nn.Linear(16, 16)
    model = models.Holder(a=layer, b=layer)
    assert names(model) == ["a"]
    assert model.a is model.b
    stir(model)
    x = torch.randn(2, 16)
    adapted = model(x)
    with hal_kernels.disabled(model):
        assert not torch.equal(model(x), adapted)


def test_tied_linears_have_an_adapter_each():
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    model = models.Holder(a=a, b=b)
    assert names(model) == ["a", "b"]
    assert model.a.weight is model.b.weight
    assert "a.weight" in model.state_dict() and "b.weight" in model.state_dict()
    first, second = hal_kernels.factors(model).values()
    assert not torch.equal(first.p, second.p)


def test_layers_in_module_lists_and_dicts():
    tree = nn.ModuleDict({"x": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    assert names(models.Holder(tree=tree)) == ["tree.x.0", "tree.x.1"]


class Doubling(nn.Linear):
    """A foreign layer: its own forward, with an argument of its own."""

    def forward(self, x, times=2.0):
        return times * super().forward(x)


def test_subclass_keeps_its_own_forward():
    layer = Doubling(16, 16)
    model = patched(models.Holder(layer=layer))
    assert isinstance(layer, Doubling) and type(layer) is not Doubling
    f, x = hal_kernels.factors(model)["layer"], torch.randn(4, 16)
    for arguments, times in (((), 2.0), ((3.0,), 3.0)):
        expected = times * F.linear(x, layer.weight, layer.bias) + x @ f.delta().t()
        torch.testing.assert_close(layer(x, *arguments), expected)


class Int8Linear(nn.Linear):
    """A quantized layer as in bitsandbytes or torchao: int8 weight, one scale a row."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.bias = linear.bias
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantized_net():
    model = models.net()
    for part in (model.up, model.down):
        for index, linear in enumerate(part):
            part[index] = Int8Linear(linear)
    return model


@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_quantized_layers_train(hypernet):
    model = quantized_net()
    base = predict(model)
    patch_model(model, 2, hypernet=hypernet, seed=0)
    assert list(rank_pattern(model)) == ALL
    assert torch.equal(predict(model), base)
    weights = [layer.weight.clone() for layer in model.up]
    optimizer = adam(model, 1e-3 if hypernet == "bert" else 3e-2)
    losses = train(model, optimizer, [models.batch(model)] * 8)
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, weights, (layer.weight for layer in model.up)))
    assert all(layer.weight.dtype == torch.int8 for layer in model.up)
    with hal_kernels.disabled(model):
        assert torch.equal(predict(model), base)


def test_weight_of_a_tensor_subclass_takes_the_foreign_path():
    class Tagged(torch.Tensor):
        pass

    model = models.net()
    layer = model.up[0]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged), requires_grad=False)
    patch_model(model, 2, hypernet="direct")
    assert not isinstance(layer, HALLinear) and isinstance(model.up[1], HALLinear)
    assert isinstance(layer, nn.Linear) and matters(model, "up.0")


# -- what patching changes -------------------------------------------------------------------------


def test_a_head_frozen_before_is_trained_after():
    model = models.net().requires_grad_(False)
    patch_model(model, 2, hypernet="direct")
    assert {"classifier.weight", "classifier.bias"} < {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_state_dict_gains_the_adapter_and_keeps_the_rest():
    model = models.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    patch_model(model, 2, hypernet="direct")
    after = model.state_dict()
    assert list(before) == [k for k in after if not k.startswith("hal.")]
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert len(after) > len(before)


@pytest.mark.parametrize("make", [models.net, models.gpt2, quantized_net])
def test_modules_parameters_and_hooks_stay_the_same_objects(make):
    model = make()
    seen = []
    layer = model.get_submodule("up.0" if hasattr(model, "up") else "transformer.h.0.attn.c_attn")
    kind = type(layer)
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert patch_model(model, 2, hypernet="direct") is model
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    assert isinstance(layer, kind) and type(layer) is not kind
    predict(model)
    assert seen == [layer]


def test_repr_shows_the_rank():
    model = patched(init_rank=3)
    assert "in_features=16, out_features=24, bias=True, rank=3" in repr(model.up[0])
    assert "rank=2, init_rank=3, hypernet='direct'" in repr(model)


def test_config_and_options_are_the_same_thing():
    config = hal_kernels.HALConfig(rank=2, hypernet="direct", seed=3, alpha=4.0)
    by_config, by_options = models.net(), models.net()
    patch_model(by_config, config=config)
    patch_model(by_options, 2, hypernet="direct", seed=3, alpha=4.0)
    assert by_config.hal.config == by_options.hal.config
    for left, right in zip(trainable(by_config), trainable(by_options), strict=True):
        assert torch.equal(left, right)


def test_replace_starts_elsewhere():
    model = models.net()
    base = predict(model)
    patch_model(model, 2, hypernet="bert", update="replace")
    assert not torch.equal(predict(model), base)


def test_every_layer_takes_part():
    model = patch_model(models.net(), 2, hypernet="direct")
    assert all(matters(model, name) for name in ALL)


def test_a_narrow_layer_limits_its_own_rank_alone():
    """Mixture-of-experts gates and value heads have one output."""

    class Gated(models.Holder):
        def forward(self, x, labels=None):
            x = self.classifier(torch.sigmoid(self.gate(x)) * self.thin(self.wide(x)))
            return {"loss": F.cross_entropy(x, labels)}

    thin = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16))
    model = Gated(wide=nn.Linear(16, 16), thin=thin, gate=nn.Linear(16, 1))
    patch_model(model, rank=3, hypernet="direct", interval=1, gamma=0.0)
    assert rank_pattern(model) == {"wide": 5, "thin.0": 3, "thin.1": 3, "gate": 1}
    train(model, adam(model), batches(model, 4))
    assert sum(rank_pattern(model).values()) == 3 + 3 + 3 + 1
