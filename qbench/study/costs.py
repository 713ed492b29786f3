"""What a cell costs: memory, disk and time, from shapes, token counts and a machine's speed.

Every figure is a sum of terms that are written out here. With P parameters of w bytes each, n the
channels of an input, m the rows that read it, T calibration tokens and d the hidden size:

    weights       P w as loaded, and P w of the copy that is quantized (of one cell: what its blocks
                  get anew beside the mapped file); streamed: what lies outside the blocks (nothing
                  where it is mapped from the file unchanged) and one block
    activations   3 T d w: into the first block, into and out of the one at hand; in files where a
                  streamed model has large ones
    hessians      4 n² for every input of a block, in memory those of the first block as well (for
                  the next method); two more of the largest while it is factorized
    rounding      6 float32 copies of the largest m x n
    time          2 P FLOP a token and pass; 2 T n² of a hessian, n³ of its factorization (three
                  times the n³/3 of one, which is how far it falls behind a product), m n² of the
                  column updates; a few operations a weight; reading the file

Left out: what cells share, which makes a sweep cheaper than its cells; fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qbench.study.shapes import BlockShape, InputShape, ModelShape
from qbench.study.speed import Speed

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by torch's name of its type."""
PROCESS = 0.42 * 2**30
"""What torch, transformers and lm-eval take before anything is loaded."""
ANONYMOUS = 0.28 * 2**30
"""The part of it that is no page of a file."""
SPILLED = 1 << 20
"""Activations of a batch of this many bytes lie in a file when a model is streamed."""
_CALIBRATION_BATCH = 2048
"""Tokens that run through a block together, or one window if that is longer."""
_EVALUATION_BATCH = {True: 512, False: 2048}
"""Tokens of an evaluation's batch on a CPU or not, where the run does not say; or a longer row."""
_AT_ONCE = {True: 2, False: 1}
"""Batches of an evaluation side by side, on a CPU or not."""
_HELD = 1 << 28
"""Activations that the evaluation of a streamed model holds, or two blocks if that is more."""
_LOGITS = 1 << 24
"""Most logits at a time."""
_COPIES = 6
"""Float32 copies of a matrix while it is rounded: itself, the original, codes, errors."""


@dataclass(frozen=True)
class Work:
    """What is to be done with a model, in the terms that cost something."""

    dtype: str
    stored_bytes: int
    """Of the checkpoint's files."""
    is_cast: bool
    """Whether the files hold another dtype, so that weights are converted as they are read."""
    quantizes: bool = False
    copies: bool = True
    """Whether the full-precision model stays in memory beside the quantized one."""
    on_cpu: bool = True
    nsamples: int = 0
    """Calibration windows; 0 where the method reads no data."""
    seqlen: int = 0
    hessians: bool = False
    passes: int = 0
    """How often the calibration windows run through each block."""
    evaluated: int = 0
    """Tokens of all tasks together."""
    longest: int = 0
    """Tokens of the longest row."""
    batch_tokens: int = 0

    @property
    def width(self) -> int:
        """Bytes of a weight or activation."""
        return WIDTHS[self.dtype]

    @property
    def calibrated(self) -> int:
        """Calibration tokens."""
        return self.nsamples * self.seqlen

    @property
    def calibration_batch(self) -> int:
        """Tokens that run through a block together."""
        return min(max(_CALIBRATION_BATCH, self.seqlen), self.calibrated)

    @property
    def evaluation_batch(self) -> int:
        """Tokens of a batch."""
        wanted = max(self.batch_tokens or _EVALUATION_BATCH[self.on_cpu], self.longest)
        return min(wanted, self.evaluated)


@dataclass(frozen=True)
class Estimate:
    """What a cell takes; bytes and seconds."""

    memory: float
    """Peak of the process with the model in memory, mapped weights included."""
    streamed_memory: float
    """Peak with ``--stream``, without pages of files, which the system takes back when it likes."""
    disk: float
    """What ``--save`` writes."""
    work_files: float
    """What ``--stream`` keeps on disk while it runs."""
    seconds: float
    """On this machine, if nobody else uses it."""


def estimate(shape: ModelShape, work: Work, speed: Speed) -> Estimate:
    """The costs of one cell; see the top of this file for the formulas."""
    weights = shape.parameters * work.width
    outside = shape.outside * work.width if work.is_cast else 0
    block = shape.largest_block * work.width
    activations, spills = _activations(shape, work), _spills(shape, work)
    held = min(work.evaluated * shape.hidden * work.width, max(_HELD, 2 * block))
    streamed = max(
        _quantizing(shape, work) + (0 if spills else activations),
        _evaluating(shape, work) + held,
    )
    kept_hessians = _hessian_bytes(shape.blocks[0], work)
    whole = max(
        _quantizing(shape, work) + activations + kept_hessians,
        _evaluating(shape, work) + activations / 3 + kept_hessians,
    )
    kept = shape.in_blocks * work.width if work.quantizes else 0
    beside = weights if work.copies and work.quantizes else 0 if work.is_cast else kept
    return Estimate(
        memory=PROCESS + weights + beside + whole,
        streamed_memory=ANONYMOUS + outside + block + streamed,
        disk=weights,
        work_files=kept + (activations if spills else 0),
        seconds=seconds(shape, work, speed),
    )


def _activations(shape: ModelShape, work: Work) -> float:
    """Hidden states of all calibration tokens: into the first block, into and out of another."""
    return 3.0 * work.calibrated * shape.hidden * work.width


def _spills(shape: ModelShape, work: Work) -> bool:
    return work.calibration_batch * shape.hidden * work.width >= SPILLED


def _quantizing(shape: ModelShape, work: Work) -> float:
    """Bytes beside weights and activations at the peak of quantizing a block."""
    if not work.quantizes:
        return 0.0
    factors = 8 if work.hessians else 0
    rounding = max(
        4 * _COPIES * i.n_inputs * i.n_outputs + factors * i.n_inputs**2 for i in _inputs(shape)
    )
    running = _running(shape, work.calibration_batch, work.width)
    return max(rounding, running) + max(_hessian_bytes(b, work) for b in shape.blocks)


def _hessian_bytes(block: BlockShape, work: Work) -> float:
    return sum(4.0 * i.n_alike * i.n_inputs**2 for i in block.inputs) if work.hessians else 0.0


def _running(shape: ModelShape, tokens: int, width: int) -> float:
    """A block at work on a batch: its wide and narrow states, and an input in float32."""
    return tokens * (width * (3 * shape.widest + 4 * shape.hidden) + 4 * shape.widest)


def _evaluating(shape: ModelShape, work: Work) -> float:
    """Bytes beside the weights at the peak of an evaluation: batches, and logits thrice.

    On a CPU each of two batches has a part of its own, which is worked on in small pieces.
    """
    tokens = work.evaluation_batch
    logits = min(tokens * shape.vocabulary, _LOGITS)
    return _AT_ONCE[work.on_cpu] * _running(shape, tokens, work.width) + 12.0 * logits


def seconds(shape: ModelShape, work: Work, speed: Speed) -> float:
    """Time of one cell with one thing done after the other."""
    active = sum(block.active for block in shape.blocks)
    forwards = 2.0 * active * work.calibrated * work.passes
    forwards += 2.0 * (active + shape.vocabulary * shape.hidden) * work.evaluated
    solving = 0.0
    if work.quantizes and work.hessians:
        solving = sum(_solving(i.n_inputs, i.n_outputs, work) * i.n_alike for i in _inputs(shape))
    rounding = shape.in_blocks / speed.rounding if work.quantizes else 0.0
    products = forwards / speed.products + solving / speed.products32
    return products + rounding + work.stored_bytes / speed.read


def _inputs(shape: ModelShape) -> Iterable[InputShape]:
    return (i for block in shape.blocks for i in block.inputs)


def _solving(n: int, m: int, work: Work) -> float:
    """FLOP of one hessian, its factorization and the column updates of the rows that use it."""
    return 2.0 * work.calibrated * n**2 + float(n) ** 3 + float(m) * n**2
