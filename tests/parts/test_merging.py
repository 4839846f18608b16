"""Routes, weights and folds of merged cache entries."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import random_qkv
from torch import Tensor

from saccade.cache.segment import Rectangle
from saccade.cache.slots import Slots
from saccade.core import Selection
from saccade.ops.attend import attend
from saccade.parts import merging
from saccade.parts.merging import (
    COUNT,
    WEIGHTS,
    class_sums,
    drop,
    fold,
    fold_directions,
    gaussian,
    merge_entries,
    normalised,
    to_nearest,
)

N = 23


def parted(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, values `(B, 2, N, 8)`, who stays and who leaves; heads differ in numbers."""
    _, k, v = random_qkv(N, batch=batch, seed=seed)
    draw = torch.rand(batch, 2, N, generator=torch.Generator().manual_seed(seed + 1))
    stay = draw < torch.tensor([0.3, 0.5])[None, :, None]
    stay[..., 0] = True
    return k, v, stay, ~stay & (draw < 0.9)


@pytest.mark.parametrize("pairs", [1 << 22, 40])
def test_each_goes_to_the_survivor_with_the_nearest_key(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "PAIRS", pairs)
    k, _, stay, leaving = parted()
    into, similarity = to_nearest(stay, leaving, k)
    cosines = torch.nn.functional.cosine_similarity(k.unsqueeze(3), k.unsqueeze(2), dim=-1)
    best = cosines.masked_fill(~stay.unsqueeze(2), -torch.inf).max(-1)
    assert torch.equal(into[leaving], best.indices[leaving])
    assert (similarity[leaving] - best.values[leaving]).abs().max() < 1e-12
    assert torch.equal(into[stay], torch.arange(N).expand_as(into)[stay]) and (similarity[stay] == 1).all()
    assert (into[~stay & ~leaving] == N).all()


def test_values_count_only_where_both_are_alike() -> None:
    """The product of two negative cosines is positive and says nothing good."""
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]).double()[None, None]
    v = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]).double()[None, None]
    stay = torch.tensor([[[True, True, False]]])
    into, similarity = to_nearest(stay, ~stay, k, v)
    # cosines -1 and -0.6 with both survivors, keys and values alike: sizes 1 and 0.36, so the second is less bad
    assert into.tolist() == [[[0, 1, 1]]]
    assert similarity[0, 0, 2] == pytest.approx(-0.36)


def test_ties_go_to_the_lower_slot_and_nobody_leaving_is_fine() -> None:
    k = torch.ones(1, 1, 4, 3)
    stay = torch.tensor([[[False, True, True, False]]])
    assert to_nearest(stay, ~stay, k)[0].tolist() == [[[1, 1, 2, 1]]]
    assert to_nearest(torch.ones_like(stay), ~torch.ones_like(stay), k)[0].tolist() == [[[0, 1, 2, 3]]]


def classes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v, stay, leaving = parted(seed=3)
    return (k, v, *to_nearest(stay, leaving, k))


RULES = {
    "average": lambda c, members, cosines: (c + members.sum(0)) / (len(members) + 1),
    "pivotal": lambda c, members, cosines: (c + ((members + c) / 2).sum(0)) / (len(members) + 1),
    "cosine": lambda c, members, cosines: (c + (cosines[:, None] * members).sum(0)) / (len(members) + 1),
    "exponential": lambda c, members, cosines: (
        (torch.e * c + (cosines.exp()[:, None] * members).sum(0)) / (torch.e + cosines.exp().sum())
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_those_of_the_equations(rule: str) -> None:
    _, v, into, similarity = classes()
    folded = fold(v, into, WEIGHTS[rule](into, similarity))
    checked = 0
    for b, h, c in (into == torch.arange(N)).nonzero().tolist():
        members = (into[b, h] == c) & (torch.arange(N) != c)
        expected = RULES[rule](v[b, h, c], v[b, h, members], similarity[b, h, members])
        assert (folded[b, h, c] - expected).abs().max() < 1e-12
        checked += int(members.sum()) > 1
    assert checked > 3


@pytest.mark.parametrize("rule", WEIGHTS)
def test_duplicates_leave_their_survivor_as_it_is(rule: str) -> None:
    _, v, into, _ = classes()
    real = into < N
    same = v.gather(2, into.clamp(max=N - 1).unsqueeze(-1).expand_as(v))
    weights = WEIGHTS[rule](into, real.double())
    assert (fold(same, into, weights) - same)[into == torch.arange(N)].abs().max() < 1e-12
    assert (fold_directions(same, into, normalised(weights, into)) - same)[into == torch.arange(N)].abs().max() < 1e-12


def test_survivors_without_members_keep_every_bit() -> None:
    k, _, stay, _ = parted()
    k = k.to(torch.bfloat16)
    into, similarity = to_nearest(stay, torch.zeros_like(stay), k)
    for weights in (WEIGHTS["pivotal"](into, similarity), gaussian(into, k, 5.0), normalised(torch.rand_like(similarity), into)):
        assert torch.equal(fold(k, into, weights)[stay], k[stay])
        assert torch.equal(fold_directions(k, into, weights)[stay], k[stay])


def test_gaussian_goes_from_the_pivot_alone_to_the_plain_mean() -> None:
    k, v, into, similarity = classes()
    survivors = into == torch.arange(N)
    assert (fold(v, into, gaussian(into, k, 1e-3)) - v)[survivors].abs().max() < 1e-12
    mean = fold(v, into, WEIGHTS["average"](into, similarity))
    assert (fold(v, into, gaussian(into, k, 1e6)) - mean)[survivors].abs().max() < 1e-9
    b, h, e = ((into != torch.arange(N)) & (into < N)).nonzero()[0].tolist()
    c = int(into[b, h, e])
    g = torch.exp(-(k[b, h] - k[b, h, c]).square().sum(-1) / (2 * 2.0**2)) * (into[b, h] == c)
    assert gaussian(into, k, 2.0)[b, h, e] == pytest.approx(float(g[e] / g.sum()))


def test_directions_and_norms_are_averaged_apart() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0]]).double()[None, None]
    into = torch.tensor([[[0, 0]]])
    merged = fold_directions(x, into, torch.full((1, 1, 2), 0.5).double())[0, 0, 0]
    assert (merged - 3 * torch.tensor([1.0, 1.0]).double() / 2**0.5).abs().max() < 1e-12


def test_the_zero_class_takes_nothing_along() -> None:
    _, v, into, similarity = classes()
    members = (into != torch.arange(N)) & (into < N)
    into = drop(into, members)
    assert torch.equal(fold(v, into, WEIGHTS["average"](into, similarity))[into < N], v[into < N])
    assert (class_sums(torch.ones(into.shape), into)[into < N] == 1).all()


def stored(k: Tensor, v: Tensor, **side: Tensor) -> Slots:
    positions = torch.arange(k.shape[2], dtype=torch.int32).expand(k.shape[:3])
    return Slots(Rectangle(k, v, {"positions": positions, **side}))


def test_entries_are_counted_again_and_again() -> None:
    k, v, _ = random_qkv(6, kv_heads=1)
    kv = stored(k[:, :1], v[:, :1])
    into = torch.tensor([[[0, 0, 2, 2, 6, 5]]])
    merge_entries(kv, into, kv.keys, kv.values)
    assert kv.side["positions"].tolist() == [[[0, 2, 5]]] and kv.side[COUNT].tolist() == [[[2, 2, 1]]]
    merge_entries(kv, torch.tensor([[[1, 1, 2]]]), kv.keys, kv.values)
    assert kv.side["positions"].tolist() == [[[2, 5]]] and kv.side[COUNT].tolist() == [[[4, 1]]]
    # an entry that came since has count 0 there, and is one token
    kv.side[COUNT] = torch.tensor([[[4, 0]]], dtype=torch.int32)
    merge_entries(kv, torch.tensor([[[0, 0]]]), kv.keys, kv.values)
    assert kv.side[COUNT].tolist() == [[[5]]]


def test_heads_may_keep_different_numbers() -> None:
    k, v, into, similarity = classes()
    kv = stored(k[:1], v[:1])
    weights = WEIGHTS["average"](into, similarity)
    merge_entries(kv, into[:1], fold(k, into, weights)[:1], fold(v, into, weights)[:1])
    counts = (into[0] == torch.arange(N)).sum(-1)
    assert counts[0] != counts[1] and kv.valid is not None
    assert torch.equal(kv.valid.sum(-1)[0], counts)


def test_merged_duplicates_with_their_counts_attend_like_all_of_them() -> None:
    """What a log-count bias would do: with it a set of equal entries weighs as much as its members did."""
    q, k, v = random_qkv(12, query_heads=1, kv_heads=1)
    origin = torch.tensor([0, 0, 2, 3, 3, 3, 6, 7, 7, 9, 10, 10])
    k, v = k[:, :, origin], v[:, :, origin]
    into = origin[None, None]
    weights = WEIGHTS["average"](into, torch.ones(1, 1, 12).double())
    kv = stored(k, v)
    merge_entries(kv, into, fold(k, into, weights), fold(v, into, weights))
    n = kv.length
    every = Selection.from_positions(torch.arange(n).expand(1, 1, 1, n), n_q=1, n_k=n)
    weighted = Selection(
        n_q=1, n_k=n, block_q=1, block_k=1, tokens=every.tokens, token_counts=every.token_counts,
        starts=every.starts, start_counts=every.start_counts, log_weight=kv.side[COUNT].float().log().unsqueeze(2),
    )  # fmt: skip
    dense = attend(q[:, :, -1:], k, v).out
    assert (attend(q[:, :, -1:], kv.keys, kv.values, weighted, impl="reference").out - dense).abs().max() < 1e-6
    assert (attend(q[:, :, -1:], kv.keys, kv.values).out - dense).abs().max() > 1e-3
