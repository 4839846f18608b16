"""tokenselect: the soft vote, choices that are read again, chunks of a prompt, and tokens numbered anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.decode.harness import answer, best, logits, needle, pocket, tensors
from tests.methods.decode.stack import listed, over, stack_context, worst
from torch import Tensor

import saccade
from saccade.core import LayerContext, Rotary, Selection
from saccade.methods import build
from saccade.methods.decode.tokenselect import TokenSelect
from saccade.parts.rotary import turn

SMALL = TokenSelect(sinks=4, local=10, budget=20, chunk=16)


def step(
    method: TokenSelect, q: Tensor, k: Tensor, v: Tensor, state: dict[str, Any] | None = None, **more: Any
) -> tuple[Tensor, Selection | None, float]:
    shared: dict[str, Any] = {}
    pairs: list[float] = []
    ctx = stack_context(3, 8, q, k, v, shared, pairs, state={} if state is None else state, **more)
    out = method.attend(ctx, q, k, v)
    return out, shared.get("selections", {}).get(3), sum(pairs)


def voted(q: Tensor, k: Tensor, low: int, high: int, count: int) -> Tensor:
    """The `count` tokens of [low, high) with the most votes, bool `(B, n)`; q `(B, Hq, m, D)`."""
    scores = (logits(q.mean(2, keepdim=True), k[:, :, low:high]) * q.shape[-1] ** -0.5).softmax(-1).sum(1)
    mask = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    mask[:, low:high] = best(scores, count)
    return mask


# -- choosing -----------------------------------------------------------------------------------------------------------


def test_sinks_local_tokens_and_the_winners_of_the_vote_are_read() -> None:
    q, k, v = tensors(3, 6, 2, 120, 16)
    out, chosen, pairs = step(SMALL, q, k, v)
    mask = voted(q, k, 4, 110, 20)
    mask[:, :4] = mask[:, 110:] = True
    assert chosen is not None and chosen.heads == 1 and torch.equal(listed(chosen, 1)[:, 0], mask)
    assert worst(out, over((q, k, v), mask[:, None].expand(-1, 6, -1))) < 1e-13
    assert pairs == 34 + 106 / 2, "106 scores without values are half the work"


def test_a_vote_hears_one_head_among_loud_ones() -> None:
    """Five heads with large and unrelated logits, one with a clear wish: summing logits loses it."""
    g = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(1, 6, 300, generator=g, dtype=torch.float64)
    scores[0, 2] = 0.1 * torch.randn(300, generator=g, dtype=torch.float64)
    scores[0, 2, 77] = 10.0
    q, k = torch.eye(6, dtype=torch.float64)[None, :, None] * 6**0.5, scores.mT.unsqueeze(1).contiguous()
    _, chosen, _ = step(TokenSelect(sinks=4, local=10, budget=8), q, k, k)
    assert chosen is not None and 77 in chosen.tokens.flatten().tolist()
    assert 77 not in scores[:, :, 4:290].sum(1).topk(8).indices.add(4).flatten().tolist()


def test_pooling_brings_the_neighbours_along() -> None:
    q, k, v = tensors(1, 2, 1, 120, 16)
    k[:, :, 50] = 6 * q[:, 0]
    q[:, 1] = q[:, 0]
    for pool, expected in ((1, {50}), (5, {48, 49, 50, 51, 52})):
        _, chosen, _ = step(TokenSelect(sinks=2, local=8, budget=len(expected), pool=pool), q, k, v)
        assert chosen is not None and set(chosen.tokens.flatten().tolist()) == {0, 1, *expected, *range(112, 120)}


@pytest.mark.parametrize("n", [33, 34, 35])
def test_all_are_read_where_the_parts_reach_as_far(n: int) -> None:
    q, k, v = tensors(2, 6, 2, n, 16)
    out, chosen, pairs = step(SMALL, q, k, v)
    plain = saccade.attention(q, k, v)
    if n <= 34:
        assert worst(out, plain) < 1e-14 and pairs == n
    else:
        assert chosen is not None and chosen.token_counts.flatten().tolist() == [34, 34] and worst(out, plain) > 1e-4


# -- reading again ------------------------------------------------------------------------------------------------------


def steps(method: TokenSelect, queries: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Masks read by queries `(T, B, Hq, 1, D)` that come one by one."""
    state: dict[str, Any] = {}
    masks = []
    for i, q in enumerate(queries):
        n = start + i
        _, chosen, _ = step(method, q, k[:, :, :n], v[:, :, :n], state)
        assert chosen is not None
        masks.append(listed(chosen, 1)[:, 0])
    return masks, state


def drifting(count: int, batch: int = 1) -> Tensor:
    """Queries that turn slowly, and jump after the first half."""
    g = torch.Generator().manual_seed(1)
    a, b, noise = (torch.randn(n, batch, 6, 1, 16, generator=g, dtype=torch.float64) for n in (1, 1, count))
    return torch.where(torch.arange(count).view(-1, 1, 1, 1, 1) < count // 2, a, b) + 0.1 * noise


def test_a_choice_is_read_again_until_the_query_has_turned() -> None:
    _, k, v = tensors(1, 6, 2, 130, 16)
    queries = drifting(10)
    masks, state = steps(SMALL, queries, k, v, 120)
    assert state["choices"].searches == 2
    for i, mask in enumerate(masks):
        n = 120 + i
        source = 0 if i < 5 else 5
        want = torch.nn.functional.pad(voted(queries[source], k[:, :, : 120 + source], 4, 110 + source, 20), (0, i - source))
        want[:, :4] = want[:, n - 10 :] = True
        assert torch.equal(mask, want), i  # the tokens in between come in through the local window only


def test_above_one_every_query_chooses_and_at_minus_one_only_the_first() -> None:
    _, k, v = tensors(1, 6, 2, 130, 16)
    queries = drifting(10)
    always, state = steps(TokenSelect(sinks=4, local=10, budget=20, theta=1.1), queries, k, v, 120)
    assert state["choices"].searches == 10
    for i, mask in enumerate(always):
        _, alone, _ = step(SMALL, queries[i], k[:, :, : 120 + i], v[:, :, : 120 + i])
        assert alone is not None and torch.equal(mask, listed(alone, 1)[:, 0])
    once, state = steps(TokenSelect(sinks=4, local=10, budget=20, theta=-1), queries, k, v, 120)
    assert state["choices"].searches == 1
    assert all(torch.equal(mask[:, 4:110], once[0][:, 4:110]) for mask in once)


def test_rows_of_a_batch_choose_at_their_own_times() -> None:
    _, k, v = tensors(2, 6, 2, 130, 16)
    queries = drifting(10, batch=2)
    queries[:, 1] = queries[:1, 1]  # the second row's query never changes
    together, _ = steps(SMALL, queries, k, v, 120)
    for row in range(2):
        alone, state = steps(SMALL, queries[:, row : row + 1], k[row : row + 1], v[row : row + 1], 120)
        assert state["choices"].searches == 2 - row
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_tokens_taken_back_take_their_choice_with_them() -> None:
    _, k, v = tensors(1, 6, 2, 130, 16)
    queries = drifting(10)
    state: dict[str, Any] = {}

    def run(i: int) -> Tensor:
        _, chosen, _ = step(SMALL, queries[i], k[:, :, : 120 + i], v[:, :, : 120 + i], state)
        assert chosen is not None
        return chosen.tokens

    first = [run(i) for i in range(10)]
    ctx = stack_context(3, 8, queries[0], k, v, {}, [], state=state)
    assert SMALL.rewind(ctx, 122) == 122 and SMALL.rewind(stack_context(3, 8, queries[0], k, v, {}, []), 9) == 9
    again = [run(i) for i in range(3, 10)]
    assert all(torch.equal(a, b) for a, b in zip(first[3:], again, strict=True))


# -- a prompt -----------------------------------------------------------------------------------------------------------


def prompt(n: int, n_q: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 16, generator=g, dtype=torch.float64) for h in (6, 2, 2))
    return q[:, :, n - n_q :], k, v


def prefill_context(
    q: Tensor, k: Tensor, v: Tensor, state: dict[str, Any] | None = None, **more: Any
) -> tuple[LayerContext, list[Selection | None]]:
    calls: list[Selection | None] = []
    ctx = stack_context(3, 8, q, k, v, {}, [], state={} if state is None else state, **more)
    ctx.phase = "prefill"
    ctx.attend = lambda q, k, v, s: (calls.append(s), saccade.ops.attend(q, k, v, s).out)[1]
    return ctx, calls


@pytest.mark.parametrize(("n", "n_q"), [(100, 100), (101, 70), (103, 17)])
def test_chunks_of_a_prompt_choose_together(n: int, n_q: int) -> None:
    q, k, v = prompt(n, n_q)
    ctx, calls = prefill_context(q, k, v)
    method = TokenSelect(sinks=4, local=10, budget=20, chunk=16, theta=1.1)
    out = method.attend(ctx, q, k, v)
    want = torch.zeros(2, n_q, n, dtype=torch.bool)
    for begin in range(0, n_q, 16):
        first, end = n - n_q + begin, min(n - n_q + begin + 16, n)
        rows = slice(begin, begin + end - first)
        if first <= 34:
            want[:, rows, :end] = True
            continue
        want[:, rows] = voted(q[:, :, rows], k, 4, first - 10, 20)[:, None]
        want[:, rows, :4] = want[:, rows, first - 10 : end] = True
    want &= torch.ones(n_q, n, dtype=torch.bool).tril(n - n_q)
    (selection,) = calls
    assert selection is not None and torch.equal(selection.dense_mask()[:, 0], want)
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(3, 1)) / 4
    exact = weights.masked_fill(~want[:, None], -torch.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    assert worst(out, exact) < 1e-12


def test_chunks_read_again_what_the_chunk_before_chose() -> None:
    q, k, v = prompt(120, 120)
    q[:, :, 64:96] = q[:, :, 48:64].repeat(1, 1, 2, 1)
    state: dict[str, Any] = {}
    ctx, calls = prefill_context(q, k, v, state)
    SMALL.attend(ctx, q, k, v)
    assert calls[0] is not None
    tokens = calls[0].tokens[0, 0]
    assert torch.equal(tokens[3], tokens[4]) and torch.equal(tokens[3], tokens[5]) and not torch.equal(tokens[5], tokens[6])
    assert state["choices"].searches == 3  # chunks 3, 6 and 7; the first three chunks read everything
    # the next part of the prompt goes on from there; a prompt that was taken back does not
    more, longer = q[:, :, -16:], torch.cat([k, k[:, :, :16]], 2)
    SMALL.attend(prefill_context(more, longer, longer, state)[0], more, longer, longer)
    assert state["choices"].searches == 4
    SMALL.attend(prefill_context(q[:, :, 48:64], k[:, :, :64], v[:, :, :64], state)[0], q[:, :, 48:64], k[:, :, :64], v[:, :, :64])
    assert state["choices"].choices[-1].at == 64


def test_an_opened_prompt_and_single_queries_are_dense() -> None:
    q, k, v = prompt(60, 60)
    for method, rows in ((TokenSelect(sinks=4, local=10, budget=46), slice(None)), (SMALL, slice(59, 60))):
        ctx, calls = prefill_context(q[:, :, rows], k, v)
        method.attend(ctx, q[:, :, rows], k, v)
        assert calls == [None]


def test_no_value_from_the_future() -> None:
    q, k, v = prompt(120, 120)
    other = v.clone()
    other[:, :, 70:] = 5.0
    a, b = (SMALL.attend(prefill_context(q, k, x)[0], q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :70], b[:, :, :70]) and not torch.equal(a[:, :, 70:], b[:, :, 70:])


# -- positions ----------------------------------------------------------------------------------------------------------

ROTARY = Rotary(10000 ** (-torch.arange(8) / 8))
MOVED = TokenSelect(sinks=4, local=10, budget=20, chunk=16, theta=1.1, reindex=True)


def unturned(n: int, n_q: int) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """q, k, v without positions, and the same as a model stores them."""
    q, k, v = prompt(n, n_q)
    at = torch.arange(n)
    return (q, k, v), (turn(q, at[n - n_q :], ROTARY), turn(k, at, ROTARY), v)


def renumbered(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """By hand: choose by content at distance `local`, then number sinks, chosen and local tokens 0, 1, 2, ... and attend."""
    m, n = q.shape[2], k.shape[2]
    begin = first + m - 10 if m == 1 else first - 10
    at = turn(q, 10 + torch.arange(m), ROTARY).mean(2, keepdim=True)
    mask = voted(at, k, 4, begin, 20)
    outs = []
    for row in range(2):
        ids = torch.cat([torch.arange(4), mask[row].nonzero()[:, 0], torch.arange(begin, n)])
        keys = turn(k[row : row + 1, :, ids], torch.arange(len(ids)), ROTARY)
        queries = turn(q[row : row + 1], torch.arange(len(ids) - m, len(ids)), ROTARY)
        outs.append(saccade.ops.attend(queries, keys, v[row : row + 1, :, ids]).out)
    return torch.cat(outs)


def test_tokens_that_are_read_are_numbered_consecutively() -> None:
    plain, stored = unturned(120, 1)
    out, _, pairs = step(MOVED, *stored, rotary=ROTARY)
    assert worst(out, renumbered(*plain, 119)) < 1e-12 and pairs == 34 + 106 / 2
    assert worst(out, step(TokenSelect(sinks=4, local=10, budget=20, theta=1.1), *stored)[0]) > 1e-3


def test_chunks_of_a_prompt_are_numbered_too() -> None:
    (q, k, v), stored = unturned(112, 64)
    ctx, calls = prefill_context(*stored, rotary=ROTARY)
    out = MOVED.attend(ctx, *stored)
    assert len(calls) == 4
    for i in range(4):
        rows, first = slice(16 * i, 16 * i + 16), 48 + 16 * i
        want = renumbered(q[:, :, rows], k[:, :, : first + 16], v[:, :, : first + 16], first)
        assert worst(out[:, :, rows], want) < 1e-12
    # early chunks, whose tokens all fit, keep their numbers
    whole, turned = unturned(40, 40)
    ctx, _ = prefill_context(*turned, rotary=ROTARY)
    out = MOVED.attend(ctx, *turned)
    assert worst(out[:, :, :32], saccade.attention(*turned)[:, :, :32]) < 1e-12 and whole[0].shape == out.shape


def test_far_content_is_chosen_wherever_it_stands() -> None:
    """The same far tokens moved further away: chosen again, and read with the same result."""
    (q, k, v), _ = unturned(120, 1)
    q = q[:, :1].expand(-1, 6, -1, -1)
    outs = []
    for gap in (0, 5000):
        at = torch.cat([torch.arange(110), torch.arange(110, 120) + gap])
        stored = turn(q, at[-1:], ROTARY), turn(k, at, ROTARY), v
        if gap:  # tokens that nobody looks at fill the gap
            fill = -3 * turn(q[:, :2], 10, ROTARY).expand(-1, 2, gap, -1)
            keys = turn(torch.cat([k[:, :, :110], fill, k[:, :, 110:]], 2), torch.arange(120 + gap), ROTARY)
            values = torch.cat([v[:, :, :110], torch.zeros(2, 2, gap, 16, dtype=v.dtype), v[:, :, 110:]], 2)
            stored = stored[0], keys, values
        outs.append(step(MOVED, *stored, rotary=ROTARY)[0])
    assert worst(outs[0], outs[1]) < 1e-9


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "needs a model with a fixed rotary embedding"), ({"rotary": ROTARY, "seen": 130}, "holds 120 of 130")],
)
def test_moving_needs_positions(more: dict[str, Any], message: str) -> None:
    _, stored = unturned(120, 1)
    with pytest.raises(ValueError, match=message):
        step(MOVED, *stored, **more)


# -- the pocket model ---------------------------------------------------------------------------------------------------

QUARTER = "tokenselect(sinks=16, local=112, budget=384, chunk=128"


@pytest.mark.parametrize("theta", [0.9, 1.1])
def test_the_pocket_model_finds_a_needle(theta: float) -> None:
    text, stats = answer(needle(), f"{QUARTER}, theta={theta})")
    assert text == needle().answer
    assert stats.decode_density is not None and stats.decode_density < 0.25 + 0.5


def test_random_tokens_of_the_same_number_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    import saccade.methods.decode.tokenselect as module

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "reduce_heads", lambda scores, *_: torch.rand(1, 1, scores.shape[-1], generator=g))
    assert answer(needle(), f"{QUARTER})")[0] != needle().answer


@pytest.mark.parametrize(("n", "fields"), [(2048, "local=240, budget=768"), (1024, "local=112, budget=384, reindex=True")])
def test_a_prompt_in_chunks_finds_a_needle(n: int, fields: str) -> None:
    """At half of the tokens: one choice for all heads and 64 bytes is coarse for a model that copies byte by byte."""
    prompt, spec = needle(n), f"tokenselect(sinks=16, chunk=64, theta=1.1, {fields})"
    with saccade.attach(pocket(), prefill=spec, decode=spec) as handle, torch.no_grad():
        out = pocket().generate(prompt.ids, max_new_tokens=7, do_sample=False)
        stats = handle.stats()
    assert bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist()).decode() == prompt.answer
    assert stats.prefill_density is not None and stats.prefill_density < 0.85


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sinks": -1}, "sinks=-1: expected a whole number of at least 0"),
        ({"local": 0}, "local=0: expected a whole number of at least 1"),
        ({"budget": 0.25}, "budget=0.25: expected a whole number"),
        ({"pool": 4}, "pool=4: expected an odd width"),
        ({"theta": float("nan")}, "theta=nan: expected a cosine"),
        ({"reindex": 1}, "reindex=1: expected True or False"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelect(**fields)


def test_spec_round_trip() -> None:
    spec = "tokenselect(sinks=64, local=256, budget=1024, chunk=256, theta=0.8, pool=3, reindex=True)"
    assert build(spec).spec == spec
