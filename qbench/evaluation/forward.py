"""Running batches through a model that is in memory: logits at the places that are wanted.

The output head is given those places alone, whatever the architecture does with its output
afterwards (scaling, soft caps), and never more of them than make ``LOGITS_AT_ONCE`` logits: where
there are more, the body runs once and what follows it runs again for every part.

Left out: a model whose blocks are on disk (:mod:`qbench.evaluation.streamed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qbench.errors import QBenchError
from qbench.evaluation.packing import Batch
from qbench.models.blocks import find_blocks
from qbench.models.streaming import stream_of
from qbench.quantization.activations import scales_of_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[["PreTrainedModel", Iterable[Batch]], Iterator[Iterable[torch.Tensor]]]
"""Takes a model and batches; gives for each batch, in order, its logits in parts: tensors
(places, vocabulary) on any device and of any float dtype, which one after the other are the logits
at ``batch.wanted``. The parts of a batch are used up before the next batch is asked for. It may
read all batches before it gives the first. ``batch.inputs(device, dtype)`` is what the model is to
be called with; it makes masks, so it may be called again rather than kept. Memory that is lacking
is raised as torch raises it; then the forward is called again with smaller batches. qbench's own is
also called with one batch at a time and a double of the model, from two threads."""
LOGITS_AT_ONCE = 1 << 24
"""Most logits at a time (64 MiB in float32)."""
_LACKING = ("not enough memory", "can't allocate memory", "out of memory")


def forward_of(model: PreTrainedModel) -> Forward:
    """The forward for models in memory, or the one for models whose blocks are on disk."""
    if stream_of(model) is None:
        return logits_of
    from qbench.evaluation.streamed import streamed_logits

    return streamed_logits


def logits_of(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[Iterable[torch.Tensor]]:
    """The logits that are wanted of every batch, as ``Forward`` says, of a model in memory."""
    for batch in batches:
        yield _logits(model, batch)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is lacking; the CPU's allocator has no class of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _LACKING)


def _logits(model: PreTrainedModel, batch: Batch) -> Iterator[torch.Tensor]:
    inputs: dict[str, Any] = batch.inputs(model.device, model.dtype) | {"use_cache": False}
    head: Any = model.get_output_embeddings()

    def run() -> torch.Tensor:
        with scales_of_sequences(batch.lengths):
            logits: torch.Tensor = model(**inputs).logits
        return logits

    if batch.whole_head or head is None:
        yield from _whole(run(), batch.wanted)
        return
    places = _Places(batch.wanted)
    step = max(1, LOGITS_AT_ONCE // int(model.config.get_text_config().vocab_size))
    with ExitStack() as stack:
        stack.enter_context(_hooked(head, places))
        if len(batch.wanted) > step and stack.enter_context(_run_once(model, places)):
            places.part = slice(0, step)
        logits = run()
        if places.given is None:  # the model multiplies with the head's weight by itself
            yield from _whole(logits, batch.wanted)
            return
        part = [logits.flatten(0, -2)]
        del logits  # whoever has read a part has had it
        yield part.pop()
        while places.part.stop < len(batch.wanted):
            places.part = slice(places.part.stop, places.part.stop + step)
            yield run().flatten(0, -2)


def _whole(logits: torch.Tensor, wanted: torch.Tensor) -> Iterator[torch.Tensor]:
    logits = logits.flatten(0, -2)
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    for part in wanted.to(logits.device).split(step):
        yield logits[part]


class _Places:
    """The wanted places of a batch, and the part of them whose turn it is."""

    def __init__(self, wanted: torch.Tensor) -> None:
        self.wanted = wanted
        self.part = slice(0, len(wanted))
        self.given: torch.Tensor | None = None
        """What the output head is given at the wanted places, (places, hidden)."""

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """States (sequences, tokens, hidden) at the wanted places, (places, hidden)."""
        return states.flatten(0, -2)[self.wanted.to(states.device)]

    def before_head(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Hand the head this part of what it was given when the body ran."""
        if not inputs:
            return None
        if self.given is None:
            self.given = self.of(inputs[0])
        return (self.given[self.part][None], *inputs[1:])


@contextmanager
def _hooked(head: torch.nn.Module, places: _Places) -> Iterator[None]:
    handle = head.register_forward_pre_hook(places.before_head)
    try:
        yield
    finally:
        handle.remove()


class _Once:
    """The forward of a module around the blocks: runs the first time and repeats itself later.

    It repeats the states of the part whose turn it is. The head's hook does not read them, but
    what stands between body and head finds the shape that it expects.
    """

    def __init__(self, module: torch.nn.Module, places: _Places) -> None:
        self.module = module
        self.before = module.__dict__.get("forward")  # accelerate keeps a wrapper there
        self.inner = module.forward
        self.places = places
        self.output: Any = None
        self.states: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.states is None:
            self.output = self.inner(*args, **kwargs)
            self.states = self.places.of(self.output[0])
            return self.output
        part = self.states[self.places.part][None]
        if isinstance(self.output, tuple):
            return (part, *self.output[1:])
        self.output[next(iter(self.output))] = part
        return self.output

    def restore(self) -> None:
        """Give the module its own forward back."""
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


@contextmanager
def _run_once(model: PreTrainedModel, places: _Places) -> Iterator[bool]:
    """Let the body run once within; False where the model has no body apart from itself.

    The body is whatever module around the blocks the model calls; OPT passes over the outermost.
    """
    try:
        name, _ = find_blocks(model)[0]
    except QBenchError:  # no list of blocks: nothing to tell the body by
        yield False
        return
    path = name.split(".")[:-2]  # without the list of blocks and the block's number
    bodies = [model.get_submodule(".".join(path[: n + 1])) for n in range(len(path))]
    stand_ins = [_Once(body, places) for body in bodies]
    for body, stand_in in zip(bodies, stand_ins, strict=True):
        body.forward = stand_in  # type: ignore[method-assign]
    try:
        yield bool(bodies)
    finally:
        for stand_in in stand_ins:
            stand_in.restore()
