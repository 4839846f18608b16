"""The first and newest keys, and the tail that is read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.parts.ends import force_ends, read_with_tail
from saccade.parts.pick import pick_best


@pytest.mark.parametrize(
    ("count", "want"), [(5, [0, 1, 4, 8, 9]), (3, [0, 1, 9]), (2, [0, 1]), (1, [0]), (10, list(range(10))), (99, list(range(10)))]
)
def test_ends_come_first_sinks_before_newest(count: int, want: list[int]) -> None:
    scores = torch.tensor([0.0, 0, 3, 1, 9, 2, 1, 0, -5, -5]).expand(2, 3, -1).clone()
    found = pick_best(force_ends(scores, count, sinks=2, recent=2), count)
    assert bool((found == torch.tensor(want)).all())


def test_nothing_is_forced_unasked() -> None:
    scores = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(force_ends(scores.clone(), 3, sinks=0, recent=0), scores)


def test_scores_are_changed_where_they_lie_and_nothing_is_asked_of_them() -> None:
    """Views and fills alone: no copy of a row, and no value that a host would wait for."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    ran: set[object] = set()
    scores = torch.zeros(2, 3, 20)
    with Recorded():
        assert force_ends(scores, 10, sinks=2, recent=3) is scores
    assert ran <= {torch.ops.aten.slice, torch.ops.aten.alias, torch.ops.aten.fill_}
    assert bool((scores.isinf().nonzero()[:, 2].view(6, 5) == torch.tensor([0, 1, 17, 18, 19])).all())


@pytest.mark.parametrize("begin", [0, 4, 6, 9])
def test_a_tail_is_read_whole_and_listed_keys_with_their_weight(begin: int) -> None:
    ids = torch.tensor([[[0, 2, 3], [1, 10, 10]]], dtype=torch.int32).clamp(max=10)
    ids = ids.masked_fill(ids >= begin, 10).sort(-1).values
    weight = torch.arange(6.0).view(1, 2, 3)
    s = read_with_tail(ids, begin, 10, weight)
    for head in range(2):
        want = {*range(begin, 10), *(i for i in ids[0, head].tolist() if i < 10)}
        assert set(s.dense_mask()[0, head, 0].nonzero().flatten().tolist()) == want
    assert s.log_weight is not None and torch.equal(s.log_weight.squeeze(2), weight)
    assert s.density() == s.dense_mask().double().mean()


def test_a_tail_needs_a_key() -> None:
    with pytest.raises(ValueError, match="expected a place from 0 to 9"):
        read_with_tail(torch.zeros(1, 1, 0, dtype=torch.int32), 10, 10)
