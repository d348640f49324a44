"""transformers' Trainer as it is, AdapterTrainer, and TRL's SFTTrainer, on patched models."""

import models
import pytest
import torch
from training import assert_equal, state

import hal_kernels

transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments  # noqa: E402

from hal_peft.trainer import AdapterTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_hypernets")
TRAINERS = (Trainer, AdapterTrainer)
ROWS, STEPS = 24, 6
# What Trainer's own checkpoints are told (tests/test_pretrained.py).
SAVES = pytest.mark.filterwarnings("ignore:hal_kernels. from_pretrained")


def patched(hypernet="bert", **options):
    """With dropout in base and adapter, so that a resumed run needs its random state."""
    model = models.bert(hidden_dropout_prob=0.1)
    settings = {"hypernet": hypernet, "init_rank": 4, "interval": 1, "dropout": 0.1, "seed": 0}
    return hal_kernels.patch_model(model, 2, **(settings | options))


def rows(model, count=ROWS):
    return [{k: v[0] for k, v in models.batch(model, 1, seed=i).items()} for i in range(count)]


def make(kind, model, folder, **options):
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_steps": 2,
        "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 0,
    } | options  # fmt: skip
    data = rows(model)
    return kind(model, TrainingArguments(folder, **settings), train_dataset=data, eval_dataset=data)


@SAVES
@pytest.mark.parametrize(
    ("kind", "hypernet"), [(Trainer, "bert"), (AdapterTrainer, None), (AdapterTrainer, "bert")]
)
def test_a_resumed_run_is_the_uninterrupted_one(kind, hypernet, tmp_path):
    whole = make(kind, patched(hypernet), tmp_path)
    whole.train()
    parts = make(kind, patched(hypernet, seed=9), tmp_path)
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert parts.model.hal.steps == STEPS
    assert_equal(state(parts.model), state(whole.model))
    logged = [
        [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        for made in (whole, parts)
    ]
    assert logged[0] == logged[1]
    moments = [made.optimizer.state_dict()["state"] for made in (whole, parts)]
    for key, entry in moments[0].items():
        assert_equal(moments[1][key], entry)


@SAVES
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    made = make(
        kind, patched(), tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        greater_is_better=True,  # the largest loss is the first one's: not the last
        metric_for_best_model="loss",
    )  # fmt: skip
    made.train()
    best = made.state.best_model_checkpoint
    assert not best.endswith(f"-{STEPS}")
    expected = make(kind, patched(seed=9), tmp_path / "other", max_steps=1)
    expected._load_from_checkpoint(best)
    assert_equal(state(made.model), state(expected.model))
    assert made.model.hal.steps == int(best.rpartition("-")[2])


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    made = make(AdapterTrainer, patched(), tmp_path)
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not any(name.startswith(("model", "pytorch_model")) for name in names), names
    loaded = hal_kernels.load_adapter(models.bert(), tmp_path / "checkpoint-6")
    assert_equal(state(loaded), state(made.model))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("make_model", ["bert", "llama"])
def test_the_loss_in_its_two_parts(make_model, accumulation, tmp_path):
    """The penalty counts once, and never in an evaluation loss."""
    model = getattr(models, make_model)()
    hal_kernels.patch_model(model, 2, gamma=50.0, init_rank=2, hypernet="direct", seed=0)
    penalty = hal_kernels.penalty(model).item()
    made = make(
        AdapterTrainer, model, tmp_path, gradient_accumulation_steps=accumulation,
        learning_rate=1e-30, max_steps=2,
    )  # fmt: skip
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["penalty"] == pytest.approx(penalty, rel=1e-5)
        assert entry["task_loss"] + entry["penalty"] == pytest.approx(entry["loss"])
    reported = made.evaluate()["eval_loss"]
    mean = sum(e["task_loss"] for e in made.state.log_history[:2]) / 2
    if make_model == "bert":  # takes num_items_in_batch and makes nothing of it: micro-batches sum
        mean /= accumulation
    assert reported == pytest.approx(mean, rel=0.2)  # of other rows; the penalty is far larger
    assert penalty > 2 * reported


def test_the_penalty_beside_label_smoothing(tmp_path):
    """Trainer computes that loss outside the model, and AdapterTrainer adds the penalty."""
    losses = {}
    for gamma in (0.0, 50.0):
        model = patched(gamma=gamma, dropout=0.0)
        options = {"label_smoothing_factor": 0.1, "learning_rate": 1e-30, "max_steps": 1}
        made = make(AdapterTrainer, model, tmp_path, **options)
        made.train()
        losses[gamma] = made.state.log_history[0]
    assert losses[50.0]["penalty"] == pytest.approx(hal_kernels.penalty(model).item(), rel=1e-5)
    assert losses[50.0]["task_loss"] == pytest.approx(losses[0.0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"lr_scheduler_type": "constant_with_warmup"},
        {"gradient_checkpointing": True},
        {"optim": "adafactor"},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_trainers_options(options, tmp_path):
    model = patched()
    make(Trainer, model, tmp_path, save_strategy="no", **options).train()
    assert model.hal.steps == STEPS
    assert {p.dtype for p in model.hal.parameters()} == {torch.float32}
    assert model.hal.mask.sum() < len(model.hal.mask)
    assert all(tensor.isfinite().all() for tensor in state(model).values())


def test_a_head_has_a_learning_rate_of_its_own(tmp_path):
    model = patched()
    made = make(AdapterTrainer, model, tmp_path, weight_decay=0.1)
    made.head_learning_rate = 0.5
    groups = made.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    head = {id(p) for p in model.classifier.parameters()}
    assert {rates[id(p)] for p in model.parameters() if id(p) in head} == {0.5}
    assert {rate for key, rate in rates.items() if key not in head} == {1e-3}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


@SAVES
@pytest.mark.parametrize(("kind", "steps"), [(Trainer, 7), (AdapterTrainer, 1)])
def test_short_runs_meet_the_rank_budget(kind, steps, tmp_path):
    """The adapter asks its Trainer how many steps there are."""
    model = patched(interval=None)
    make(kind, model, tmp_path, gradient_accumulation_steps=1, max_steps=steps).train()
    assert model.hal.config.total_step == steps
    assert model.hal.last_allocation <= max(1, 2 * steps / 3)
    assert sum(hal_kernels.rank_pattern(model).values()) == 2 * len(model.hal.layout.layers)


@SAVES
@pytest.mark.parametrize(("kind", "saved"), [(Trainer, 2), (AdapterTrainer, 4)])
def test_a_resumed_run_keeps_the_schedule_of_the_whole_one(kind, saved, tmp_path):
    options = {"interval": None, "prune_per_interval": 100}
    whole = make(kind, patched("direct", **options), tmp_path)
    whole.train()
    parts = make(kind, patched("direct", **options, seed=9), tmp_path)
    parts.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert whole.model.hal.config.total_step == parts.model.hal.config.total_step == STEPS
    assert_equal(state(parts.model), state(whole.model))


def test_an_adapter_that_is_trained_further_keeps_its_schedule(tmp_path):
    """It may have met its budget long ago: a few more steps are not its whole run."""
    model = patched("direct", interval=None)
    model.hal.steps = 1000
    make(Trainer, model, tmp_path, save_strategy="no").train()
    assert model.hal.config.total_step is None


@pytest.mark.parametrize("options", [{"interval": 5}, {"total_step": 9}], ids=str)
def test_what_was_said_of_the_schedule_stays(options, tmp_path):
    model = patched(**{"interval": None} | options)
    last = model.hal.last_allocation
    make(Trainer, model, tmp_path, save_strategy="no").train()
    assert model.hal.last_allocation == last


def test_sft_trainer(llama_folder, tmp_path):
    """TRL's, which computes its own loss metrics, needs nothing of this library."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    hal_kernels.patch_model(model, 2, init_rank=4, interval=1, seed=0)
    data = datasets.Dataset.from_list([{"text": f"the film was good {i}"} for i in range(16)])
    arguments = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, dataloader_pin_memory=False, max_length=16,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    assert model.hal.steps == 4
    assert model.hal.mask.sum() < len(model.hal.mask)
