"""Train the twins of a recipe with transformers' Trainer; a killed training continues.

Several GPUs (``torchrun --standalone --nproc-per-node 8 --no-python qbench train ...``, each with a
copy of the model), mixed precision, checkpoints and continuing from them are the Trainer's and
accelerate's. Here are the papers' schedules, the curve, and the rule that a training is done once:
a finished twin is left alone, an unfinished one continues from its last checkpoint and gives the
weights it would have given. Weights, gradients and optimizer are float32 also where the forward
pass is bfloat16: a latent weight must be able to move by less than a bfloat16 step.

"Adam" of the papers is AdamW here (decoupled weight decay, as in fairseq and Llama); norms and
biases do not decay. A training whose loss is not finite ends there: nothing it does after that is
a training.

Left out: choosing hyperparameters, and any report but the curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qbench.errors import QBenchError, RunFailed
from qbench.models.bitnet.architecture import new_model
from qbench.models.bitnet.layers import B1, BitLinearOptions, bitlinears
from qbench.models.bitnet.saving import save_latent
from qbench.progress import Reporter, Update
from qbench.training.callbacks import Recorder, Schedule
from qbench.training.curves import CURVE_FILE, CurveWriter
from qbench.training.data import Windows, collate, fingerprint
from qbench.training.folders import RECORD_FILE, TwinFolder, write_json
from qbench.training.recipe import TwinRun
from qbench.training.surroundings import environment, random_left_alone, silence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PASS_TOKENS = {"cpu": 8192}  # tokens per pass and device where the recipe does not say
_GPU_PASS_TOKENS = 32768


@dataclass(frozen=True)
class Material:
    """What every twin of a recipe shares."""

    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    """(number of windows, seqlen), int32."""
    held_out: Tensor | None = None

    @cached_property
    def corpus(self) -> str:
        """Fingerprint of the windows."""
        return fingerprint(self.windows)


class Diverged(Exception):
    """The loss of a step was not finite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"loss {loss} at step {step}")
        self.step = step
        self.loss = loss


class TwinTrainer(Trainer):
    """The Trainer with a recipe's order of data, schedule, and an end where the loss is lost."""

    def __init__(self, run: TwinRun, **arguments: Any) -> None:
        self.run = run
        collator: Any = collate
        super().__init__(data_collator=collator, **arguments)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        windows: Any = self.train_dataset
        return SequentialSampler(windows)  # they are in order already

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's, with a mark on the groups that decay: it survives a checkpoint."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group.setdefault("decays", group["weight_decay"] > 0)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule, relative to its first peak."""
        if self.lr_scheduler is None:
            first = self.run.peaks[0]
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(
                optimizer, lambda step: self.run.learning_rate_at(step) / first
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Tensor:
        """The Trainer's, which would go on with a loss that is not finite.

        Raises:
            Diverged: naming the step.
        """
        loss = super().training_step(model, inputs, *rest, **more)
        if not math.isfinite(loss.item()):
            raise Diverged(self.state.global_step + 1, loss.item())
        return loss


@dataclass(frozen=True)
class Session:
    """How a training runs here; nothing of it decides the weights."""

    device: str = "cpu"
    reporter: Reporter = field(default_factory=Reporter)
    callbacks: Sequence[TrainerCallback] = ()


def train_twin(
    run: TwinRun, material: Material, output: Path, session: Session | None = None
) -> dict[str, Any]:
    """Train one twin, or finish it, or find it finished; returns its record.

    Args:
        run: what to train.
        material: on what.
        output: the twin's folder is made in it.
        session: where and how loudly.

    Raises:
        QBenchError: if the folder belongs to another recipe, or this machine cannot run it.
        RunFailed: if it cannot be written, or memory runs out.
    """
    session = session or Session()
    folder = TwinFolder(output / run.name)
    identity = run.identity(material.corpus, len(material.tokenizer))
    with ExitStack() as stack:
        stack.enter_context(random_left_alone())
        stack.enter_context(silence())
        progress = stack.enter_context(session.reporter.step(run.name))
        arguments = _arguments(run, folder, session.device)
        stack.enter_context(_named_failures(run, folder, arguments))
        with arguments.main_process_first(local=False):
            found = folder.claim(run, identity)
            if found is not None:
                return found
            if arguments.process_index == 0:
                stack.enter_context(folder.locked())
            checkpoint = folder.last_checkpoint()
        if checkpoint is not None:
            session.reporter.line(f"{run.name}: continues from step {_step(checkpoint)}")
        trainer = _trainer(run, material, arguments, session, progress)
        recorder = Recorder(run, None)
        if trainer.is_world_process_zero():
            recorder.writer = CurveWriter(folder.work / CURVE_FILE, _step(checkpoint))
        trainer.add_callback(recorder)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Diverged as error:
            record = _record(folder, run, recorder, session) | {
                "status": "diverged", "step": error.step, "loss": str(error.loss),
            }  # fmt: skip
            if trainer.is_world_process_zero():
                folder.write(record)
            return record
        return _finish(trainer, material, folder, _record(folder, run, recorder, session))


@contextmanager
def _named_failures(
    run: TwinRun, folder: TwinFolder, arguments: TrainingArguments
) -> Iterator[None]:
    """What a machine may lack, in one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not lacking and "can't allocate memory" not in str(error):  # what the CPU's says
            raise
        raise RunFailed(
            f"{run.name}: out of memory with {arguments.per_device_train_batch_size} windows per "
            "pass; set a smaller batch_size or shape"
        ) from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunFailed(
            f"{run.name}: cannot write to {folder.work} ({reason}); mend it and run the same again"
        ) from error


def _trainer(
    run: TwinRun,
    material: Material,
    arguments: TrainingArguments,
    session: Session,
    progress: Update,
) -> TwinTrainer:
    recipe = run.recipe
    held_out = material.held_out
    some = None if held_out is None else held_out[: max(1, recipe.eval_tokens // recipe.seqlen)]
    length = recipe.steps * (recipe.tokens_per_step // recipe.seqlen)
    return TwinTrainer(
        run,
        model=_model(run, material.tokenizer),
        args=arguments,
        train_dataset=Windows(material.windows, length, recipe.seed),
        eval_dataset=None if some is None else Windows(some),
        callbacks=[Schedule(run, some is not None, progress), *session.callbacks],
    )


def _model(run: TwinRun, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    recipe = run.recipe
    shape = recipe.shape.model_dump()
    shape["max_position_embeddings"] = shape["max_position_embeddings"] or recipe.seqlen
    return new_model(
        run.kind,
        seed=recipe.seed,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bitlinear=_bitlinear(run),
        **shape,
    )


def _bitlinear(run: TwinRun) -> BitLinearOptions | None:
    """What the recipe says of the b1 twin's layers; None is the published default."""
    if run.kind != "b1" or not run.recipe.bitlinear:
        return None
    return BitLinearOptions.from_dict(B1.to_dict() | run.recipe.bitlinear)


def _arguments(run: TwinRun, folder: TwinFolder, device: str) -> TrainingArguments:
    try:
        arguments = _trainer_arguments(run, folder, device)
    except ValueError as error:  # such as bfloat16 on a GPU that has none
        raise QBenchError(f"precision {run.recipe.precision} on {device}: {error}") from error
    if arguments.n_gpu > 1:  # one process uses one GPU: torchrun is how to use several
        arguments._n_gpu = 1
    recipe = run.recipe
    windows = recipe.tokens_per_step // recipe.seqlen
    if windows % arguments.world_size:
        raise QBenchError(
            f"a step of {windows} windows does not divide among {arguments.world_size} processes"
        )
    share = windows // arguments.world_size
    largest = recipe.batch_size or _PASS_TOKENS.get(device, _GPU_PASS_TOKENS) // recipe.seqlen
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, largest))
    arguments.per_device_train_batch_size = size
    arguments.per_device_eval_batch_size = size
    arguments.gradient_accumulation_steps = share // size
    return arguments


def _trainer_arguments(run: TwinRun, folder: TwinFolder, device: str) -> TrainingArguments:
    recipe = run.recipe
    return TrainingArguments(
        output_dir=str(folder.work),
        max_steps=recipe.steps,
        learning_rate=run.peaks[0],
        weight_decay=run.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.clip or 0.0,
        optim="adamw_torch_fused",
        bf16=recipe.precision == "bfloat16",
        use_cpu=device == "cpu",
        seed=recipe.seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=2,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )


def _finish(
    trainer: TwinTrainer, material: Material, folder: TwinFolder, record: dict[str, Any]
) -> dict[str, Any]:
    """Save the twin; its last held-out loss is that of the weights as they are stored."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    record |= {
        "status": "finished",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if trainer.is_world_process_zero():
        if material.held_out is not None:
            size = trainer.args.per_device_eval_batch_size
            record["eval_loss"] = round(_held_out_loss(model, material.held_out, size), 6)
        with folder.finishing() as partial:
            _save(model, material.tokenizer, partial)
            write_json(partial / RECORD_FILE, record)
    trainer.accelerator.wait_for_everyone()
    return folder.record() or record


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, windows: Tensor, size: int) -> float:
    """Mean loss in float32; the Trainer's counts some windows twice among several processes."""
    model.eval()
    total = 0.0
    for part in windows.split(size):
        batch = collate(part.long().to(model.device))
        total += model(**batch, use_cache=False).loss.item() * len(part)
    return total / len(windows)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer; the weights are exact in float16 already."""
    model.config.use_cache = True  # off only while training
    model = model.half().cpu()
    if any(bitlinears(model)):
        save_latent(model, tokenizer, folder)
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _record(
    folder: TwinFolder, run: TwinRun, recorder: Recorder, session: Session
) -> dict[str, Any]:
    begun = folder.record() or {}
    rows = recorder.writer.rows if recorder.writer else []
    last = rows[-1] if rows else None
    return {
        **begun,
        "steps": run.recipe.steps,
        "tokens": run.recipe.steps * run.recipe.tokens_per_step,
        "train_loss": last.loss if last else None,
        "seconds": round(last.seconds, 1) if last else 0.0,
        "environment": environment(session.device),
    }


def _step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
