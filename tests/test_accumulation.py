"""Gradient accumulation: 1 × 8, 2 × 4 and 8 × 1 examples give one and the same step.

A plain loop divides each loss by their number. HF Trainer doesn't where the model takes
num_items_in_batch: it hands the model the window's count of labels instead.
"""

import contextlib
import io

import models
import pytest
import torch
from training import adam, assert_close, gradients, kept, state, trainable

import hal_kernels

HYPERNETS = ["direct", "bert"]
SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # micro-batches × examples
GAMMA = 5.0  # the penalty's gradient is as large as the task's
DOUBLE = 1e-10  # float64 sums in another order

pytestmark = pytest.mark.usefixtures("small_hypernets")


def patched(make, hypernet, **options):
    defaults = {"init_rank": 3, "gamma": GAMMA, "allocation": "ema", "interval": 1, "seed": 0}
    return hal_kernels.patch_model(
        make(dtype=torch.float64), 2, hypernet=hypernet, dtype=torch.float64, **(defaults | options)
    )


def off_the_start(model):
    """One step, so that Λ isn't zero any more and every gradient is alive."""
    optimizer = adam(model)
    models.loss_of(model(**models.batch(model, 2, seed=7))).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def sgd(model):
    return torch.optim.SGD(trainable(model), lr=1e-5)  # the gradients are large


def rows(inputs, first, last):
    return {name: tensor[first:last] for name, tensor in inputs.items()}


# ---- a plain loop, which divides its loss ------------------------------------------------------


def plain_window(model, inputs, count, size):
    """Gradients of one window in `count` micro-batches, and the state after its step."""
    for index in range(count):
        output = model(**rows(inputs, index * size, (index + 1) * size))
        (models.loss_of(output) / count).backward()
    found = gradients(model)
    sgd(model).step()
    return found, state(model), kept(model)


@pytest.mark.parametrize(
    ("hypernet", "make", "options"),
    [
        ("direct", models.bert, {}), ("bert", models.net, {}), ("bert", models.llama, {}),
        *(
            (hypernet, models.net, {"allocation": score, "init_rank": 6})
            for hypernet in HYPERNETS for score in ("sensitivity", "magnitude")
        ),
    ],
)  # fmt: skip
def test_plain_loop(hypernet, make, options):
    """Gradients, penalty included; and what the allocator makes of them: scores and masks.

    The sensitivity is that of the whole step: dΛ_eff summed over its micro-batches.
    """
    inputs = models.batch(make(dtype=torch.float64), 8)
    windows = [
        plain_window(off_the_start(patched(make, hypernet, **options)), inputs, *split)
        for split in SPLITS
    ]
    expected_gradients, expected_state, expected_mask = windows[0]
    for found, after, mask in windows[1:]:
        assert_close(found, expected_gradients, DOUBLE)
        assert_close(after, expected_state, DOUBLE)
        assert mask == expected_mask
    assert 0 < sum(expected_mask) < len(expected_mask)
    model = off_the_start(patched(make, hypernet, **options))
    model.hal.config = model.hal.config.__class__(**(vars(model.hal.config) | {"gamma": 0.0}))
    without, *_ = plain_window(model, inputs, 1, 8)
    name = "hal.p_32" if hypernet == "direct" else "hal.hypernet.p_out.0.weight"
    name = name if name in without else "hal.p_16"
    share = (expected_gradients[name] - without[name]).norm() / expected_gradients[name].norm()
    assert share > 0.05, "the penalty is too small to be noticed"


# ---- a loop that hands the model num_items_in_batch --------------------------------------------


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_loop_with_num_items_in_batch(hypernet):
    """Three windows one after the other: the penalty counts once in each."""
    inputs = [models.batch(models.llama(), 8, seed=index) for index in range(3)]
    results = []
    for count, size in SPLITS:
        model = off_the_start(patched(models.llama, hypernet))
        optimizer = sgd(model)
        found = []
        for window in inputs:
            items = window["labels"][:, 1:].numel()
            for index in range(count):
                part = rows(window, index * size, (index + 1) * size)
                models.loss_of(model(**part, num_items_in_batch=items)).backward()
            found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
        results.append(found)
    for found in results[1:]:
        for window, expected in zip(found, results[0], strict=True):
            assert_close(window, expected, DOUBLE)
    # and it is the very penalty that a plain loop adds
    model = off_the_start(patched(models.llama, hypernet))
    assert_close(results[0][0], plain_window(model, inputs[0], 1, 8)[0], DOUBLE)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_evaluation_inside_a_window(hypernet):
    """Forward passes in between that train nothing take no micro-batch's place."""
    model, clean = (off_the_start(patched(models.llama, hypernet)) for _ in range(2))
    inputs = models.batch(model, 8)
    for index in range(4):
        for m in (model, clean):
            part = rows(inputs, 2 * index, 2 * index + 2)
            if m is model:
                with torch.no_grad():
                    m(**part)
                m.eval()(**part)  # with gradients, as saliency maps want them
                m.train()
            models.loss_of(m(**part, num_items_in_batch=40)).backward()
    assert_close(gradients(model), gradients(clean), DOUBLE)


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_window_after_one_thrown_away(hypernet):
    """A window abandoned half-way has paid its penalty; the next one pays its own."""
    model, clean = (off_the_start(patched(models.llama, hypernet)) for _ in range(2))
    inputs = models.batch(model, 4)
    models.loss_of(model(**rows(inputs, 0, 2), num_items_in_batch=10)).backward()
    model.zero_grad()
    for m in (model, clean):
        models.loss_of(m(**rows(inputs, 2, 4), num_items_in_batch=10)).backward()
        sgd(m).step()
    assert_close(gradients(model), gradients(clean), DOUBLE)
    assert_close(state(model), state(clean), DOUBLE)


# ---- HF Trainer --------------------------------------------------------------------------------


def trainer_run(model, count, size, folder, *, optimizer_steps=2):
    """Gradients at each optimizer step of a Trainer without callbacks of ours."""
    transformers = pytest.importorskip("transformers")
    examples = [
        {name: tensor[0] for name, tensor in models.batch(model, 1, seed=index).items()}
        for index in range(8 * optimizer_steps)
    ]
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=count,
        num_train_epochs=1, use_cpu=True, seed=0, max_grad_norm=0.0, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    optimizer = sgd(model)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(gradients(model)))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples, optimizers=(optimizer, constant)
    )
    before = model.hal.steps
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    assert len(found) == model.hal.steps - before == optimizer_steps
    return found, examples


@pytest.mark.parametrize("hypernet", HYPERNETS)
def test_trainer_with_a_language_model(hypernet, tmp_path):
    runs, states = [], []
    for count, size in [(1, 8), (2, 4), (8, 1)]:
        model = off_the_start(patched(models.llama, hypernet))
        runs.append(trainer_run(model, count, size, tmp_path)[0])
        states.append(state(model))
    for run, after in zip(runs[1:], states[1:], strict=True):
        for found, expected in zip(run, runs[0], strict=True):
            assert_close(found, expected, DOUBLE)
        assert_close(after, states[0], DOUBLE)


@pytest.mark.parametrize(
    ("hypernet", "split", "accepts"),
    [("direct", (4, 2), True), ("direct", (1, 8), False), ("bert", (4, 2), False)],
)
def test_trainer_with_a_classifier(hypernet, split, accepts, tmp_path):
    """BERT's classifier ignores num_items_in_batch, which Trainer passes: the task's loss is then
    summed over micro-batches (transformers' doing, with any adapter or none). Told that the model
    doesn't accept it, Trainer divides. Either way the penalty counts once.
    """
    model, clean = (off_the_start(patched(models.bert, hypernet)) for _ in range(2))
    model.accepts_loss_kwargs = accepts
    count, size = split
    found, examples = trainer_run(model, count, size, tmp_path, optimizer_steps=1)
    everything = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
    penalty = hal_kernels.penalty(clean)
    task = models.loss_of(clean(**everything)) - penalty  # the mean over all eight
    (task * (count if accepts else 1) + penalty).backward()
    assert_close(found[0], gradients(clean), DOUBLE)
