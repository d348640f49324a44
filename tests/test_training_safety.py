"""What may not go wrong while training: dtypes, ranks, evaluation, outputs, other people's loops.

Several of these are measured failures of PEFT's AdaLoRA.
"""

import contextlib
import io

import models
import pytest
import torch
from pruning import CUBIC, HYPERNETS, cross_entropy, patched_net
from training import adam, assert_equal, batches, budget_used, state, train, trainable

import hal_kernels

pytestmark = pytest.mark.usefixtures("small_hypernets")


# ---- dtypes of the base model ------------------------------------------------------------------


@pytest.mark.parametrize("hypernet", HYPERNETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base(hypernet, dtype):
    """Only the adapter and the modules trained in full train; every dtype is the one asked for."""
    model = models.bert(dtype=dtype)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "classifier" not in n}
    hal_kernels.patch_model(model, 2, hypernet=hypernet, interval=1, seed=0)
    for name, parameter in model.named_parameters():
        expected = name.startswith(("hal.", "classifier."))
        assert parameter.requires_grad == expected, name
        assert parameter.dtype == (torch.float32 if name.startswith("hal.") else dtype), name
    for name, buffer in model.hal.named_buffers():
        assert not buffer.requires_grad, name
        assert buffer.dtype in (torch.float32, torch.int64, torch.bool), name
    before = state(model)
    # no Adam: its epsilon of 1e-8 is zero in float16
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    losses = train(model, optimizer, batches(model, 3))
    assert torch.tensor(losses).isfinite().all()
    after = state(model)
    assert all(t.isfinite().all() for t in after.values())
    assert not torch.equal(after["hal.lam"], before["hal.lam"])
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter), f"{name} changed"


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_autocast_training(hypernet):
    """Mixed precision over a float32 model: the adapter's own arithmetic stays in float32."""
    model = patched_net(hypernet)
    optimizer = adam(model)
    for inputs in batches(model, 3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = models.loss_of(model(**inputs))
        loss.backward()
        assert {p.grad.dtype for p in trainable(model)} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert model.hal.steps == 3


# ---- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypernet", "options"), [(None, {}), ("bert", {}), ("direct", CUBIC), ("bert", CUBIC)]
)
def test_rank_equal_to_init_rank_prunes_nothing(hypernet, options):
    options = {"interval": 1, "seed": 0} | options | {"init_rank": 2}
    model = hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **options)
    train(model, adam(model), batches(model, 13))
    assert set(hal_kernels.rank_pattern(model).values()) == {2}
    assert model.hal.steps == 13


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_loaded_adapter_evaluates_with_labels(hypernet, with_gradients, tmp_path):
    model = hal_kernels.patch_model(models.bert(), 2, hypernet=hypernet, seed=0, gamma=10.0)
    train(model, adam(model), batches(model, 2))
    hal_kernels.save_adapter(model, tmp_path)

    loaded = hal_kernels.load_adapter(models.bert(), tmp_path).eval()
    inputs = models.batch(loaded)
    with torch.set_grad_enabled(with_gradients):
        output = loaded(**inputs)
    assert torch.equal(models.loss_of(output), cross_entropy(output, inputs["labels"]))
    assert torch.equal(models.logits_of(output), models.logits_of(model.eval()(**inputs)))

    training = models.loss_of(loaded.train()(**inputs))
    penalty = hal_kernels.penalty(loaded)
    assert penalty > 0.1, "the penalty is too small to be noticed"
    torch.testing.assert_close(training, models.loss_of(output) + penalty)


@pytest.mark.parametrize("hypernet", HYPERNETS)
@pytest.mark.parametrize("make", [models.net, models.bert, models.llama, models.gpt2])
def test_eval_computes_what_training_computes(make, hypernet):
    """Without dropout, cached factors (no_grad) and generated ones (with a graph) are the same."""
    model = hal_kernels.patch_model(make(), 2, hypernet=hypernet, seed=0)
    train(model, adam(model), batches(model, 2))
    inputs = models.batch(model)
    training = models.logits_of(model(**inputs))
    with torch.no_grad():
        assert torch.equal(models.logits_of(model(**inputs)), training)
        assert torch.equal(models.logits_of(model.eval()(**inputs)), training)
    assert torch.equal(models.logits_of(model.eval()(**inputs)), training)
    with torch.inference_mode():  # sums in another order: layers that share an input run alone here
        torch.testing.assert_close(models.logits_of(model(**inputs)), training)


def in_place(parameter):
    with torch.no_grad():
        parameter.add_(0.1)


def data_swap(parameter):
    parameter.data = parameter.data + 0.1


def data_in_place(parameter):
    """The idiom of many moving-average helpers; autograd's version counter doesn't see it."""
    parameter.data.copy_(parameter.data + 0.1)


def whole(model, inputs):
    return models.logits_of(model(**inputs))


def parts(model, inputs):
    """Outside the model's forward, where calls share factors, too."""
    return model.features(inputs["x"])


@pytest.mark.parametrize(
    ("call", "change"),
    [(whole, in_place), (whole, data_swap), (whole, data_in_place), (parts, in_place),
     (parts, data_swap)],
)  # fmt: skip
@pytest.mark.parametrize("hypernet", [None, "direct", "bert"])
def test_no_grad_sees_changed_parameters(hypernet, call, change):
    """The factors that evaluation keeps between calls follow every parameter."""
    model = patched_net(hypernet)
    train(model, adam(model), batches(model, 1))
    inputs = models.batch(model)
    for parameter in model.hal.parameters():
        with torch.no_grad():
            call(model, inputs)
        change(parameter)
        with torch.no_grad():
            cached = call(model, inputs)
        assert torch.equal(cached, call(model, inputs))


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_no_grad_sees_a_loaded_state_dict(hypernet):
    model, other = patched_net(hypernet), patched_net(hypernet, seed=1)
    train(other, adam(other), batches(other, 3))
    inputs = models.batch(model)
    with torch.no_grad():
        model(**inputs)
        model.load_state_dict(other.state_dict())
        assert torch.equal(models.logits_of(model(**inputs)), models.logits_of(other(**inputs)))
    assert model.hal.steps == 3


def test_steps_without_the_penalty_are_warned_of():
    """In eval mode, as from_pretrained returns models: once, by what to do, at the user's line."""
    model = patched_net("direct").eval()
    optimizer = adam(model)
    train(model.train(), optimizer, batches(model, 1))
    with pytest.warns(UserWarning, match=r"call model\.train\(\) before training") as caught:
        train(model.eval(), optimizer, batches(model, 3))
    assert len(caught) == 1 and caught[0].filename == train.__code__.co_filename


# ---- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hal", "mask", "importance_lam", "uncertainty_q_16"])
@pytest.mark.parametrize("hypernet", ["direct", "bert"])
def test_an_adapter_apart_from_its_layers_is_refused(hypernet, name):
    """At the next forward, also in training: operators would read where nothing is."""
    model = patched_net(hypernet, allocation="ema")
    train(model, adam(model), batches(model, 1))
    if name == "hal":
        model.hal.to("meta")
    else:
        setattr(model.hal, name, getattr(model.hal, name).to("meta"))
    with pytest.raises(
        RuntimeError, match=r"on (cpu and )?meta, the layers .* on cpu, expected one"
    ):
        model(**models.batch(model))


def test_data_parallel_replicas_are_refused():
    replica = patched_net("direct")._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(**models.batch(replica))


# ---- Hugging Face's loops ----------------------------------------------------------------------


def test_trainer_needs_no_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = hal_kernels.patch_model(models.bert(), 2, hypernet="bert", interval=1, seed=0)
    data = [{k: v[0] for k, v in models.batch(model, 1, seed=i).items()} for i in range(24)]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True, seed=0,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
        reported = trainer.evaluate()["eval_loss"]
    assert model.hal.steps == 12
    assert budget_used(model) == 2 * len(model.hal.layout.layers)
    with torch.no_grad():
        losses = [cross_entropy(model(row["input_ids"][None]), row["labels"][None]) for row in data]
    assert reported == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)  # no penalty


def test_accelerate_needs_no_callback():
    accelerate, micro_batches = pytest.importorskip("accelerate"), 2
    model, plain = (
        hal_kernels.patch_model(models.bert(), 2, hypernet="bert", interval=1, seed=0)
        for _ in range(2)
    )
    data = batches(plain, 12 * micro_batches)
    plain_optimizer = adam(plain)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model, optimizer = accelerator.prepare(model, adam(model))
    for index, inputs in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)  # divides
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e6)  # multiplies by exactly one
            optimizer.step()
            optimizer.zero_grad()
        expected = models.loss_of(plain(**inputs))
        assert loss.item() == expected.item()
        (expected / micro_batches).backward()
        if index % micro_batches == micro_batches - 1:
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    assert_equal(state(model), state(plain))
    assert model.hal.steps == 12
    assert budget_used(model) == 2 * len(model.hal.layout.layers)
