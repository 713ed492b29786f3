"""From rows of tokens to batches: what is alike is run once.

Rows that were asked for twice, or whose tokens begin alike, share what they share. Sorted rows
become a tree of tokens; laid out branch after branch it is one sequence, in which every token sees
its own branch alone (``Batch.ends``) and stands at its own depth (``Batch.positions``). Which rows
stand together depends on the rows, the policy, the budget and whether two batches run at a time, so
the same rows always run in the same batches on a kind of device.

``shared``        trees, under an attention mask of their own
``padded``        one row after the other, filled up on the right, which no causal model sees; a row
                  that continues another shares its start
``unshared``      padded, but every row whole; ``Batch.lengths`` lets scales over an input at run
                  time be those of each row alone
``one row``       every row by itself

Left out: running the batches (:mod:`qbench.evaluation.forward`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from qbench.models.products import device_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 512
"""Most tokens of a tree, unless twice its first row is longer (few-shot prompts)."""


def tree_width(model: PreTrainedModel) -> int:
    """Most tokens of a tree: what a wide one shares more, a narrow model spends on attention.

    Linears cost 24 hidden² a token and attention 4 hidden × width, so half the hidden size keeps
    attention near a tenth; the least that was counted on eight task sets lies there.
    """
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 2 * WIDTH))
    return max(WIDTH // 4, min(WIDTH, hidden // 2))


def in_pairs(model: PreTrainedModel, in_turn: bool = False) -> bool:
    """Whether batches are made to run two at a time: on a CPU, where nothing asks for turns."""
    return not in_turn and device_kind(model) == "cpu"


@dataclass(frozen=True)
class Row:
    """Tokens of which the last ``n_scored`` are scored, each given all before it."""

    tokens: Sequence[int]
    n_scored: int


@dataclass
class Batch:
    """Sequences that run together, and what is wanted of them.

    ``ids``, ``positions`` and ``ends`` are (sequences, tokens); the last two are None where plain
    causal attention is right. Token j of a sequence sees token i if i <= j < ends[i].
    """

    ids: torch.Tensor
    wanted: torch.Tensor
    """Places (sequence * tokens + token), ascending, whose logits are needed."""
    place: torch.Tensor
    """Per scored token: index into ``wanted``, ascending."""
    target: torch.Tensor
    """Per scored token: the token."""
    owner: np.ndarray
    """Per scored token: its row."""
    rows: list[int]
    """Rows that are scored here."""
    positions: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    whole_head: bool = False
    """Whether the output head has to see every position."""
    lengths: list[int] | None = None
    """Per sequence: how many tokens are not filling, where scales are to be of those alone."""

    @property
    def is_one_row(self) -> bool:
        """Whether this cannot be cut into smaller batches."""
        return self.ids.shape[0] == 1 and self.ends is None

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What the model is called with; masks are made here, so that none is kept.

        The mask is additive, 0 or the lowest number of ``dtype`` (sequences, 1, tokens, tokens):
        every attention of transformers that takes one takes this form.
        """
        inputs = {"input_ids": self.ids.to(device)}
        if self.ends is None or self.positions is None:
            return inputs
        place = torch.arange(self.ids.shape[1], device=device)
        ends = self.ends.to(device)
        seen = (place <= place[:, None]) & (place[:, None] < ends[:, None, :])
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        return inputs | {"attention_mask": mask[:, None], "position_ids": self.positions.to(device)}


@dataclass
class _Sequence:
    """Distinct tokens to run, and the rows that want something of them."""

    tokens: tuple[int, ...]
    rows: list[int] = field(default_factory=list)


@dataclass
class _Tree:
    """Tokens laid out branch after branch."""

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    scored: list[tuple[int, int, int]]
    """(place, target, row)"""
    rows: list[int]

    @property
    def is_chain(self) -> bool:
        return len(self.depths) == self.depths[-1] + 1


class PackedRows:
    """Rows to be scored, and the batches they make under a policy and a budget, made once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.wanted = [i for i, row in enumerate(rows) if row.n_scored > 0]
        self.longest = max((len(rows[i].tokens) - 1 for i in self.wanted), default=0)
        """Tokens of the longest sequence that is run."""
        self._plans: dict[tuple[str, int, int, bool], list[Batch]] = {}
        self._saved: dict[tuple[int, int], float] = {}

    def saved(self, budget: int, width: int = WIDTH, pairs: bool = False) -> float:
        """The share of the tokens of "padded", padding included, that "shared" does not run."""
        if (budget, width) not in self._saved:
            shared = self.batches("shared", budget, width=width, pairs=pairs)
            padded = _plan(self.rows, self.wanted, "padded", budget, width)  # seldom run: dropped
            sizes = [sum(batch.ids.numel() for batch in plan) for plan in (shared, padded)]
            self._saved[budget, width] = 1 - sizes[0] / max(1, sizes[1])
        return self._saved[budget, width]

    def batches(
        self,
        policy: str,
        budget: int,
        left: Sequence[int] | None = None,
        width: int = WIDTH,
        pairs: bool = False,
    ) -> list[Batch]:
        """The batches of a policy under a budget of tokens, padding included.

        Args:
            policy: a key of ``qbench.evaluation.tasks.BATCHING``.
            budget: a sequence longer than it is a batch of its own.
            left: only these rows.
            width: most tokens of a tree.
            pairs: whether they are to run two at a time, so that few should be of like size.
        """
        if left is not None:
            return _plan(self.rows, left, policy, budget, width, pairs)
        key = (policy, budget, width if policy == "shared" else 0, pairs)
        if key not in self._plans:
            for other in [other for other in self._plans if other[0] == policy]:
                del self._plans[other]  # one budget at a time is enough to keep
            self._plans[key] = _plan(self.rows, self.wanted, policy, budget, width, pairs)
        return self._plans[key]


def _plan(
    rows: Sequence[Row],
    wanted: Sequence[int],
    policy: str,
    budget: int,
    width: int,
    pairs: bool = False,
) -> list[Batch]:
    sequences = _distinct(rows, wanted)
    if policy == "shared":
        groups = _cut(sequences, width, budget)
    elif policy == "padded":
        groups = _continued(sequences)
    else:
        groups = [[sequence] for sequence in sequences]
    trees = [_grow(group, rows) for group in groups]
    trees.sort(key=lambda tree: (-len(tree.tokens), tree.rows[0]))
    one_by_one = policy == "one row"
    batches = []
    fill = _fill_in_pairs if pairs and not one_by_one else _fill
    for group in fill(trees, 1 if one_by_one else budget):
        batch = _batch(group, whole_head=one_by_one)
        if policy == "unshared":
            batch.lengths = [len(tree.tokens) for tree in group]
        batches.append(batch)
    return batches


def _distinct(rows: Sequence[Row], wanted: Sequence[int]) -> list[_Sequence]:
    """What is run, each once, in the order of its tokens; the last token of a row is not run."""
    found: dict[tuple[int, ...], _Sequence] = {}
    for i in wanted:
        tokens = tuple(rows[i].tokens[:-1])
        found.setdefault(tokens, _Sequence(tokens)).rows.append(i)
    return [found[tokens] for tokens in sorted(found)]


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return int(np.argmin(np.asarray(a[:size]) == np.asarray(b[:size])))


def _continued(sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """Groups in which each sequence continues the one before, next to which it was sorted."""
    groups: list[list[_Sequence]] = []
    for sequence in sequences:
        before = groups[-1][-1].tokens if groups else None
        if before is not None and sequence.tokens[: len(before)] == before:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _cut(sequences: list[_Sequence], width: int, budget: int) -> list[list[_Sequence]]:
    """Cut sorted sequences into trees of some ``width`` tokens, where the cut repeats least.

    A tree that overflows is cut in its second half, between the neighbours that have least in
    common: between two questions rather than between two options.
    """
    alike = [0] + [
        _alike(a.tokens, b.tokens) for a, b in zip(sequences, sequences[1:], strict=False)
    ]
    groups: list[list[_Sequence]] = []
    start = 0
    while start < len(sequences):
        sizes = [len(sequences[start].tokens)]
        most = min(budget, max(width, 2 * sizes[0]))
        stop = start + 1
        while stop < len(sequences):
            size = sizes[-1] + len(sequences[stop].tokens) - alike[stop]
            if size > most:
                break
            sizes.append(size)
            stop += 1
        if stop < len(sequences):
            late = [c for c in range(start + 1, stop + 1) if 2 * sizes[c - start - 1] >= sizes[-1]]
            stop = min(late, key=lambda c: (alike[c], -c))
        groups.append(sequences[start:stop])
        start = stop
    return groups


def _grow(sequences: list[_Sequence], rows: Sequence[Row]) -> _Tree:
    """Lay out sorted sequences branch after branch."""
    tree = _Tree([], [], [], [], [])
    branch: list[int] = []
    before: tuple[int, ...] = ()
    for sequence in sequences:
        kept = _alike(before, sequence.tokens)
        for place in branch[kept:]:
            tree.ends[place] = len(tree.tokens)
        new = range(len(tree.tokens), len(tree.tokens) + len(sequence.tokens) - kept)
        branch = [*branch[:kept], *new]
        tree.tokens.extend(sequence.tokens[kept:])
        tree.depths.extend(range(kept, len(sequence.tokens)))
        tree.ends.extend([0] * len(new))
        before = sequence.tokens
        for i in sequence.rows:
            scored = rows[i].tokens[len(rows[i].tokens) - rows[i].n_scored :]
            places = branch[len(branch) - len(scored) :]
            tree.scored.extend((p, t, i) for p, t in zip(places, scored, strict=True))
        tree.rows.extend(sequence.rows)
    for place in branch:
        tree.ends[place] = len(tree.tokens)
    return tree


def _fill(trees: list[_Tree], budget: int) -> Iterator[list[_Tree]]:
    """Longest first, as many at a time as the budget holds but at least one."""
    start = 0
    while start < len(trees):
        width = len(trees[start].tokens)
        stop = min(len(trees), start + max(1, budget // width))
        yield trees[start:stop]
        start = stop


def _fill_in_pairs(trees: list[_Tree], budget: int) -> list[list[_Tree]]:
    """As :func:`_fill`, or under a smaller budget where pairs then have less to wait for.

    Tried are the least budgets that make as many batches, and one more. A single batch under half
    of the budget stays one.
    """
    plain = list(_fill(trees, budget))
    if len(plain) == 1 and 2 * _size(plain[0]) < budget:
        return plain
    others = [_least(trees, budget, most) for most in (len(plain), len(plain) + 1)]
    return min([plain, *(list(_fill(trees, other)) for other in others)], key=_wait)


def _least(trees: list[_Tree], budget: int, most: int) -> int:
    """The least budget of no more than so many batches: a larger one never makes more."""
    low = 1
    while low < budget:
        middle = (low + budget) // 2
        if sum(1 for _ in _fill(trees, middle)) <= most:
            budget = middle
        else:
            low = middle + 1
    return low


def _size(trees: list[_Tree]) -> int:
    return len(trees) * len(trees[0].tokens)


def _wait(batches: list[list[_Tree]]) -> int:
    """Tokens until the last batch has run, where each pair takes as long as its larger one."""
    sizes = [_size(batch) for batch in batches]
    return sum(max(sizes[i : i + 2]) for i in range(0, len(sizes), 2))


def _batch(trees: list[_Tree], whole_head: bool) -> Batch:
    width = len(trees[0].tokens)
    ids = np.zeros((len(trees), width), dtype=np.int64)
    positions, ends = np.zeros_like(ids), np.tile(np.arange(1, width + 1), (len(trees), 1))
    scored: list[tuple[int, int, int]] = []
    for b, tree in enumerate(trees):
        n = len(tree.tokens)
        ids[b, :n], positions[b, :n], ends[b, :n] = tree.tokens, tree.depths, tree.ends
        scored.extend((b * width + place, token, row) for place, token, row in tree.scored)
    place, target, owner = (np.array(column) for column in zip(*sorted(scored), strict=True))
    wanted, index = np.unique(place, return_inverse=True)
    plain = all(tree.is_chain for tree in trees)
    return Batch(
        ids=torch.from_numpy(ids),
        wanted=torch.from_numpy(wanted),
        place=torch.from_numpy(index),
        target=torch.from_numpy(target),
        owner=owner,
        rows=[row for tree in trees for row in tree.rows],
        positions=None if plain else torch.from_numpy(positions),
        ends=None if plain else torch.from_numpy(ends),
        whole_head=whole_head,
    )
