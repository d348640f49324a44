"""The fine-tuning command, end to end on tiny models."""

import json
import shutil

import lifecycle
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import load_file

import hal_kernels

from .tiny import save_model, write_jsonl

METHODS = ("hyperadalora", "adalora", "adalora-peft", "lora", "full")
# 40 rows in batches of 4: ten steps an epoch; 14 layers of rank 3, 2 on average in the end.
RECIPE = (
    "--per-device-train-batch-size", 4, "--learning-rate", 1e-3, "--warmup-steps", 2, "--rank", 2,
    "--interval", 1, "--logging-steps", 2, "--max-steps", 12, "--save-strategy", "steps",
    "--save-steps", 8, "--eval-strategy", "steps", "--eval-steps", 8,
)  # fmt: skip
LAYERS = 2 * 6 + 1  # with the pooler


def classification(bert_folder, reviews, *more):
    train, dev = reviews
    files = ("--train-file", train, "--eval-file", dev)
    return ("--model", bert_folder, *files, "--report-to", "none", *RECIPE, *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter_tensors(folder):
    (path,) = folder.glob("adapter-*.safetensors")
    return load_file(path)


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(6, 40, (3, 9))).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_its_files(
    method, finetune, bert_folder, reviews, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = classification(bert_folder, reviews, "--method", method, "--output-dir", out)
    assert finetune(*arguments, "--head-learning-rate", 1e-2) == 0
    assert "accuracy" in capsys.readouterr().out
    logged = lines(out / "metrics.jsonl")
    assert [e["step"] for e in logged if "loss" in e] == [2, 4, 6, 8, 10, 12]
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["metrics"]["accuracy"] <= 1
    assert results["settings"]["learning_rate"] == 1e-3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(out / "README.md")  # as huggingface_hub reads it
    assert card.data.pipeline_tag == "text-classification" and method in card.data.tags
    libraries = {"full": "transformers", "lora": "peft", "adalora-peft": "peft"}
    assert card.data.library_name == libraries.get(method, "hal_kernels")
    assert card.data.base_model is card.data.datasets is None  # of the hub, and these are files
    card = card.content
    assert "| accuracy |" in card and str(bert_folder) in card
    allocates = method not in ("lora", "full")
    assert (out / "ranks.png").exists() == allocates
    if allocates:
        assert sum(results["ranks"].values()) == 2 * LAYERS
        assert f"{3 * LAYERS} directions at first, {2 * LAYERS} kept" in card
    assert (out / ("model" if method == "full" else "adapter")).is_dir()
    if method in ("hyperadalora", "adalora"):
        for entry in logged:
            if "loss" in entry:
                assert entry["task_loss"] + entry["penalty"] == pytest.approx(entry["loss"])
                assert (entry["penalty"] > 0) == (method == "adalora")
        assert not list((out / "checkpoint-8").glob("model*")), "the whole model was saved"


@pytest.mark.parametrize(
    ("family", "options", "rate"),
    [
        ("gpt2", [], 1e-3), ("gpt2", ["--method", "adalora"], 1e-2),
        ("gpt2", ["--hypernet", "mlp"], 1e-4), ("gpt2", ["--method", "full"], 2e-5),
        ("gpt2", ["--method", "lora", "--learning-rate", 0.5], 0.5), ("llama", [], 1e-3),
    ],
)  # fmt: skip
def test_the_rate_suits_the_method(family, options, rate, finetune, tmp_path, capsys):
    """And what the model and its kind of data want; the run says what it trains before it does."""
    save_model(family, tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", (ASKED if family == "llama" else LABELLED) * 8)
    assert finetune("--model", "model", "--train-file", data, *BRIEF, *options) == 0
    results = json.loads((tmp_path / "finetune_out" / "results.json").read_text())
    assert results["settings"]["learning_rate"] == rate
    said = capsys.readouterr().out
    adapts = results["settings"]["method"] in ("hyperadalora", "adalora")
    assert (f"{results['trainable_parameters']:,} of" in said) == adapts
    assert (f"{rate:g} to start with" in said) == adapts


def test_the_card_names_what_is_on_the_hub(tmp_path):
    from hal_finetune import report

    results = {
        "method": "lora", "model": "me/base", "data": "gsm8k", "steps": 1, "metrics": {},
        "trainable_parameters": 1, "parameters": 2, "ranks": {},
        "settings": {"dataset": "gsm8k", "eval_dataset": "me/mine:small"},
    }  # fmt: skip
    report.write(tmp_path, results, history=[], ranks_before={}, label_names=None)
    data = metadata_load(tmp_path / "README.md")
    assert data["datasets"] == ["openai/gsm8k", "me/mine"]
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert (data["pipeline_tag"], data["library_name"]) == ("text-generation", "peft")


def test_the_adapter_and_its_lora_load_elsewhere(finetune, bert_folder, reviews, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Auto

    assert finetune(*classification(bert_folder, reviews, "--output-dir", tmp_path)) == 0
    torch.manual_seed(7)  # another head than the one that was trained
    model = hal_kernels.load_adapter(Auto.from_pretrained(bert_folder), tmp_path / "adapter")
    lora = PeftModel.from_pretrained(Auto.from_pretrained(bert_folder), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(Auto.from_pretrained(bert_folder))).abs().max() > 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(finetune, bert_folder, reviews, tmp_path):
    """Bit for bit, and with each step's line in the metrics once."""
    arguments = classification(bert_folder, reviews, "--method", "adalora")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*arguments, "--output-dir", whole) == 0
    shutil.copytree(whole, parts)
    for path in [*(parts / "checkpoint-12").iterdir(), *(parts / "adapter").iterdir()]:
        path.unlink()  # as if it had been killed in between
    (parts / "checkpoint-12").rmdir()
    assert finetune(*arguments, "--output-dir", parts, "--resume") == 0
    expected, found = adapter_tensors(whole / "adapter"), adapter_tensors(parts / "adapter")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    kept = ("step", "loss", "task_loss", "penalty", "directions_kept", "eval_loss")
    for entry, other in zip(
        lines(whole / "metrics.jsonl"), lines(parts / "metrics.jsonl"), strict=True
    ):
        assert [entry.get(k) for k in kept] == [other.get(k) for k in kept]


@pytest.fixture(scope="module")
def finished_run(bert_folder, reviews, tmp_path_factory):
    """(arguments, folder) of a run of two steps."""
    from hal_finetune.main import main

    folder = tmp_path_factory.mktemp("finished")
    arguments = classification(bert_folder, reviews, "--eval-strategy", "no", "--use-cpu")
    arguments += ("--max-steps", 2, "--save-steps", 2, "--disable-tqdm", "true")
    with pytest.MonkeyPatch.context() as patch:
        lifecycle.small_hypernets(patch)
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
        assert main([*map(str, arguments), "--output-dir", str(folder)]) == 0
    return arguments, folder


def test_a_run_is_not_overwritten(finetune, bert_folder, reviews, tmp_path, capsys):
    arguments = classification(bert_folder, reviews, "--output-dir", tmp_path / "out")
    assert finetune(*arguments, "--resume") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert finetune(*arguments) == 0
    assert finetune(*arguments) == 2
    assert "holds a run: --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoiled, more, message",
    [
        ("adapter-*.safetensors", [], "is damaged"),
        ("trainer_state.json", [], "Expecting value"),
        ("optimizer.pt", [], "can't go on from"),
        (
            "nothing",
            ["--method", "adalora"],
            "the checkpoint was made with hypernet='direct', update='spectral'",
        ),
        ("nothing", ["--method", "lora"], "Can't find a valid checkpoint"),
        ("nothing", ["--alpha", 3], "--alpha is 3.0, and 8.0 in the run that is to go on"),
    ],
)
def test_checkpoints_that_cannot_be_gone_on_from(
    spoiled, more, message, finetune, finished_run, tmp_path, capsys
):
    arguments, folder = finished_run
    shutil.copytree(folder, tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoint-2").glob(spoiled):
        if path.is_file():
            path.write_bytes(b"spoiled")
    more = ("--max-steps", 3, "--resume", *more)
    assert finetune(*arguments, "--output-dir", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_tensorboard_has_both_parts_of_the_loss(finetune, bert_folder, reviews, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    arguments = classification(bert_folder, reviews, "--output-dir", tmp_path)
    assert finetune(*arguments, "--report-to", "tensorboard") == 0
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (losses, penalties) = (found.Scalars(f"train/{name}") for name in ("task_loss", "penalty"))
    assert [event.step for event in losses] == [event.step for event in penalties]
    assert len(losses) == 6


HEADS = {
    "distilbert": {"pre_classifier", "classifier"}, "roberta": {"classifier"},
    "deberta-v2": {"pooler", "classifier"}, "xlnet": {"sequence_summary", "logits_proj"},
    "bart": {"classification_head"}, "t5": {"classification_head"}, "gpt2": {"score"},
    "llama": {"score"},
}  # fmt: skip
BRIEF = (
    "--report-to", "none", "--max-steps", 3, "--warmup-steps", 0, "--save-strategy", "no",
    "--eval-strategy", "no", "--held-out", 4, "--rank", 2, "--per-device-train-batch-size", 4,
    "--max-new-tokens", 3,
)  # fmt: skip


@pytest.mark.parametrize(
    "method, family",
    [
        *(("adalora-peft", family) for family in ("distilbert", "roberta", "t5", "gpt2", "xlnet")),
        *(("hyperadalora", family) for family in ("deberta-v2", "xlnet", "bart", "llama")),
        ("lora", "bart"), ("full", "xlnet"),
    ],
)  # fmt: skip
def test_classifiers_of_every_family(method, family, finetune, tmp_path):
    """Pairs of texts and single ones; the head, whatever its name, is trained and saved in full."""
    model = save_model(family, tmp_path / "model")
    text = "text" if method == "hyperadalora" else "sentence1"
    rows = [
        {text: f"the film was {word}", "sentence2": "it is good", "label": word}
        for word in ("good", "bad", "dull") * 4
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    arguments = ("--model", model, "--train-file", data, "--output-dir", out, *BRIEF)
    assert finetune(*arguments, "--method", method) == 0
    results = json.loads((out / "results.json").read_text())
    assert 0 <= results["metrics"]["accuracy"] <= 1
    assert sum(results["ranks"].values()) == 2 * len(results["ranks"])
    if method == "full":
        return
    heads = {
        name.removeprefix("base_model.model.").removeprefix("saved.").partition(".")[0]
        for path in (out / "adapter").glob("*.safetensors")
        for name in load_file(path)
        if "lora_" not in name and ("saved." in name or "base_model." in name)
    }
    assert heads == HEADS[family]


def test_layers_narrower_than_the_rank(finetune, tmp_path):
    """Keys and values here are: the card counts the directions that each layer starts with."""
    from transformers import AutoModelForSequenceClassification as Auto

    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED * 4)
    arguments = ("--model", model, "--train-file", data, "--output-dir", out, *BRIEF, "--rank", 6)
    assert finetune(*arguments) == 0
    assert "122 directions at first, 84 kept" in (out / "README.md").read_text()
    hal_kernels.load_adapter(Auto.from_pretrained(model), out / "adapter")


def test_instructions(finetune, llama_folder, instructions, tmp_path, capsys):
    status = finetune(
        "--model", llama_folder, "--train-file", instructions, "--held-out", 4, *RECIPE,
        "--output-dir", tmp_path, "--max-length", 110, "--max-new-tokens", 4, "--report-to", "none",
    )  # fmt: skip
    assert status == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert {"loss", "answers_bleu4", "answers_rouge1"} <= metrics.keys()
    assert "answers_bleu4" in capsys.readouterr().out


@pytest.mark.parametrize("allowed", [False, True])
def test_humaneval_runs_programs_only_with_leave(
    allowed, finetune, llama_folder, instructions, tmp_path, capsys, monkeypatch
):
    from hal_finetune import evaluators

    ran = []
    monkeypatch.setattr(evaluators, "passes", lambda program, *_, **__: ran.append(program) or True)
    row = {
        "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }  # fmt: skip
    status = finetune(
        "--model", llama_folder, "--train-file", instructions, "--max-steps", 1,
        "--eval-file", write_jsonl(tmp_path / "humaneval.jsonl", [row, row]), "--report-to", "none",
        "--output-dir", tmp_path / "out", "--max-length", 110, "--max-new-tokens", 4,
        *(["--allow-code-execution"] if allowed else []),
    )  # fmt: skip
    assert status == 0
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert len(ran) == (2 if allowed else 0)
    assert metrics.get("answers_pass_at_1") == (1.0 if allowed else None)
    assert ("pass@1 is left out" in capsys.readouterr().err) == (not allowed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--model is missing"),
        (["--model", "x"], "one of --dataset and --train-file"),
        (["--model", "x", "--train-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "x", "--dataset", "no/such"], "data set 'no/such' can't be loaded"),
        (["--model", "x", "--dataset", "gsm8k", "--held-out", "0"], "--held-out is 0"),
        (["--model", "x", "--dataset", "gsm8k", "--fp16", "--bf16"], "fp16"),
    ],
)
def test_errors_are_one_line(arguments, message, finetune, capsys, monkeypatch):
    assert finetune(*arguments) == 2
    said = capsys.readouterr().err
    assert "hal-finetune: error: " in said and message in said


def test_errors_of_several_lines_are_one(finetune, capsys, monkeypatch):
    """As transformers' pages of advice are."""
    from hal_finetune.options import OptionsError

    def fail(*_):
        raise OptionsError("not a model\n  If this is a private repository, …")

    monkeypatch.setattr("hal_finetune.main._run", fail)
    assert finetune("--model", "x", "--dataset", "gsm8k") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "hal-finetune: error: not a model If this is a private repository, …"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rank", 0], "rank is 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--target-modules", "nothing"], "'nothing' matches no module"),
        (["--method", "lora", "--target-modules", "nothing"], "'nothing' matches no module"),
    ],
)
def test_options_that_do_not_fit_the_model(more, message, finetune, bert_folder, reviews, capsys):
    assert finetune(*classification(bert_folder, reviews, *more)) == 2
    assert message in capsys.readouterr().err


LABELLED = {"sentence": "the film was good", "label": 1}, {"sentence": "bad", "label": 0}
ASKED = ({"prompt": "write the number two", "completion": "two"},)
LONG = {"sentence": "very " * 70, "label": 1}


@pytest.mark.parametrize(
    "family, options, rows, more, message",
    [
        ("roberta", {}, [*LABELLED, LONG], [], "longest row takes 70 tokens, expected at most 63"),
        ("gpt2", {}, [*LABELLED, LONG], [], "longest row takes 70 tokens, expected at most 64"),
        ("bart", {}, [*LABELLED, LONG], [], "longest row takes 71 tokens, expected at most 64"),
        ("gpt2", {}, ASKED, ["--max-new-tokens", 61], "expected at most 64 together"),
        ("llama", {"vocab_size": 9}, LABELLED, [], "gives token 13, expected less than 9"),
        ("llama", {"vocab_size": 9}, ASKED, [], "gives token 38, expected less than 9"),
        ("roberta", {}, ASKED, [], "a roberta that reads texts in both directions can't learn"),
        ("xlnet", {}, ASKED, [], "a xlnet that reads texts in both directions can't learn"),
        ("t5", {}, ASKED, [], "transformers has no causal language model of this architecture"),
        ("gpt2", {}, [*LABELLED, {"sentence": "", "label": 0}], [], "the text '' has no token"),
        ("gpt2", {}, [*ASKED, {"prompt": "", "completion": "a"}], [], "the prompt '' of the"),
        ("bart", {}, [*LABELLED, {"sentence": "</s>", "label": 0}], [], "tokenizer gives 1 or 2"),
        ("llama", {}, ASKED, ["--max-length", 4], "--max-length is 4: every prompt is as long"),
        ("roberta", {}, [{"sentence": "ä", "label": i} for i in (0, 1)], [], "but special tokens"),
        ("gpt2", {}, LABELLED, ["--output-dir", "model/config.json"], "--output-dir model/config"),
        ("gpt2", {}, LABELLED, ["--output-dir", "model/config.json/x"], "Not a directory"),
        ("gpt2", {}, LABELLED, ["--output-dir", "a\0b"], "embedded null byte"),
        ("gpt2", {}, LABELLED, ["--resume-from-checkpoint", "no"], "can't go on from no: "),
        ("gpt2", {}, LABELLED, ["--report-to", "azure_ml"], "requires azureml to be installed"),
        ("gpt2", {}, LABELLED, ["--report-to", "trackio"], "requires trackio to be installed"),
        ("gpt2", {}, LABELLED, ["--report-to", "nothing"], "nothing is not supported"),
        ("gpt2", {}, LABELLED, ["--fsdp", "full_shard"], "only works in distributed training"),
        ("gpt2", {}, LABELLED, ["--optim", "adamw_torch_xla"], "failed to import"),
        ("gpt2", {}, LABELLED, ["--adam-beta1", 2], "Invalid beta parameter at index 0: 2.0"),
        ("gpt2", {}, LABELLED, ["--lr-scheduler-kwargs", '{"x": 1}'], "keyword argument 'x'"),
        ("gpt2", {}, LABELLED, ["--metric-for-best-model", "x"], "one of ['loss', 'accuracy']"),
        ("gpt2", {}, ASKED, ["--metric-for-best-model", "accuracy"], "expected one of ['loss']"),
        ("gpt2", {}, LABELLED, ["--method", "lora", "--alpha", 0], "alpha is 0.0, expected more"),
        (
            "gpt2", {}, LABELLED, ["--method", "adalora-peft", "--init-rank", 2],
            "init_rank is 2, expected more than rank",
        ),
    ],
)  # fmt: skip
def test_models_and_data_that_do_not_go_together(
    family, options, rows, more, message, finetune, tmp_path, capsys
):
    save_model(family, tmp_path / "model", **options)
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows] * 8)
    arguments = ("--model", "model", "--train-file", data, *BRIEF, "--output-dir", "out")
    assert finetune(*arguments, *more) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "hal-finetune" in line]
    assert len(said) == 1 and said[0].startswith("hal-finetune: error: ") and message in said[0]


def _break_config(folder):
    (folder / "config.json").write_text("{")


def _break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def _pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def _break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def _drop_pad_token(folder):
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_token")}
    path.write_text(json.dumps(kept))


def _train_another_classifier(folder):
    from transformers import AutoModelForSequenceClassification as Auto

    Auto.from_pretrained(folder, num_labels=5).save_pretrained(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_break_config, "is not a valid JSON file"),
        (_break_weights, "header too small"),
        (_pickle_weights, "EOFError"),
        (_break_tokenizer, "its tokenizer can't be loaded"),
        (_drop_pad_token, "neither a padding nor an end-of-text token: set its pad_token"),
        (_train_another_classifier, "a classifier of other labels than the data's 2 ('0', '1')"),
    ],
)
def test_models_that_cannot_be_used(spoil, message, finetune, tmp_path, capsys):
    spoil(save_model("gpt2", tmp_path / "model"))
    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED * 4)
    assert finetune("--model", "model", "--train-file", data, *BRIEF) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "hal-finetune" in line]
    assert len(said) == 1 and message in said[0]


def test_a_run_shorter_than_its_warm_up_is_told_so(finetune, bert_folder, reviews, capsys):
    arguments = classification(bert_folder, reviews, *BRIEF, "--warmup-steps", 500)
    assert finetune(*arguments, "--recipe", "paper") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warm-up" in line]
    assert said == ["hal-finetune: warm-up takes 500 of 3 steps: see --warmup-steps"]


def test_padding_is_the_tokenizers(finetune, tmp_path):
    """GPT-2's classifier judges by the last token that is no padding, also before any training."""
    save_model("gpt2", tmp_path / "model", pad_token_id=None)
    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED * 4)
    found = []
    for size in (1, 4):
        arguments = ("--model", "model", "--train-file", data, *BRIEF, "--do-train", "false")
        assert finetune(*arguments, "--per-device-eval-batch-size", size) == 0
        results = json.loads((tmp_path / "finetune_out" / "results.json").read_text())
        found.append(results["metrics"]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("method", ["hyperadalora", "adalora", "adalora-peft"])
def test_short_runs_meet_the_rank_budget(method, finetune, bert_folder, reviews, tmp_path):
    arguments = classification(bert_folder, reviews, "--method", method)[: -len(RECIPE) - 2]
    assert finetune(*arguments, *BRIEF, "--output-dir", tmp_path, "--method", method) == 0
    ranks = json.loads((tmp_path / "results.json").read_text())["ranks"]
    assert sum(ranks.values()) == 2 * LAYERS


def test_accumulated_micro_batches_are_averaged(finetune, bert_folder, reviews, tmp_path):
    """Logged at a learning rate of nothing: rows in one batch, or in two, have the same loss."""
    found = []
    for rows, micro in ((4, 1), (2, 2)):
        out = tmp_path / str(micro)
        arguments = classification(bert_folder, reviews, "--output-dir", out, "--max-steps", 2)
        arguments += ("--method", "adalora", "--gamma", 1.0)  # whose loss has a penalty
        more = ("--per-device-train-batch-size", rows, "--gradient-accumulation-steps", micro)
        assert finetune(*arguments, "--learning-rate", 1e-30, "--logging-steps", 2, *more) == 0
        found.append(next(e for e in lines(out / "metrics.jsonl") if "loss" in e))
    assert (
        found[0]["penalty"] == pytest.approx(found[1]["penalty"], rel=1e-4) and found[0]["penalty"]
    )
    assert found[0]["task_loss"] == pytest.approx(found[1]["task_loss"], rel=0.1)  # dropout
