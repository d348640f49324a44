"""Layers that read one input compute as one, and never wrongly where they don't."""

import copy
import threading

import models
import pytest
import torch
from lifecycle import pickled
from ops.util import CountCalls, relative_error
from siblings import (
    SAME,
    Attention,
    alone,
    assert_computes,
    groups_of,
    outcome,
    patched,
    step,
    x_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import trainable

import hal_kernels
from hal_kernels.nn.shared_input import find_groups

# Many of these models leave layers out, to see that no output is mistaken for another.
pytestmark = [
    pytest.mark.usefixtures("small_hypernets"),
    pytest.mark.filterwarnings("ignore:hal_kernels. the model reads the weight"),
]


@pytest.mark.parametrize(
    ("hypernet", "leading"), [(None, (5,)), ("direct", (2, 3)), ("mlp", (2, 3)), (None, (0,))]
)
def test_siblings_compute_together(hypernet, leading):
    assert_computes(patched(hypernet=hypernet), x_of(*leading), together=True)


@pytest.mark.parametrize(
    "make, found",
    [
        (models.bert, [("query", "key", "value")]),
        (models.llama, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        (models.gpt2, []),
    ],
)
def test_groups_of_real_models(make, found):
    model = hal_kernels.patch_model(make(), 2, init_rank=3, hypernet="direct", seed=0)
    names = {id(layer): name for name, layer in model.named_modules()}
    groups = [tuple(names[id(x)].split(".")[-1] for x in g.layers) for g in groups_of(model)]
    depth = model.config.num_hidden_layers
    assert sorted(groups) == sorted(found * depth)


@pytest.mark.parametrize(
    ("make", "hypernet"), [(models.bert, None), (models.llama, "direct"), (models.llama, "mlp")]
)
def test_real_models_compute_what_their_layers_compute_alone(make, hypernet):
    model = make(dtype=torch.float64)
    hal_kernels.patch_model(model, 2, hypernet=hypernet, dtype=torch.float64, seed=0)
    with torch.no_grad():
        model.hal.lam.uniform_(0.5, 1.0)
    twin, inputs = alone(model), models.batch(model)
    results = []
    for each in (model, twin):
        with CountCalls() as counter:
            loss = each(**inputs).loss
        loss.backward()
        results.append(([p.grad for p in trainable(each)], set(counter.operators)))
    (grads, operators), (ref, single) = results
    assert "svd_linear_group" in operators and "svd_linear_group" not in single
    for one, other in zip(grads, ref, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            # Gradients that vanish but for rounding (k's bias, say) have no relative error.
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_layers_of_other_widths_and_other_parents_are_no_group():
    module = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(5, 4)})
    assert find_groups(module, module.values()) == []
    both = nn.ModuleDict(
        {
            "a": nn.ModuleDict({"query": nn.Linear(4, 4)}),
            "b": nn.ModuleDict({"key": nn.Linear(4, 4)}),
        }
    )
    assert find_groups(both, [both["a"]["query"], both["b"]["key"]]) == []


def test_only_targeted_layers_are_in_a_group():
    model = patched(targets=["query", "value"])
    (group,) = groups_of(model)
    assert group.layers == (model.query, model.value)
    assert_computes(model, x_of(), together=True)
    assert groups_of(patched(targets=["value"])) == []


def test_a_module_with_two_parents_is_in_one_group():
    one, two = Attention(), Attention()
    two.query = one.query
    model = patched(nn.ModuleList([one, two]))
    assert [len(g.layers) for g in groups_of(model)] == [3, 2]


# Each of these calls the siblings in a way that the names do not promise.


def cross(self, x):
    memory = x.flip(0)
    return self.query(x).tanh() + self.key(memory) * self.value(memory)


def values_first(self, x):
    return self.value(x) + self.key(x) * self.query(x)


def only_first(self, x):
    return self.query(x)


def only_last(self, x):
    return self.key(x).tanh() * self.value(x)


def equal_but_other_tensor(self, x):
    return self.query(x) + self.key(x.clone()) * self.value(x[:])


def twice(self, x):
    return self.query(x) + self.query(x) * self.key(x) + self.key(x).tanh() * self.value(x)


def output_changed_in_place(self, x):
    q = self.query(x)
    q += 1
    k = self.key(x)
    k *= 2
    return q * k + self.value(x)


def without_gradients(self, x):
    q = self.query(x)
    with torch.no_grad():
        k = self.key(x)
    return q * k + self.value(x)


WAYS = [
    cross, values_first, only_first, only_last, equal_but_other_tensor, twice,
    output_changed_in_place, without_gradients,
]  # fmt: skip


@pytest.mark.parametrize(
    ("reads", "hypernet"), [*((way, None) for way in WAYS), (cross, "mlp"), (twice, "mlp")]
)
def test_any_other_way_of_calling_them(reads, hypernet):
    model = patched(hypernet=hypernet)
    model.reads = reads
    assert_computes(model, x_of(), together=reads is not only_last)
    step(model)
    assert_computes(model, x_of(), together=reads is output_changed_in_place)


@pytest.mark.parametrize("reads", [cross, only_first, equal_but_other_tensor, without_gradients])
def test_a_group_with_outputs_left_over_is_given_up_at_the_next_step(reads):
    model = patched()
    model.reads = reads
    (group,) = groups_of(model)
    out = model(x_of())
    model(x_of())
    assert not group.given_up  # the first pass may yet be run again
    out.square().sum().backward()
    step(model)
    assert not group.given_up
    model(x_of())
    assert group.given_up


@pytest.mark.parametrize("reads", [None, output_changed_in_place])
def test_a_group_whose_outputs_are_all_used_is_kept(reads):
    model = patched()
    model.reads = reads
    for _ in range(3):
        step(model)
    assert_computes(model, x_of(), together=True)


def stepped_between(self, x):
    """An optimizer steps in another thread, while this one evaluates."""
    q = self.query(x)
    self.hal.lam.mul_(1.0)
    return q + self.key(x) * self.value(x)


@pytest.mark.parametrize(("reads", "given_up"), [(cross, True), (stepped_between, False)])
def test_what_is_left_over_without_gradients(reads, given_up):
    model = patched()
    model.reads = reads
    with torch.no_grad():
        model(x_of())
        model(x_of())
    assert groups_of(model)[0].given_up == given_up


def another_weight(module, x):
    module.key.weight = nn.Parameter(2 * module.key.weight, requires_grad=False)


CHANGES = {
    "the input": lambda module, x: x.mul_(2),
    "a weight": lambda module, x: module.value.weight.add_(1.0),
    "a bias": lambda module, x: module.value.bias.add_(1.0),
    "another weight": another_weight,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_calls_counts(change):
    model = patched()

    def reads(self, x):
        x = x.clone()
        q = self.query(x)
        change(self, x)
        return q + self.key(x) + self.value(x)

    model.reads = reads
    twin = alone(model)
    with torch.no_grad():
        assert relative_error(model(x_of()), twin(x_of())) <= SAME


def test_autocast_in_between_counts():
    model = patched().float()

    def reads(self, x):
        q = self.query(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = self.key(x)
        assert (q.dtype, k.dtype) == (torch.float32, torch.bfloat16)
        return q + k

    model.reads = reads
    model(x_of().float())


def test_hooks_on_members_are_called_and_may_change_the_input():
    model, seen = patched(), []

    def after(module, args, output):
        seen.append(module)
        return output + 1

    model.key.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.value.register_forward_hook(after)
    assert_computes(model, x_of(), together=True)
    assert len(seen) == 2  # the model and its twin


def test_dropout_is_drawn_for_each_layer_alone():
    model = patched(dropout=0.5)
    (_, operators) = outcome(model, x_of())
    assert "svd_linear_group" not in operators
    (_, operators) = outcome(model.eval(), x_of())
    assert "svd_linear_group" in operators


def test_disabled_and_merged_layers_compute_alone():
    model = patched()
    base = Attention().double()
    base.load_state_dict(model.state_dict(), strict=False)
    with hal_kernels.disabled(model):
        assert torch.equal(model(x_of()), base(x_of()))
    expected = model(x_of())
    hal_kernels.merge(model)
    assert relative_error(model(x_of()), expected) <= SAME
    hal_kernels.unmerge(model)
    assert_computes(model, x_of(), together=True)


def in_inference_mode(model):
    """Inference tensors count no versions, so that a change in place would not show."""
    with torch.inference_mode():
        return model(x_of())


def outside_the_model(model):
    return torch.cat([getattr(model, name)(x_of()).tanh() for name in model.names], -1)


def with_an_offloaded_member(model):
    """accelerate's hooks bring a weight to the device only when its own layer is called."""
    kept = model.key.weight
    model.key.weight = nn.Parameter(kept.to("meta"), requires_grad=False)
    model.key.register_forward_pre_hook(lambda m, args: setattr(m, "weight", kept))
    return model(x_of())


@pytest.mark.parametrize("call", [in_inference_mode, outside_the_model, with_an_offloaded_member])
def test_layers_that_compute_alone(call):
    model = patched()
    expected = model(x_of())
    with CountCalls() as counter:
        assert relative_error(call(model), expected) <= SAME
    assert "svd_linear_group" not in counter.operators


def test_a_pass_in_another_thread_takes_nothing_and_drops_nothing():
    model, results = patched(), []

    def reads(self, x):
        q = self.query(x)
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: results.append(outcome(model, x_of())))
            other.start()
            other.join()
        return q.tanh() + self.key(x) * self.value(x)

    model.reads = reads
    (out, *_), operators = outcome(model, x_of())
    assert "svd_linear_group" in operators
    assert torch.equal(results[0][0][0], out)
    step(model)
    assert_computes(model, x_of(), together=True)  # none was left over


def test_an_exception_leaves_nothing_behind():
    model = patched()

    def fails(self, x):
        self.query(x)
        raise RuntimeError("out of memory")

    model.reads = fails
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x_of())
    (group,) = groups_of(model)
    assert group._calls.mine.waiting is None
    model.reads = None
    step(model)
    assert_computes(model, x_of(), together=True)


def test_outputs_are_let_go_when_the_pass_ends():
    model = patched()
    model.reads = only_first
    model(x_of())
    assert groups_of(model)[0]._calls.mine.waiting is None


class Checkpointed(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.inner = Attention()
        self.inner.reads = reads

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("hypernet", "reads"),
    [*(("direct", reads) for reads in (None, cross, twice, only_first)), ("mlp", cross)],
)
def test_checkpointing(hypernet, reads):
    """Also over several passes before their backward, while the group is about to be given up."""
    model = patched(Checkpointed(reads), hypernet=hypernet)
    twin = alone(model)
    results = []
    for each in (model, twin):
        for _ in range(2):
            optimizer = torch.optim.SGD(trainable(each), lr=1e-2)
            passes = [each(x_of().requires_grad_()).square().sum() for _ in range(3)]
            for loss in reversed(passes) if hypernet == "direct" else passes[-1:]:
                loss.backward()
            gradients = [p.grad.clone() for p in trainable(each) if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        results.append(gradients)
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) <= 1e-10  # a few steps of the same training


def test_a_copy_has_groups_of_its_own():
    model = patched()
    model(x_of())
    twin = copy.deepcopy(model)
    (group,), (other,) = groups_of(model), groups_of(twin)
    assert other is not group and other.layers == (twin.query, twin.key, twin.value)
    loaded = pickled(model)
    assert groups_of(loaded)[0].layers == (loaded.query, loaded.key, loaded.value)
    assert_computes(loaded, x_of(), together=True)
    expected = model(x_of())
    shallow = copy.copy(model.key)  # as nn.DataParallel's replicas are
    replica = (model.query, shallow, model.value)
    model.reads = lambda self, x: torch.cat([layer(x).tanh() for layer in replica], -1)
    assert relative_error(model(x_of()), expected) <= SAME


@pytest.mark.parametrize("ranks", [(2, 3, 0), (0, 0, 1), (1, 1, 1)])
def test_compacted_layers_of_any_rank(ranks):
    model = patched(init_rank=3)
    keep = torch.tensor([i < r for r in ranks for i in range(3)])
    model.hal.mask.copy_(keep)
    model.hal.lam.data.mul_(keep)
    expected = model(x_of())
    hal_kernels.compact(model)
    assert relative_error(model(x_of()), expected) <= SAME
    assert_computes(model, x_of(), together=True)
