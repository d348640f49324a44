"""The command: fine-tune a model on one data set, with one method.

    hal-finetune --model roberta-base --dataset glue/rte
    hal-finetune --model meta-llama/Llama-3.1-8B --dataset tatsu-lab/alpaca --method adalora
    hal-finetune --config run.yaml --resume
    accelerate launch -m hal_finetune --config run.yaml

transformers' Trainer is the engine, and takes every one of its options.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hal_kernels
from hal_peft.trainer import AdapterTrainer

from . import evaluators, report
from . import model as models
from .data import Task, encode, load, templated
from .options import ON_KERNELS, DataOptions, MethodOptions, OptionsError, RunOptions, parse
from .prompts import HUMANEVAL


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, train, evaluate, write; returns the exit status."""
    try:
        return _run(*parse(list(sys.argv[1:] if argv is None else argv)))
    except OptionsError as error:
        print(f"hal-finetune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(data: DataOptions, method: MethodOptions, run: RunOptions) -> int:
    assert run.output_dir is not None and data.model is not None  # settled with the options
    out = Path(run.output_dir)
    checkpoint = _checkpoint(out, run)
    # For the TensorBoard integration of Trainer.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "tensorboard"))
    with run.main_process_first(local=False, desc="loading the data"):
        task = load(data, run.seed)
    tokenizer = models.load_tokenizer(data.model)
    task = templated(task, tokenizer, data.template)
    trainer = _trainer(task, tokenizer, data, method, run)
    model = trainer.model
    if run.do_train:
        _train(trainer, checkpoint if run.resume else run.resume_from_checkpoint)
        _save(trainer, method.method, out)
    metrics = _evaluate(trainer, task, data) if run.do_eval else {}
    if trainer.is_world_process_zero():
        before, after = models.ranks(model, method.method)
        parameters = list(model.parameters())
        results = {
            "method": method.method, "model": data.model, "data": task.name,
            "steps": trainer.state.global_step, "metrics": _shown(metrics),
            "settings": _settings(data, method, run),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters), "ranks": after,
        }  # fmt: skip
        report.write(
            out,
            results,
            history=trainer.state.log_history,
            ranks_before=before,
            label_names=task.label_names,
        )
        for name, value in sorted(results["metrics"].items()):
            print(f"{name:28} {value:.4g}")
        print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _checkpoint(out: Path, run: RunOptions) -> str | None:
    """The last checkpoint in `out`, which is made; refused if nobody asked to go on from it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint: str | None = get_last_checkpoint(str(out))
    except (OSError, ValueError) as error:
        raise OptionsError(f"--output-dir {out}: {error}") from error
    if checkpoint and run.do_train and not run.resume and not run.resume_from_checkpoint:
        raise OptionsError(f"--output-dir {out} holds a run: --resume goes on with it")
    if run.resume and checkpoint is None:
        raise OptionsError(f"--resume: {out} holds no checkpoint")
    return checkpoint


def _trainer(
    task: Task, tokenizer: Any, data: DataOptions, method: MethodOptions, run: RunOptions
) -> Any:
    """A trainer of the adapted model, with both sides of the data.

    Raises:
        OptionsError: model, data and options don't go together.
    """
    names = task.label_names
    train, held_out = (encode(tokenizer, s, data.max_length) for s in (task.train, task.held_out))
    if len(train) < len(task.train):
        left = f"{len(task.train) - len(train)} of {len(task.train)} rows left out"
        _say(run, f"{left}: their prompt takes {data.max_length} tokens, or more")
    known = ["loss", "accuracy"] if names else ["loss"]
    best = run.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in known:
        raise OptionsError(f"--metric-for-best-model is {best!r}, expected one of {known}")
    steps = _total_steps(len(train), run)
    if run.do_train and run.get_warmup_steps(steps) >= steps:
        _say(run, f"warm-up takes {run.warmup_steps:g} of {steps} steps: see --warmup-steps")

    # Weights that are all trained need the precision.
    full = method.method == "full" and data.dtype == "auto"
    assert data.model is not None
    dtype = "float32" if full else data.dtype
    model = models.load_base(data.model, names, dtype=dtype, seed=run.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    models.expect_fit(model, tokenizer, [*train, *held_out], data)
    if names is None and run.do_eval and data.generate:
        models.expect_room(model, tokenizer, task.held_out, data)
    model = models.adapt(
        model, method, classifies=names is not None, total_steps=steps, seed=run.seed
    )
    if run.learning_rate is None:
        run.learning_rate = models.learning_rate(model, method.method)
    if method.method in ON_KERNELS and run.do_train and run.process_index == 0:
        print(hal_kernels.summary(model))
    set_seed(run.seed)
    try:
        trainer = AdapterTrainer(
            model,
            run,
            data_collator=(DataCollatorWithPadding if names else DataCollatorForSeq2Seq)(tokenizer),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=_accuracy if names else None,
            preprocess_logits_for_metrics=_predicted if names else None,
            callbacks=[models.AllocateRanks()] if method.method == "adalora-peft" else None,
            head_learning_rate=method.head_learning_rate,
            metrics_file=Path(str(run.output_dir)) / "metrics.jsonl",
        )
    except Exception as error:  # any kind: of accelerate, trackers that are not installed, the hub
        raise OptionsError(str(error) or repr(error)) from error
    if names is not None:
        # Classifiers take num_items_in_batch, but divide by nothing: without this, the micro-
        # batches of an accumulated step would add up instead of being averaged.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _total_steps(rows: int, run: RunOptions) -> int:
    """Optimizer steps of the run, counted as Trainer counts them."""
    if run.max_steps > 0:
        return run.max_steps
    batch = run.train_batch_size * max(1, run.world_size)
    batches = rows // batch if run.dataloader_drop_last else math.ceil(rows / batch)
    per_epoch = max(math.ceil(batches / run.gradient_accumulation_steps), 1)
    return math.ceil(run.num_train_epochs * per_epoch)


def _train(trainer: Any, resumed: str | None) -> None:
    begins = models.Begins(trainer.model)
    trainer.add_callback(begins)
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except ImportError as error:  # what an option of TrainingArguments needs
        raise OptionsError(str(error)) from error
    except Exception as error:
        if begins.begun or isinstance(error, OptionsError):
            raise
        # Of an option, as of optimizer and scheduler, or of what is resumed.
        where = f"the run can't go on from {resumed}: " if resumed else ""
        raise OptionsError(f"{where}{str(error) or repr(error)}") from error


def _save(trainer: Any, method: str, out: Path) -> None:
    """The trained weights: the adapter, and beside it as plain LoRA; or the whole model."""
    trainer.save_model(str(out / ("model" if method == "full" else "adapter")))
    if method in ON_KERNELS and trainer.is_world_process_zero():
        hal_kernels.export_lora(trainer.accelerator.unwrap_model(trainer.model), out / "lora")


def _predicted(logits: Any, labels: Any) -> Any:
    """What is kept of an evaluation batch: one number a row."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def _evaluate(trainer: Any, task: Task, data: DataOptions) -> dict[str, float]:
    metrics: dict[str, float] = trainer.evaluate()
    if task.label_names is None and data.generate:
        judged = _judged(trainer, task, data)
        trainer.log(dict(judged))
        metrics |= judged
    if task.form == HUMANEVAL and not data.allow_code_execution:
        words = "pass@1 is left out: it runs what the model writes (--allow-code-execution)"
        _say(trainer.args, words)
    return metrics


def _judged(trainer: Any, task: Task, data: DataOptions) -> dict[str, float]:
    """Metrics of written answers; each process writes its share."""
    state = trainer.accelerator.state
    mine = list(range(len(task.held_out)))[state.process_index :: state.num_processes]
    written = evaluators.write_answers(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        [task.held_out[i] for i in mine],
        batch_size=trainer.args.eval_batch_size,
        max_length=data.max_length,
        max_new_tokens=data.max_new_tokens,
        progress=state.process_index == 0 and not trainer.args.disable_tqdm,
    )
    answers = dict(gather_object(list(zip(mine, written, strict=True))))
    if not trainer.is_world_process_zero():
        return {}
    metrics = evaluators.judge(
        task.form,
        [answers[i] for i in range(len(task.held_out))],
        task.held_out,
        allow_code_execution=data.allow_code_execution,
    )
    return {f"eval_answers_{name}": value for name, value in metrics.items()}


def _settings(data: DataOptions, method: MethodOptions, run: RunOptions) -> dict[str, Any]:
    """What the run was made with: the recipe, and what differs from the defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(RunOptions)}
    shown = {
        name: value
        for name, value in run.to_dict().items()
        if (name in RunOptions.__annotations__ or value != defaults.get(name))
        and name not in ("output_dir", "resume", "do_train", "do_eval", "hub_token")
        and isinstance(value, str | int | float)
    }
    settings = dataclasses.asdict(data) | dataclasses.asdict(method) | shown
    return {name: value for name, value in settings.items() if value is not None}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    hidden = ("_runtime", "_per_second", "epoch")
    return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(hidden)}


def _say(run: Any, words: str) -> None:
    if run.process_index == 0:
        print(f"hal-finetune: {words}", file=sys.stderr)
