"""decode: every way it runs against the reference, what it must not touch, and what it refuses."""

from __future__ import annotations

import math
import statistics
import threading
import time
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.core import HeadLayout, Partial, Selection, merge
from saccade.ops import decode, scratch
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import single
from saccade.ops.decode.listed import Ends
from saccade.parts.growing import Growing

EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 1.2e-7, torch.float16: 1.2e-7}  # of the log-sum-exp


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection
    softcap: float | None


def laid_out(x: Tensor, how: str) -> Tensor:
    """`x (B, H, n, D)` as it may lie in memory; what lies behind the content is nan."""
    if how == "growing":
        buffer = torch.full((*x.shape[:2], x.shape[2] + 7, x.shape[3]), torch.nan, dtype=x.dtype)
        buffer[:, :, : x.shape[2]] = x
        return buffer[:, :, : x.shape[2]]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if how == "token-major" else x


def random_selection(draw: st.DrawFn, lead: tuple[int, int], n: int, block: int, g: torch.Generator) -> Selection:
    kind = draw(st.sampled_from(["pages", "unaligned", "tokens", "uneven", "weighted", "mixed", "full"]))
    share = draw(st.sampled_from([0.0, 0.15, 0.6, 1.0]))
    pages = math.ceil(n / block)
    if kind == "full":
        return Selection.full(1, n, block_q=1, block_k=block)
    if kind == "pages":
        # as many pages in every head, the last one among them, as methods choose them
        chosen = torch.rand(*lead, 1, pages, generator=g).index_fill(-1, torch.tensor([pages - 1]), 2.0)
        keep = chosen.topk(max(1, int(share * pages))).indices
        mask = torch.zeros(*lead, 1, pages, dtype=torch.bool).scatter(-1, keep, True)
        return Selection.from_block_mask(mask, block_q=1, block_k=block, n_q=1, n_k=n)
    if kind == "uneven":
        shares = torch.rand(*lead, 1, 1, generator=g)
        mask = torch.rand(*lead, 1, n, generator=g) < shares * share
        return Selection.from_token_mask(mask, block_q=1, n_q=1, block_k=block)
    starts = torch.randint(0, 3, (*lead, 1, 4), generator=g) + torch.arange(4) * (block + 3)
    tokens = torch.randint(0, n, (*lead, 1, 9), generator=g)
    counts = torch.randint(0, 10, (*lead, 1), generator=g)
    weight = torch.randn(*lead, 1, 9, generator=g) if kind in ("weighted", "mixed") else None
    return Selection.from_parts(
        n_q=1, n_k=n, block_q=1, block_k=block, starts=None if kind in ("tokens", "weighted") else starts,
        tokens=None if kind == "unaligned" else tokens, token_counts=None if kind == "unaligned" else counts,
        log_weight=weight,
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4), (3, 2)]))
    batch, n, block = draw(st.integers(1, 3)), draw(st.integers(1, 90)), draw(st.sampled_from([1, 3, 4, 16]))
    dim, value_dim = draw(st.sampled_from([(4, 4), (8, 5), (64, 64)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2000)))
    how = draw(st.sampled_from(["plain", "growing", "token-major"]))
    q = torch.randn(batch, kv_heads * group, 1, dim, generator=g).to(dtype)
    k = torch.randn(batch, kv_heads, n, dim, generator=g).to(dtype)
    v = torch.randn(batch, kv_heads, n, value_dim, generator=g).to(dtype)
    lead = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads, kv_heads * group])))
    selection = random_selection(draw, lead, n, block, g)
    return Case(q, laid_out(k, how), laid_out(v, how), selection, draw(st.sampled_from([None, None, 4.0])))


def exactly(case: Case) -> Partial:
    """The float64 reference on the same (already rounded) inputs."""
    q, k, v = (x.double() for x in case[:3])
    return decode(q, k, v, case.selection, softcap=case.softcap, return_lse=True, impl="reference")


def dense_error(case: Case, exact: Partial) -> tuple[float, float]:
    """Errors of torch's dense attention (output, log-sum-exp) in the same dtype over each head's keys, against float64."""
    batch, heads = case.q.shape[:2]
    mask = case.selection.expand(batch, heads).dense_mask()
    worst = [0.0, 0.0]
    for b in range(batch):
        for h in range(heads):
            listed = mask[b, h, 0].nonzero().flatten()
            if len(listed):
                group = h // (heads // case.k.shape[1])
                k, v = (x[b, group][listed][None, None] for x in (case.k, case.v))
                dense = decode(case.q[b : b + 1, h : h + 1], k, v, return_lse=True)
                for i in (0, 1):
                    worst[i] = max(worst[i], float((dense[i].double() - exact[i][b, h]).abs().max()))
    return worst[0], worst[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_query_equals_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    exact = exactly(case)
    got = decode(*case[:4], softcap=case.softcap, return_lse=True)
    if case.softcap is None and case.selection.log_weight is None:
        allowed, allowed_lse = dense_error(case, exact)
    else:
        # torch's dense attention has neither cap nor weights: there the rounding of the output is what the dtype allows
        allowed, allowed_lse = torch.finfo(dtype).eps * float(exact.out.abs().max()) / 2, 0.0
    assert got.out.dtype == dtype
    assert float((got.out.double() - exact.out).abs().max()) <= 2 * allowed + 1e-6
    there = exact.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, there)
    error = (got.lse.double() - exact.lse)[there].abs()
    assert bool((error <= 2 * allowed_lse + 16 * EPS[dtype] * (1 + exact.lse[there].abs())).all())
    assert bool((got.out[~there] == 0).all())


@settings(max_examples=80, deadline=None)
@given(cases(torch.float32))
def test_nothing_but_the_listed_keys_is_read(case: Case) -> None:
    want = decode(*case[:4], softcap=case.softcap).out
    listed = case.selection.expand(*case.q.shape[:2]).dense_mask()[:, :, 0]
    unread = ~listed.unflatten(1, (case.k.shape[1], -1)).any(2)
    for x in (case.k, case.v):
        x[unread] = torch.nan
    # the general way fills uneven lists up with the last key; the one for a single query blanks what isn't listed
    if single.takes(problem_of(case), Ends.of(case.selection)) or not bool(unread[..., -1].any()):
        assert torch.equal(decode(*case[:4], softcap=case.softcap).out, want)


def problem_of(case: Case) -> Problem:
    return Problem(
        q=case.q, k=case.k, v=case.v, selection=case.selection, causal=False, scale=1.0, softcap=case.softcap, bias=None,
        return_lse=False, layout=HeadLayout.of(*case[:3]),
    )  # fmt: skip


@pytest.mark.parametrize("n", [256, 250, 241])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_pages_of_a_step_take_the_short_way(n: int, heads: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, m, 16, generator=g) for h, m in ((6, 1), (2, n), (2, n)))
    pages = torch.stack([torch.randperm(15, generator=g)[:4].sort().values for _ in range(heads)])
    pages = torch.cat([pages, torch.full((heads, 1), 15)], 1)[None, :, None] * 16
    s = Selection.from_parts(n_q=1, n_k=n, block_q=1, block_k=16, starts=pages)
    case = Case(q, k, v, s, None)
    assert single.takes(problem_of(case), Ends.of(s))
    want = exactly(case)
    assert float((decode(q, k, v, s).out - want.out).abs().max()) < 1e-6


def test_lists_in_chunks_equal_lists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, m, 16, generator=g) for h, m in ((6, 1), (2, 200), (2, 200)))
    s = Selection.from_token_mask(torch.rand(2, 6, 1, 200, generator=g) < 0.5, block_q=1, n_q=1, block_k=4)
    at_once = decode(q, k, v, s, return_lse=True)
    monkeypatch.setattr(single, "CHUNK", 5 * 200 * 16 * 4)  # five lists at a time of twelve
    in_parts = decode(q, k, v, s, return_lse=True)
    assert float((at_once.out - in_parts.out).abs().max()) < 1e-6
    assert float((at_once.lse - in_parts.lse).abs().max()) < 1e-5


@pytest.mark.parametrize("heads", [2, 6])  # a list for each key head, or for each query head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tail", [0, 5])
def test_lists_of_very_different_lengths_are_not_filled_up(
    heads: int, dtype: torch.dtype, softcap: float | None, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(2, h, m, 8, generator=g).to(dtype) for h, m in ((6, 1), (2, 90), (2, 90)))
    shares = torch.linspace(0, 0.9, heads)[None, :, None, None]
    mask = (torch.rand(2, heads, 1, 90, generator=g) < shares) & (torch.arange(90) < 90 - tail)
    listed = Selection.from_token_mask(mask, block_q=1, n_q=1, block_k=1, causal=False)
    if tail:
        last = torch.full((2, heads, 1, 1), 90 - tail)
        listed = Selection.from_parts(n_q=1, n_k=90, block_q=1, block_k=tail, starts=last, tokens=listed.tokens, causal=False)
    copied: list[int] = []
    copies = single.copies
    monkeypatch.setattr(single, "copies", lambda rows, index: (copied.append(index.numel()), copies(rows, index))[1])
    got = decode(q, k, v, listed, softcap=softcap, return_lse=True)
    want = decode(q.double(), k.double(), v.double(), listed, softcap=softcap, return_lse=True, impl="reference")
    assert copied and set(copied) == {int(mask.sum()) + 2 * heads * tail}
    assert torch.equal(got.lse.isneginf(), want.lse.isneginf())
    assert float((got.lse - want.lse).nan_to_num(0.0).abs().max()) < 1e-5
    assert float((got.out - want.out).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)
    none = Selection.from_token_mask(torch.zeros_like(mask), block_q=1, n_q=1, block_k=1, causal=False)
    assert not decode(q, k, v, none).out.any()


def test_a_list_of_every_key_runs_dense() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, m, 16, generator=g) for h, m in ((4, 1), (2, 100), (2, 100)))
    want = decode(q, k, v).out
    everything = torch.arange(100)[None, None, None]
    for s in (Selection.full(1, 100, block_q=1, block_k=16), Selection.from_positions(everything, n_q=1, n_k=100)):
        assert single.covers_all(s, Ends.of(s))
        assert torch.equal(decode(q, k, v, s).out, want)
    unaligned = Selection.from_parts(
        n_q=1, n_k=100, block_q=1, block_k=50, starts=torch.tensor([[[[20, 70]]]])
    )
    assert not single.covers_all(unaligned, Ends.of(unaligned))


def test_disjoint_lists_merge_to_dense() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, m, 16, generator=g, dtype=torch.float64) for h, m in ((4, 1), (2, 75), (2, 75)))
    mask = torch.rand(2, 4, 1, 75, generator=g) < 0.4
    parts = [
        decode(q, k, v, Selection.from_token_mask(m, block_q=1, n_q=1, block_k=8), return_lse=True)
        for m in (mask, ~mask)
    ]
    assert float((merge(*parts).out - decode(q, k, v).out).abs().max()) < 1e-14


@pytest.mark.parametrize("m", [2, 5])
def test_several_queries_equal_the_reference(m: int) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, n, 16, generator=g, dtype=torch.float64) for h, n in ((4, m), (2, 60), (2, 60)))
    s = Selection.from_token_mask(torch.rand(2, 2, m, 60, generator=g) < 0.3, block_q=1, n_q=m, block_k=4)
    want = decode(q, k, v, s, return_lse=True, impl="reference")
    got = decode(q, k, v, s, return_lse=True)
    assert float((got.out - want.out).abs().max()) < 1e-13


def test_gradients_flow_where_they_are_asked_for() -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (1, 40, 40))
    s = Selection.from_token_mask(torch.rand(1, 2, 1, 40, generator=g) < 0.4, block_q=1, n_q=1, block_k=4)
    grads = [torch.autograd.grad(decode(q, k, v, s, impl=i).out.square().sum(), (q, k, v)) for i in ("cpu", "reference")]
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max()) < 1e-12


def test_buffers_stay_out_of_results_and_out_of_other_threads() -> None:
    g = torch.Generator().manual_seed(4)
    k, v = (torch.randn(1, 2, 300, 16, generator=g).bfloat16() for _ in range(2))
    queries = [torch.randn(1, 4, 1, 16, generator=g).bfloat16() for _ in range(40)]
    s = Selection.from_token_mask(torch.rand(1, 4, 1, 300, generator=g) < 0.5, block_q=1, n_q=1)
    with torch.inference_mode():  # a buffer made here serves outside as well
        first = decode(queries[0], k, v, s).out.clone()
    alone = [decode(q, k, v, s).out for q in queries]
    assert torch.equal(alone[0], first)
    got: dict[int, list[Tensor]] = {}

    def work(name: int) -> None:
        got[name] = [decode(q, k, v, s).out for q in queries]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs in got.values():
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))


def test_a_large_buffer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LIMIT", 100)
    small = scratch.scratch("test", (5, 5), torch.float32, torch.device("cpu"))
    assert scratch.scratch("test", (4,), torch.float32, torch.device("cpu")).data_ptr() == small.data_ptr()
    large = scratch.scratch("test", (500,), torch.float32, torch.device("cpu"))
    assert scratch.scratch("test", (4,), torch.float32, torch.device("cpu")).data_ptr() != large.data_ptr()


@pytest.mark.parametrize("m", [1, 3])
def test_ragged_cache(m: int) -> None:
    g = torch.Generator().manual_seed(5)
    offsets = [0, 7, 7, 30, 31]
    q = torch.randn(2, 4, m, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(31, 8, generator=g, dtype=torch.float64) for _ in range(2))
    got = decode(q, k, v, offsets=offsets, kv_heads=2, return_lse=True)
    for b in range(2):
        for h in range(4):
            rows = slice(*offsets[2 * b + h // 2 : 2 * b + h // 2 + 2])
            if rows.start == rows.stop:
                assert bool((got.out[b, h] == 0).all()) and bool((got.lse[b, h] == -torch.inf).all())
                continue
            logits = q[b, h] @ k[rows].mT * 8**-0.5
            assert float((got.out[b, h] - logits.softmax(-1) @ v[rows]).abs().max()) < 1e-14
            assert float((got.lse[b, h] - logits.logsumexp(-1)).abs().max()) < 1e-14


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_lengths_equal_shorter_caches(impl: str, causal: bool) -> None:
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(3, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, 2), (2, 40), (2, 40)))
    s = Selection.from_token_mask(torch.rand(3, 2, 2, 40, generator=g) < 0.5, block_q=1, n_q=2, block_k=4, causal=causal)
    lengths = torch.tensor([40, 0, 13])
    k[2, :, 13:], v[1] = torch.nan, torch.nan
    for selection in (None, s):
        got = decode(q, k, v, selection, lengths=lengths, causal=causal, return_lse=True, impl=impl)
        assert not got.out[1].any() and bool((got.lse[1] == -torch.inf).all())
        for b, n in ((0, 40), (2, 13)):
            logits = q[b].unflatten(0, (2, 2)) @ k[b, :, None, :n].mT * 8**-0.5
            seen = torch.ones(1, 2, n, dtype=torch.bool) if selection is None else s.coverage()[b, :, :, :n]
            if causal:
                seen = seen & (torch.arange(n) <= torch.arange(2)[:, None] + n - 2)
            logits = logits.masked_fill(~seen.unsqueeze(1), -torch.inf)
            want = (logits.softmax(-1).nan_to_num(0.0) @ v[b, :, None, :n]).flatten(0, 1)
            assert float((got.out[b] - want).abs().max()) < 1e-13


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_pages_equal_one_piece(impl: str) -> None:
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, 1), (2, 40), (2, 40)))
    order = torch.randperm(12, generator=g)[:8].view(2, 4)
    pages = [torch.full((12, 10, 2, 8), torch.nan, dtype=torch.float64) for _ in range(2)]
    for x, into in zip((k, v), pages, strict=True):
        into[order.flatten()] = x.transpose(1, 2).unflatten(1, (4, 10)).flatten(0, 1)
    s = Selection.from_token_mask(torch.rand(2, 4, 1, 40, generator=g) < 0.5, block_q=1, n_q=1, block_k=4)
    for options in ({}, {"lengths": torch.tensor([40, 7])}):
        for selection in (None, s):
            got = decode(q, *pages, selection, block_table=order.int(), return_lse=True, impl=impl, **options)
            want = decode(q, k, v, selection, return_lse=True, impl="reference", **options)
            assert float((got.out - want.out).abs().max()) < 1e-13
            assert torch.equal(got.lse > -torch.inf, want.lse > -torch.inf)



def test_what_ran_is_on_record() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 64, 8)
    s = Selection.from_positions(torch.arange(16)[None, None, None], n_q=1, n_k=64)
    decode(q, k, k, s)
    run = saccade.last_run()
    assert (run.op, run.impl, run.n_q, run.n_k, run.density) == ("decode", "cpu", 1, 64, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": Selection.full(1, 30, block_q=1)}, "1 queries and 30 keys"),
        ({"selection": Selection.from_positions(torch.zeros(1, 3, 1, 1), n_q=1, n_k=40)}, "3 heads"),
        ({"selection": Selection.from_positions(torch.zeros(3, 1, 1, 1), n_q=1, n_k=40)}, "batch 3"),
        ({"impl": "fast"}, "impl 'fast' is not one of"),
        ({"softcap": -1.0}, "softcap -1.0 must be positive"),
        ({"q": torch.zeros(2, 4, 17, 8)}, "at most 16 queries"),
        ({"offsets": [0, 40]}, "needs kv_heads"),
        ({"offsets": torch.tensor([0, 40]), "kv_heads": 2, "k": torch.zeros(40, 8), "v": torch.zeros(40, 8)}, "expected 5 int32"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths is torch.float32"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32), "q": torch.zeros(2, 40, 1, 8)}, "block_table is"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "v": torch.zeros(2, 3, 40, 8)}, "a paged cache has"),
        ({"causal": True, "selection": Selection.full(1, 40, block_q=1, causal=False)}, "not causal"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    given = {"q": torch.zeros(2, 4, 1, 8), "k": torch.zeros(2, 2, 40, 8), "v": torch.zeros(2, 2, 40, 8), **change}
    with pytest.raises(ValueError, match=message):
        decode(**given)


def median_ms(run: object, times: int) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_thousand_of_32k_tokens_are_read_several_times_faster_than_all(kv_heads: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(6)
    n = 32768
    q = torch.randn(1, 8, 1, 64, generator=g).to(dtype)
    k, v = (Growing(torch.randn(1, kv_heads, n, 64, generator=g).to(dtype)).view for _ in range(2))
    pages = torch.rand(1, kv_heads, 1, n // 16, generator=g).topk(64).indices.sort().values * 16
    s = Selection.from_parts(n_q=1, n_k=n, block_q=1, block_k=16, starts=pages)
    want = decode(q, k, v, s, impl="reference").out
    assert float((decode(q, k, v, s).out - want).abs().max()) < 0.01
    best = max(median_ms(lambda: decode(q, k, v), 9) / median_ms(lambda: decode(q, k, v, s), 41) for _ in range(3))
    # a processor with matrix units for bfloat16 reads all of them in half of the time
    assert best >= (8 if dtype == torch.float32 else 4)
