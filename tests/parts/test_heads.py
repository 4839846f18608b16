"""Reducing scores over heads, and unions of what heads chose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.parts.heads import BY_GROUP, REDUCTIONS, check_reduction, interleave_ranks, read_union, reduce_heads, union_ids
from saccade.parts.pick import pick_best

SCORES = torch.tensor([[1.0, 5.0, 0.0], [4.0, 2.0, 0.0], [7.0, 0.0, 3.0], [0.0, 8.0, 3.0]])[None]  # 4 query, 2 key heads


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_none_leaves_every_head_its_own_scores() -> None:
    assert torch.equal(reduce_heads(SCORES, 2, "none"), SCORES)


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("group_max", [[4.0, 5.0, 0.0], [7.0, 8.0, 3.0]]),
        ("group_sum", [[5.0, 7.0, 0.0], [7.0, 8.0, 6.0]]),
        ("max", [[7.0, 8.0, 3.0]]),
    ],
)
def test_over_a_group_or_over_all_heads(how: str, want: list[list[float]]) -> None:
    assert torch.equal(reduce_heads(SCORES, 2, how), torch.tensor([want]))


def test_a_vote_counts_every_head_the_same() -> None:
    voted = reduce_heads(SCORES, 2, "vote")
    assert torch.allclose(voted, SCORES.softmax(-1).sum(1, keepdim=True)) and float(voted.sum()) == pytest.approx(4)
    louder = torch.cat([SCORES[:, :3], SCORES[:, 3:] + 100], 1)
    assert torch.allclose(reduce_heads(louder, 2, "vote"), voted)


@pytest.mark.parametrize("how", BY_GROUP)
def test_without_groups_nothing_changes(how: str) -> None:
    assert torch.equal(reduce_heads(SCORES, 4, how), SCORES)


@pytest.mark.parametrize("how", sorted(REDUCTIONS))
def test_rows_of_a_batch_do_not_mix(how: str) -> None:
    scores = random(3, 6, 40)
    together = reduce_heads(scores, 2, how)
    assert torch.equal(together, torch.cat([reduce_heads(row, 2, how) for row in scores.split(1)]))


# -- ranks in turn ------------------------------------------------------------------------------------------------------


def named_in_turn(scores: Tensor, count: int) -> list[int]:
    """The definition, as a loop, for scores (H, U)."""
    order = [sorted(range(scores.shape[1]), key=lambda u, row=row: (-float(row[u]), u)) for row in scores]
    read: list[int] = []
    for rank in range(count):
        for head in order:
            if head[rank] not in read:
                read.append(head[rank])
    return read[:count]


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_the_best_by_turn_are_the_first_named(count: int) -> None:
    scores = random(3, 6, 40)
    scores[1] = scores[1].round()  # ties: the lower unit is named first
    found = pick_best(interleave_ranks(scores, count), count)
    assert found.shape == (3, 1, count)
    for row, got in zip(scores, found, strict=True):
        assert got[0].tolist() == sorted(named_in_turn(row, count))
    assert torch.equal(found, pick_best(reduce_heads(scores, 2, "rank_interleave"), count))


def test_no_head_is_served_before_the_others() -> None:
    """Heads that agree on nothing get equal shares, where reading head by head would fill up on the first one."""
    scores = torch.full((1, 4, 40), -1.0)
    for head in range(4):
        scores[0, head, 10 * head : 10 * head + 10] = torch.arange(10, 0, -1.0)
    chosen = pick_best(interleave_ranks(scores, 12), 12)[0, 0]
    assert chosen.tolist() == [10 * head + rank for head in range(4) for rank in range(3)]


def test_units_no_head_names_are_never_chosen_before_others() -> None:
    turns = interleave_ranks(torch.tensor([[[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0]]]), 2)
    assert turns.tolist() == [[[0.0, -2.0, -torch.inf, -3.0]]]


# -- unions -------------------------------------------------------------------------------------------------------------


def test_union_of_a_group_with_counts() -> None:
    ids = torch.tensor([[[4, 1, 9], [1, 7, 0], [2, 2, 2], [5, 3, 8]]])
    counts = torch.tensor([[2, 2, 3, 1]])
    found, sizes = union_ids(ids, 2, 10, counts)
    assert found.tolist() == [[[1, 4, 7], [2, 5, 10]]] and sizes.tolist() == [[3, 2]] and found.dtype == torch.int32
    found, sizes = union_ids(ids, 1, 9)
    assert found.tolist() == [[[0, 1, 2, 3, 4, 5, 7, 8]]] and sizes.tolist() == [[8]]


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_union_reads_what_any_head_named(lists: int) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-2, 53, (2, 6, 9), generator=g)
    counts = torch.randint(0, 10, (2, 6), generator=g)
    want = torch.zeros(2, lists, 50, dtype=torch.bool)
    for b in range(2):
        for h in range(6):
            for i in ids[b, h, : counts[b, h]].tolist():
                if 0 <= i < 50:
                    want[b, h * lists // 6, i] = True
    selection = read_union(ids, lists, 50, counts)
    assert torch.equal(selection.dense_mask()[:, :, 0], want)
    assert torch.equal(selection.token_counts.squeeze(-1), want.sum(-1, dtype=torch.int32))


def test_union_of_nothing() -> None:
    ids, counts = union_ids(torch.zeros(1, 2, 0, dtype=torch.int64), 1, 5)
    assert ids.shape == (1, 1, 0) and counts.tolist() == [[0]]


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="quest got reduce='mean': expected one of none, group_max, group_sum"):
        check_reduction("quest", "mean")
    with pytest.raises(ValueError, match="got reduce='none': expected one of vote, max"):
        check_reduction("tokenselect", "none", ("vote", "max"))
