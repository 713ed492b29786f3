"""What happens between the steps of a training: decay, logging, measuring, saving, the curve."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from qbench.progress import Update
from qbench.training.curves import CurveWriter, Row
from qbench.training.recipe import TwinRun

# how many of each a training has where the recipe does not say
_CURVE_ROWS = 200
_SAVES = 20
_EVALUATIONS = 20


class Schedule(TrainerCallback):
    """Says when to log, evaluate and save, switches weight decay, moves the progress bar."""

    def __init__(self, run: TwinRun, has_held_out: bool, progress: Update) -> None:
        recipe = run.recipe
        self.run = run
        self.progress = progress
        self.log_every = recipe.log_every or max(1, recipe.steps // _CURVE_ROWS)
        self.save_every = recipe.save_every or max(1, recipe.steps // _SAVES)
        self.eval_every = recipe.eval_every or max(1, recipe.steps // _EVALUATIONS)
        self.has_held_out = has_held_out

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Set the weight decay of the update to come; a checkpoint's is the last one's."""
        decay = self.run.weight_decay_at(state.global_step)
        for group in more["optimizer"].param_groups:
            if group["decays"]:
                group["weight_decay"] = decay

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Every saved step is also logged, so that a curve has no row across two sessions."""
        step, last = state.global_step, state.global_step == state.max_steps
        control.should_save = last or step % self.save_every == 0
        control.should_evaluate = self.has_held_out and (last or step % self.eval_every == 0)
        control.should_log = (
            control.should_save or control.should_evaluate or step % self.log_every == 0
        )
        self.progress(step, state.max_steps)


class Recorder(TrainerCallback):
    """Writes the curve. A row waits for the held-out loss where one is measured."""

    def __init__(self, run: TwinRun, writer: CurveWriter | None) -> None:
        """Without a writer, as in every process but the main one, nothing is written."""
        self.run = run
        self.writer = writer
        self.pending: dict[str, float] | None = None
        self.before = 0.0
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Start the clock where the curve ends."""
        self.before = self.writer.seconds if self.writer else 0.0
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Take what the Trainer measured."""
        if self.writer is None:
            return
        if "loss" in logs:
            self.pending = dict(logs)
            if control.should_evaluate:
                return
        elif "eval_loss" not in logs or self.pending is None:
            return
        row = {**self.pending, **logs}
        self.pending = None
        self.writer.append(
            Row(
                step=state.global_step,
                tokens=state.global_step * self.run.recipe.tokens_per_step,
                loss=_short(row["loss"]),
                eval_loss=_short(row["eval_loss"]) if "eval_loss" in row else None,
                learning_rate=_short(row["learning_rate"]),
                seconds=self.before + time.perf_counter() - self.began,
            )
        )


def _short(value: float) -> float:
    """Six digits, so that a row is the same in memory and read again."""
    return float(f"{value:.6g}")
