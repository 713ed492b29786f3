"""Trees of rows, against brute force: who sees whom, what is run, where a tree is cut."""

import pytest
import torch

from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.tasks import BATCHING


def questions(seed=0, n=12):
    """Rows of ``n`` questions with options; all begin alike, some are asked twice."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 99, (size,), generator=generator).tolist()

    rows = []
    for _ in range(n):
        context = [1, 7, *tokens(3, 20)]
        for _ in range(4):
            option = tokens(1, 6)
            rows.append(Row([*context, *option], len(option)))
        rows.append(Row([*context, 5], 1))
    return [*rows, rows[3], Row([1, 2], 0), Row(rows[0].tokens, 2)]


def paths(batch):
    """(sequence, place) -> the tokens that it sees by ``Batch.inputs``, itself last."""
    inputs = batch.inputs(torch.device("cpu"), torch.float32)
    n, size = batch.ids.shape
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = inputs.get("attention_mask")
    seen = causal.expand(n, size, size) if mask is None else mask[:, 0] == 0
    position = inputs.get("position_ids", torch.arange(size).expand(n, size))
    found = {}
    for b in range(n):
        for j in range(size):
            own = seen[b, j].nonzero().flatten()
            assert position[b, own].tolist() == list(range(len(own))), "depth is what comes before"
            found[b, j] = batch.ids[b, own].tolist()
    return found


@pytest.mark.parametrize("policy", BATCHING)
@pytest.mark.parametrize("budget", [1, 40, 64, 10_000])
def test_every_scored_token_sees_exactly_what_stands_before_it_in_its_row(policy, budget):
    rows = questions()
    scored = {i: [] for i in range(len(rows))}
    for batch in PackedRows(rows).batches(policy, budget):
        seen, size = paths_of_real(batch), batch.ids.shape[1]
        for k, target, row in zip(batch.place, batch.target, batch.owner, strict=True):
            b, j = divmod(int(batch.wanted[k]), size)
            scored[int(row)].append([*seen[b, j], int(target)])
    for row, found in zip(rows, scored.values(), strict=True):
        first = len(row.tokens) - row.n_scored
        expected = [list(row.tokens[: k + 1]) for k in range(first, len(row.tokens))]
        assert sorted(found, key=len) == expected


def paths_of_real(batch):
    """Like ``paths``, where filling sees itself alone or stands behind what is scored."""
    if batch.ends is not None:
        place = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)
        filling = (batch.ids == 0) & (batch.positions == 0) & (place > 0)
        assert (batch.ends[filling] == place[filling] + 1).all()
    return paths(batch)


def test_a_tree_holds_every_distinct_beginning_once():
    rows = questions()
    distinct = {
        tuple(row.tokens[:k]) for row in rows if row.n_scored for k in range(1, len(row.tokens))
    }
    (batch,) = PackedRows(rows).batches("shared", 10_000, width=10_000)
    assert batch.ids.shape == (1, len(distinct))
    padded = PackedRows(rows).batches("padded", 10_000)
    assert sum(b.ids.numel() for b in padded) > 2 * len(distinct)


@pytest.mark.parametrize("policy", BATCHING)
def test_no_batch_exceeds_the_budget_unless_it_is_one_row(policy):
    batches = PackedRows(questions()).batches(policy, 50)
    assert all(b.ids.numel() <= 50 or b.is_one_row for b in batches)
    rows = sorted(row for b in batches for row in b.rows)
    assert rows == [i for i, row in enumerate(questions()) if row.n_scored]


def test_questions_are_not_cut_apart_where_there_is_room_for_them():
    """Options of 8 tokens behind contexts of 20: 52 tokens a question, two to a tree of 120."""
    rows = []
    for q in range(6):
        context = [1, *range(100 * q + 10, 100 * q + 29)]
        rows += [Row([*context, *range(k, k + 9)], 9) for k in (1000, 2000, 3000, 4000)]
    batches = PackedRows(rows).batches("shared", 120, width=120)
    assert [sorted({row // 4 for row in b.rows}) for b in batches] == [[0, 1], [2, 3], [4, 5]]
    assert all(b.ids.numel() == 1 + 2 * (19 + 4 * 8) for b in batches)


def test_rows_that_fit_no_tree_are_run_alone_without_a_mask():
    long = Row(list(range(3, 90)), 2)
    short = [Row([1, 5, 6, k], 1) for k in (7, 8, 9)]
    alone, chain = PackedRows([long, *short]).batches("shared", 20)
    assert alone.is_one_row and alone.rows == [0] and alone.ids.shape == (1, 86)
    assert chain.ends is None and chain.ids.tolist() == [[1, 5, 6]]


def test_prompts_longer_than_a_tree_is_wide_share_what_they_begin_with():
    """Four options behind 300 tokens, twice: one tree each, though trees are 64 wide."""
    contexts = [list(range(first, first + 300)) for first in (1000, 2000)]
    rows = [Row([*c, *range(k, k + 5)], 5) for c in contexts for k in (10, 20, 30, 40)]
    packed = PackedRows(rows)
    trees = packed.batches("shared", 700, width=64)
    assert [b.ids.shape for b in trees] == [(2, 300 + 4 * 4)]
    assert packed.saved(700, 64) == pytest.approx(1 - 2 * 316 / (8 * 304))
    assert all(b.is_one_row for b in packed.batches("shared", 304, width=64))


def test_unshared_rows_are_whole_and_tell_how_long_they_are():
    packed = PackedRows(questions())
    found = packed.batches("unshared", 64)
    ran = []
    for batch in found:
        assert batch.ends is None and not batch.whole_head and batch.lengths is not None
        for ids, length in zip(batch.ids, batch.lengths, strict=True):
            assert (ids[:length] > 0).all() and not ids[length:].any()
            ran.append(tuple(ids[:length].tolist()))
    assert sorted(ran) == sorted({tuple(packed.rows[i].tokens[:-1]) for i in packed.wanted})
    assert any(min(batch.lengths or []) < batch.ids.shape[1] for batch in found)
    assert all(b.lengths is None for b in packed.batches("padded", 64))
    whole = PackedRows(questions()).batches("one row", 64)
    assert {b.ids.shape[0] for b in whole} == {1} and all(b.whole_head for b in whole)


def sizes(rows, budget, pairs):
    return [len(b.ids) for b in PackedRows(rows).batches("padded", budget, pairs=pairs)]


def test_batches_that_run_two_at_a_time_come_in_pairs_of_like_size():
    rows = [Row([k, *range(100, 110)], 2) for k in range(1, 11)]  # ten rows of ten tokens
    assert sizes(rows, 60, pairs=False) == [6, 4] and sizes(rows, 60, pairs=True) == [5, 5]
    assert sizes(rows, 160, pairs=False) == [10] and sizes(rows, 160, pairs=True) == [5, 5]
    assert sizes(rows[:9], 40, pairs=True) == [4, 4, 1]  # three and three would wait for the last
    assert sizes(rows[:7], 160, pairs=True) == [7]  # under half of the budget


@pytest.mark.parametrize("policy", ["shared", "padded", "unshared"])
@pytest.mark.parametrize("budget", [12, 33, 50, 120, 1000])
def test_pairs_never_wait_longer_than_without_pairing(policy, budget):
    packed = PackedRows(questions())

    def wait(pairs):
        ran = [b.ids.numel() for b in packed.batches(policy, budget, pairs=pairs)]
        return sum(max(ran[i : i + 2]) for i in range(0, len(ran), 2))

    assert wait(True) <= wait(False)
    scored = [b.rows for b in packed.batches(policy, budget, pairs=True)]
    assert sorted(sum(scored, [])) == packed.wanted


def test_batches_are_made_once_and_the_same_every_time():
    packed = PackedRows(questions())
    assert packed.batches("shared", 64) is packed.batches("shared", 64)
    again = PackedRows(questions()).batches("shared", 64)
    for a, b in zip(packed.batches("shared", 64), again, strict=True):
        assert torch.equal(a.ids, b.ids) and a.rows == b.rows


def test_longest_counts_what_is_run():
    assert PackedRows(questions(n=1)).longest == max(len(r.tokens) - 1 for r in questions(n=1))
    assert PackedRows([]).longest == 0 and PackedRows([]).batches("shared", 9) == []
