"""What is counted: the pairs that ran, in as many passes as a method likes, against one dense pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.attach import stats
from saccade.attach.stats import computed_pairs
from saccade.core import HeadLayout, Info, LayerContext, Prefill, Selection, merge
from saccade.core.plan import Plan
from tests.contract.harness import llama, logits, tokens
from tests.core.cases import make_one_list

N_Q, N_K = 21, 30


def seen(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    return k_positions.unsqueeze(-2) <= q_positions.unsqueeze(-1)


def permuted(n: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N_K, generator=generator)[:n] for _ in range(2 * heads)]).view(2, heads, n)


@pytest.mark.parametrize("given", ["q", "k", "both", "neither"])
@pytest.mark.parametrize("heads", [1, 2])
def test_pairs_of_rows_and_keys_in_any_order(given: str, heads: int) -> None:
    options: dict[str, Any] = {}
    q, k = torch.arange(N_K - N_Q, N_K)[None, None], torch.arange(N_K)[None, None]
    if given in ("q", "both"):
        options["q_positions"] = q = permuted(N_Q, heads, 0)
    if given in ("k", "both"):
        options["k_positions"] = k = permuted(N_K, heads, 1)
    dense = float(seen(q, k).sum((-1, -2)).double().mean())
    assert computed_pairs(N_Q, N_K, None, options) == pytest.approx(dense)
    generator = torch.Generator().manual_seed(2)
    tiles = torch.rand(2, 4, 6, 8, generator=generator) < 0.4
    single = torch.rand(2, 4, 6, N_K, generator=generator) < 0.2
    selection = Selection.from_block_mask(tiles, block_q=4, block_k=4, n_q=N_Q, n_k=N_K, causal=False)
    mixed = Selection.from_parts(
        n_q=N_Q, n_k=N_K, block_q=4, block_k=4, starts=selection.starts,
        tokens=torch.where(single, torch.arange(N_K), N_K), causal=given == "neither",
    )  # fmt: skip
    listed = mixed.coverage().repeat_interleave(4, 2)[:, :, :N_Q]
    visible = seen(q, k).repeat_interleave(4 // seen(q, k).shape[1], 1)
    assert computed_pairs(N_Q, N_K, mixed, options) == pytest.approx(float((listed & visible).sum((-1, -2)).double().mean()))
    if options:
        loose = computed_pairs(N_Q, N_K, mixed, {**options, "causal": False})
        assert loose == pytest.approx(float(listed.sum((-1, -2)).double().mean()))


@pytest.mark.parametrize("seed", range(6))
def test_pairs_of_tiles_that_begin_anywhere(seed: int) -> None:
    """Sizes that tiles do not fill, tiles at odd places, keys that move in their neighbourhood, as permutations in segments do."""
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k, block = 23, 37, 8

    def moved(n: int, first: int) -> Tensor:
        near = torch.arange(n) + 12 * torch.rand(2, 4, n, generator=generator)
        return near.argsort(-1).argsort(-1) + first

    q, k = moved(n_q, n_k - n_q), moved(n_k, 0)
    steps = torch.randint(block, 2 * block, (2, 2, 6, 4), generator=generator)
    tokens = torch.where(torch.rand(2, 2, 6, n_k, generator=generator) < 0.2, torch.arange(n_k), n_k)
    mixed = Selection.from_parts(
        n_q=n_q, n_k=n_k, block_q=4, block_k=block, starts=(steps.cumsum(-1) - block).clamp(max=n_k), tokens=tokens, causal=False
    )
    listed = mixed.coverage().repeat_interleave(4, 2)[:, :, :n_q].repeat_interleave(2, 1)
    for options in ({"q_positions": q, "k_positions": k}, {"q_positions": q}, {"k_positions": k}):
        rows = options.get("q_positions", torch.arange(n_k - n_q, n_k).expand(2, 4, -1))
        keys = options.get("k_positions", torch.arange(n_k).expand(2, 4, -1))
        right = float((listed & seen(rows, keys)).sum((-1, -2)).double().mean())
        assert computed_pairs(n_q, n_k, mixed, options) == pytest.approx(right)


@pytest.mark.parametrize("order", ["kept", "moved"])
@pytest.mark.parametrize("heads", [1, 4])
def test_pairs_of_one_token_list_for_all_tiles(order: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = make_one_list(n_q=N_Q, n_k=N_K, causal=False, block_q=4, block_k=4, batch=2, heads=heads, weighted=False, seed=5)
    assert bool(both.shared.token_counts.any())
    q, k = torch.arange(N_K - N_Q, N_K)[None, None], torch.arange(N_K)[None, None] * 2 // 3
    if order == "moved":
        q, k = permuted(N_Q, 2, 0), permuted(N_K, 2, 1)
        monkeypatch.setattr(stats, "LOOKED_INTO", 100)  # a few tiles at a time
    options = {"q_positions": q, "k_positions": k}
    listed = both.written.coverage().repeat_interleave(4, 2)[:, :, :N_Q]
    listed, visible = (x.repeat_interleave(4 // x.shape[1], 1) for x in (listed, seen(q, k)))
    right = float((listed & visible).sum((-1, -2)).double().mean())
    for selection in (both.shared, both.written):
        assert computed_pairs(N_Q, N_K, selection, options) == pytest.approx(right)
        assert computed_pairs(N_Q, N_K, replace(selection, causal=True), {}) == pytest.approx(
            float(replace(both.written, causal=True).dense_mask().sum((-1, -2)).double().mean())
        )


def test_without_causality_every_pair_counts() -> None:
    assert computed_pairs(N_Q, N_K, None, {"causal": False}) == N_Q * N_K
    assert computed_pairs(N_Q, N_K, None, {}) == N_Q * N_K - N_Q * (N_Q - 1) / 2


@dataclass(frozen=True, kw_only=True)
class TwoPasses(Prefill):
    """Dense attention in parts: the keys cut in two, or the heads."""

    heads: bool = False
    info = Info(slug="two-passes", phase="prefill")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2])

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, group = k.shape[2], q.shape[1] // k.shape[1]
        if self.heads:
            pieces = zip(q.split(group, 1), k.split(1, 1), v.split(1, 1), strict=True)
            return torch.cat([ctx.attend(*piece, None) for piece in pieces], 1)
        old = torch.arange(n) < n // 3
        parts = [
            ctx.partial(q, k, v, Selection.from_token_mask(mask.expand(1, 1, -(-n // 16), n), block_q=16, n_q=n)) for mask in (old, ~old)
        ]
        return merge(*parts).out


@pytest.mark.parametrize("heads", [False, True])
def test_passes_add_up_to_one_dense_pass(heads: bool) -> None:
    ids = tokens(2, 70)
    with saccade.attach(llama()) as handle:
        dense = logits(llama(), ids)
    with saccade.attach(llama(), prefill=TwoPasses(heads=heads)) as handle:
        found = logits(llama(), ids)
        assert handle.stats().prefill_density == pytest.approx(1.0)
    assert (found - dense).abs().max() < 1e-6


def context(**changes: Any) -> LayerContext:
    layout = HeadLayout(query_heads=2, kv_heads=1, head_dim=4, value_dim=4)
    return LayerContext(layer=1, layers=2, layout=layout, scale=0.5, attend=lambda q, k, v, s: q, **changes)


def test_a_context_without_partial_says_so() -> None:
    with pytest.raises(ValueError, match="make it with partial="):
        context().partial(None, None, None, None)


def test_a_method_inside_another_gets_its_own_plan() -> None:
    def plan(slug: str) -> Plan:
        return Plan(slug=slug, spec=slug, fingerprint="", tensors={"layer.1.x": torch.ones(1)}, notes={})

    outer = context(plan=plan("outer"), plans={"outer": plan("outer"), "inner": plan("inner")}, state={"kept": 1})
    inner = outer.inside("inner")
    assert inner.plan is not None and inner.plan.slug == "inner" and inner.state is outer.state
    assert outer.inside("dense").plan is None and replace(outer).plan is outer.plan


def test_steps_that_are_not_waited_for_are_counted_later_and_hold_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where every list would stay there until somebody asks."""
    found = {}
    for waits in (False, True):
        monkeypatch.setattr(stats, "_waits", lambda selection, waits=waits: waits)
        pairs, lists = stats.PairCount(), []
        for step in range(stats.WAITING + 3):
            tokens = torch.arange(0, 2 * (step % 40 + 1), 2).expand(2, 3, 1, -1)
            selection = Selection.from_parts(n_q=1, n_k=100, block_q=1, tokens=tokens)
            lists.append(weakref.ref(selection.tokens))
            pairs.add_call(0.5, 1, 100, selection, {})
        del selection, tokens
        assert len(pairs.waiting) == (3 if waits else 0) and not any(ref() is not None for ref in lists)
        found[waits] = pairs.computed
        assert not pairs.waiting
    assert found[True] == found[False] == sum(0.5 * (step % 40 + 1) for step in range(stats.WAITING + 3))
