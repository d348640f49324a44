"""A Trainer for patched models: small checkpoints, and the loss in its two parts.

Transformers' own Trainer trains a patched model as it is, and its checkpoints, which hold the whole
model, resume it. This one writes the adapter alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer

import hal_kernels
from hal_kernels.integration import HyperAdapter, saved_module_names


class AdapterTrainer(Trainer):
    """transformers.Trainer that saves and resumes a patched model by its adapter.

    - A checkpoint holds what `hal_kernels.save_adapter` writes, in place of the whole model;
      ``resume_from_checkpoint`` and ``load_best_model_at_end`` read it. The run that goes on equals
      the uninterrupted one.
    - Beside ``loss``, what is minimised, it logs ``task_loss`` and ``penalty`` (γ included).
    - With ``label_smoothing_factor`` or ``compute_loss_func``, where the loss is computed outside
      the model, it adds the penalty.

    A model that is not patched is trained and saved as by Trainer, also one that PEFT holds an
    adapter of.

    Args:
        head_learning_rate: of the modules trained in full beside the adapter (a new classifier);
            None: the same as of everything else.
        metrics_file: JSONL file that gets a line for every log; None: none is written. A resumed
            run goes on after the lines of the steps it has taken.
        Everything else: as Trainer.
    """

    def __init__(
        self,
        *args: Any,
        head_learning_rate: float | None = None,
        metrics_file: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate
        self.metrics_file = None if metrics_file is None else Path(metrics_file)
        self._lines_kept = False
        self._paid_in: int | None = None  # the step whose loss has a penalty from outside the model
        self._penalty_sum: torch.Tensor | None = None  # of the steps since the last log

    @property
    def adapter(self) -> HyperAdapter | None:
        """The adapter of a patched model, or None."""
        return next((m for m in self._module.modules() if isinstance(m, HyperAdapter)), None)

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def _patched(self) -> bool:
        """Whether `patch_model` made the adapter: PEFT saves what it holds itself."""
        children = (m._modules.get("hal") for m in self._module.modules())
        return any(isinstance(child, HyperAdapter) for child in children)

    # -- loss ------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's, with the penalty where the model can't add it; keeps count of the penalty."""
        adapter = self.adapter
        if adapter is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outside = self.label_smoother is not None or self.compute_loss_func is not None
        outside = outside and "labels" in inputs
        adapter.last_penalty = None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        whole_window = self._normalised_over_window(num_items_in_batch)
        owed = not whole_window or self._paid_in != self.state.global_step
        if outside and adapter.gamma > 0 and owed:
            self._paid_in = self.state.global_step
            term = hal_kernels.penalty(model)
            loss = loss + term.to(loss.device, loss.dtype)
            adapter.last_penalty = term.detach()
        if adapter.last_penalty is not None:
            share = 1 if whole_window else self.current_gradient_accumulation_steps
            penalty = adapter.last_penalty / share
            known = self._penalty_sum
            self._penalty_sum = penalty if known is None else known + penalty
        return (loss, outputs) if return_outputs else loss

    def _normalised_over_window(self, num_items_in_batch: Any) -> bool:
        """Whether Trainer takes the loss as it is, and does not divide it by the micro-batches."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with both parts of the loss, the ranks, and a line in the metrics file."""
        if "loss" in logs and self.adapter is not None:
            steps = self.state.global_step - self._logged_at()
            penalty = 0.0 if self._penalty_sum is None else float(self._penalty_sum) / steps
            self._penalty_sum = None
            logs["task_loss"] = logs["loss"] - penalty
            logs["penalty"] = penalty
            logs["directions_kept"] = int(self.adapter.mask.sum())
        super().log(logs, *args, **kwargs)
        if self.metrics_file is not None and self.is_world_process_zero():
            self._write_line({"step": self.state.global_step, **logs})

    def _logged_at(self) -> int:
        steps = [int(entry["step"]) for entry in self.state.log_history if "loss" in entry]
        return steps[-1] if steps else 0

    def _write_line(self, line: dict[str, Any]) -> None:
        assert self.metrics_file is not None
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        if not self._lines_kept:
            kept = self.state.log_history[:-1]  # empty, or what a checkpoint remembers
            self.metrics_file.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            self._lines_kept = True
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- optimizer -------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, with the modules trained in full in groups of their own."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.head_learning_rate is not None:
            head = self._in_full()
            for group in list(optimizer.param_groups):
                inside = [p for p in group["params"] if id(p) in head]
                if inside:
                    group["params"] = [p for p in group["params"] if id(p) not in head]
                    optimizer.add_param_group(
                        {**group, "params": inside, "lr": self.head_learning_rate}
                    )
        return optimizer

    def _in_full(self) -> set[int]:
        """Ids of the parameters of modules trained in full: as patch_model or PEFT has them, or
        the heads that patch_model would find."""
        model, adapter = self._module, self.adapter
        if adapter is not None:
            own = {id(p) for p in adapter.parameters()}
            return {id(p) for p in model.parameters() if p.requires_grad} - own
        heads: list[nn.Module] = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        if not heads:
            names = saved_module_names(model, hal_kernels.HALConfig())
            heads = [model.get_submodule(name) for name in names]
        return {id(p) for head in heads for p in head.parameters()}

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self._patched:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            hal_kernels.save_adapter(self._module, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._patched:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            hal_kernels.load_adapter(self._module, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._patched:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            hal_kernels.load_adapter(self._module, self.state.best_model_checkpoint)
