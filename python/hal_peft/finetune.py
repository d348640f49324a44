"""``python -m hal_peft.finetune``: fine-tune a model on one data set, with one method.

    hal-finetune --model roberta-base --dataset glue/rte
    hal-finetune --model meta-llama/Llama-3.1-8B --dataset tatsu-lab/alpaca --method adalora
    hal-finetune --config run.yaml --resume
    accelerate launch -m hal_peft.finetune --config run.yaml

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

from .finetune_options import (
    ON_KERNELS,
    DataOptions,
    MethodOptions,
    OptionsError,
    RunOptions,
    parse,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, train, evaluate, write; returns the exit status."""
    try:
        return _run(*parse(list(sys.argv[1:] if argv is None else argv)))
    except OptionsError as error:
        print(f"hal-finetune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(data: DataOptions, method: MethodOptions, run: RunOptions) -> int:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from . import finetune_data, finetune_model, finetune_report, prompts
    from .demo_methods import load_tokenizer
    from .trainer import AdapterTrainer

    assert run.output_dir is not None and data.model is not None  # settled with the options
    out = Path(run.output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = get_last_checkpoint(str(out))
    except (OSError, ValueError) as error:
        raise OptionsError(f"--output_dir {out}: {error}") from error
    if checkpoint and run.do_train and not run.resume and not run.resume_from_checkpoint:
        raise OptionsError(f"--output_dir {out} holds a run: --resume goes on with it")
    if run.resume and checkpoint is None:
        raise OptionsError(f"--resume: {out} holds no checkpoint")
    # For the TensorBoard integration of Trainer.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "tensorboard"))

    with run.main_process_first(local=False, desc="loading the data"):
        task = finetune_data.load(data, run.seed)
    try:
        tokenizer = load_tokenizer(data.model)
    except Exception as error:  # any kind: of the network, the hub, its files, tokenizers
        words = f"its tokenizer can't be loaded ({type(error).__name__}: {error})"
        raise OptionsError(f"--model {data.model}: {words}") from error
    collate: Any
    names: list[str] | None = None
    if task.labelled is not None:
        names = task.labelled.label_names
        train, held_out = finetune_data.encode_labelled(tokenizer, task.labelled, data.max_length)
        collate = DataCollatorWithPadding(tokenizer)
    else:
        train = finetune_data.encode_prompted(tokenizer, task.train, data.max_length)
        held_out = finetune_data.encode_prompted(tokenizer, task.held_out, data.max_length)
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=finetune_data.IGNORED)
        if len(train) < len(task.train):
            left = f"{len(task.train) - len(train)} of {len(task.train)} rows left out"
            _say(run, f"{left}: their prompt takes {data.max_length} tokens, or more")
    metrics_known = ["loss", "accuracy"] if names else ["loss"]
    best = run.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in metrics_known:
        raise OptionsError(f"--metric_for_best_model is {best!r}, expected one of {metrics_known}")
    steps = _total_steps(len(train), run)
    if run.do_train and run.get_warmup_steps(steps) >= steps:
        _say(run, f"warm-up takes {run.warmup_steps:g} of {steps} steps: see --warmup_steps")

    full = method.method == "full"
    model = finetune_model.load_base(data, names, full=full, seed=run.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    finetune_model.expect_fit(model, tokenizer, [*train, *held_out], data)
    writes = names is None and run.do_eval and data.generate
    if writes:
        asked = prompts.encode(tokenizer, task.held_out)
        finetune_model.expect_room(model, min(max(map(len, asked)), data.max_length), data)
    model = finetune_model.adapt(
        model, method, classifies=names is not None, total_steps=steps, seed=run.seed
    )
    set_seed(run.seed)
    try:
        trainer = AdapterTrainer(
            model,
            run,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=_accuracy if names else None,
            preprocess_logits_for_metrics=_predicted if names else None,
            callbacks=[finetune_model.AllocateRanks()] if method.method == "adalora-peft" else None,
            head_learning_rate=method.head_learning_rate,
            metrics_file=out / "metrics.jsonl",
        )
    except Exception as error:  # any kind: of accelerate, trackers that are not installed, the hub
        raise OptionsError(str(error) or repr(error)) from error
    if names is not None:
        # Classifiers take num_items_in_batch, but divide by nothing: without this, the micro-
        # batches of an accumulated step would add up instead of being averaged.
        trainer.model_accepts_loss_kwargs = False
    before = finetune_model.ranks(model, method.method)
    if run.do_train:
        resumed = checkpoint if run.resume else run.resume_from_checkpoint
        begins = finetune_model.Begins(model)
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
        _save(trainer, method.method, out)
    metrics = {}
    if run.do_eval:
        metrics = trainer.evaluate()
        if writes:
            metrics |= _judged(trainer, task, data, tokenizer)
            trainer.log({k: v for k, v in metrics.items() if k.startswith("eval_answers_")})
        if task.form == prompts.HUMANEVAL and not data.allow_code_execution:
            _say(run, "pass@1 is left out: it runs what the model writes (--allow_code_execution)")
    if trainer.is_world_process_zero():
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        summary = finetune_report.Summary(
            method=method.method,
            model=data.model,
            data=task.name,
            steps=trainer.state.global_step,
            settings=_settings(data, method, run),
            label_names=names,
            metrics=_shown(metrics),
            trainable=sum(trained),
            total=sum(p.numel() for p in model.parameters()),
            history=trainer.state.log_history,
            ranks_before=_initial(before, model, method.method),
            ranks_after=finetune_model.ranks(model, method.method),
        )
        finetune_report.write(out, summary)
        for name, value in sorted(summary.metrics.items()):
            print(f"{name:28} {value:.4g}")
        print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _total_steps(rows: int, run: RunOptions) -> int:
    """Optimizer steps of the run, counted as Trainer counts them."""
    if run.max_steps > 0:
        return run.max_steps
    world = max(1, run.world_size)
    batches = math.ceil(rows / (run.train_batch_size * world))
    if run.dataloader_drop_last:
        batches = rows // (run.train_batch_size * world)
    per_epoch = max(math.ceil(batches / run.gradient_accumulation_steps), 1)
    return math.ceil(run.num_train_epochs * per_epoch)


def _predicted(logits: Any, labels: Any) -> Any:
    """What is kept of an evaluation batch: one number a row."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def _judged(trainer: Any, task: Any, data: DataOptions, tokenizer: Any) -> dict[str, float]:
    """Metrics of written answers; each process writes its share."""
    from accelerate.utils import gather_object

    from . import evaluators

    state = trainer.accelerator.state
    mine = list(range(len(task.held_out)))[state.process_index :: state.num_processes]
    written = evaluators.write_answers(
        trainer.accelerator.unwrap_model(trainer.model),
        tokenizer,
        [task.held_out[i] for i in mine],
        batch_size=trainer.args.eval_batch_size,
        max_length=data.max_length,
        max_new_tokens=data.max_new_tokens,
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


def _save(trainer: Any, method: str, out: Path) -> None:
    """The trained weights: the adapter, and beside it as plain LoRA; or the whole model."""
    import hal_kernels

    trainer.save_model(str(out / ("model" if method == "full" else "adapter")))
    if method in ON_KERNELS and trainer.is_world_process_zero():
        hal_kernels.export_lora(trainer.accelerator.unwrap_model(trainer.model), out / "lora")


def _initial(before: dict[str, int], model: Any, method: str) -> dict[str, int]:
    """Ranks at the start of the run, also of a resumed one."""
    if method in ON_KERNELS:
        config, layers = model.hal.config, model.hal.layout.layers
        return {s.name: config.init_rank_of(s.name, min(s.d_in, s.d_out)) for s in layers}
    return before


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


def _say(run: RunOptions, words: str) -> None:
    if run.process_index == 0:
        print(f"hal-finetune: {words}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
