"""The shapes of a model, from its configuration alone: what every cost of quantizing it grows with.

The model is built and run on the meta device, where tensors have a shape and no content, so a model
of any size takes a second and no memory. Where an architecture cannot run there (experts that are
chosen by their input), every matrix is taken to read an input of its own: costs are then too high
rather than too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qbench.models.checkpoints import Checkpoint

_TOKENS = 8


@dataclass(frozen=True)
class InputShape:
    """One input of a block and the matrices that read it."""

    n_inputs: int
    """Its channels: in_features of the matrices."""
    n_outputs: int
    """out_features of all of them together."""
    n_alike: int = 1
    """How many such inputs there are (one for each expert of a mixture)."""


@dataclass(frozen=True)
class BlockShape:
    """One decoder block."""

    parameters: int
    inputs: tuple[InputShape, ...]
    active_parameters: int | None = None
    """Weights that one token meets, where they are not all (experts)."""

    @property
    def active(self) -> int:
        """Weights that one token meets."""
        return self.parameters if self.active_parameters is None else self.active_parameters


@dataclass(frozen=True)
class ModelShape:
    """A causal language model."""

    parameters: int
    """All of them, tied ones once."""
    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int

    @property
    def in_blocks(self) -> int:
        """Weights inside decoder blocks."""
        return sum(block.parameters for block in self.blocks)

    @property
    def outside(self) -> int:
        """Weights of embeddings, output head and last norm."""
        return self.parameters - self.in_blocks

    @property
    def largest_block(self) -> int:
        """Weights of the largest block."""
        return max(block.parameters for block in self.blocks)

    @property
    def widest(self) -> int:
        """Channels of the widest input, or of the hidden states."""
        return max([self.hidden, *(i.n_inputs for block in self.blocks for i in block.inputs)])


def model_shape(checkpoint: Checkpoint) -> ModelShape:
    """The shapes of a checkpoint's model, as qbench would load it; no weight is read.

    Raises:
        QBenchError: for a configuration that transformers rejects.
    """
    return shape_of(checkpoint._skeleton())


def shape_of(model: Any) -> ModelShape:
    """The shapes of a model on the meta device, which is cast in place."""
    import torch

    from qbench.models.blocks import find_blocks
    from qbench.models.dimensions import active_share

    model.to(torch.bfloat16)  # the one dtype that grouped products take
    text = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    blocks = [block for _, block in find_blocks(model)]
    with torch.no_grad():
        readers = _readers(model, blocks)
    share = active_share(text)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=tuple(
            _block_shape(block, own, share) for block, own in zip(blocks, readers, strict=True)
        ),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size) if head is None else int(head.weight.shape[0]),
    )


def _block_shape(block: nn.Module, groups: list[list[nn.Module]], share: float) -> BlockShape:
    inputs = []
    for group in groups:
        shapes = [_matrix(module) for module in group]
        inputs.append(InputShape(shapes[0][1], sum(rows for rows, _ in shapes)))
    experts = [parameter for parameter in block.parameters() if parameter.ndim == 3]
    for fused in experts:  # taken as (experts, out_features, in_features), the common order
        count, rows, length = fused.shape
        inputs.append(InputShape(length, rows, count))
    total = sum(parameter.numel() for parameter in block.parameters())
    idle = (1 - share) * sum(fused.numel() for fused in experts)
    return BlockShape(total, tuple(inputs), round(total - idle))


def _matrix(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D."""
    from torch import nn

    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _readers(model: Any, blocks: Sequence[nn.Module]) -> list[list[list[nn.Module]]]:
    """For every block, its matrices in groups that read the same tensor."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    reads: dict[nn.Module, Tensor] = {}  # holding the tensors keeps their identities apart
    own = [[m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))] for block in blocks]
    handles = [
        module.register_forward_pre_hook(lambda module, args: reads.update({module: args[0]}))
        for modules in own
        for module in modules
    ]
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for modules in own:
        groups: dict[int, list[nn.Module]] = {}
        for module in modules:
            groups.setdefault(id(reads.get(module, module)), []).append(module)
        found.append(list(groups.values()))
    return found


def _run(model: Any) -> None:
    """Run the meta model, with a mask that it need not look into if it takes one."""
    import torch

    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    square = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device="meta")
    for mask in ({"attention_mask": square}, {}):
        try:
            model(input_ids=tokens, use_cache=False, **mask)
        except (
            Exception
        ):  # what cannot run without content fails in as many ways as there are models
            continue
        return
