"""attend: fast paths against the reference, the reference against a formula, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade
from saccade.core import Selection, merge
from saccade.ops import ExtraKeys, attend


def inputs(batch: int, heads: int, kv_heads: int, n_q: int, n_k: int, dim: int, value_dim: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n_q, dim), (batch, kv_heads, n_k, dim), (batch, kv_heads, n_k, value_dim)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[torch.Tensor], Selection]:
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)]))
    batch, n_k = draw(st.integers(1, 2)), draw(st.integers(1, 70))
    n_q = draw(st.integers(1, n_k))
    q, k, v = inputs(batch, kv_heads * group, kv_heads, n_q, n_k, draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 6])))
    heads = draw(st.sampled_from([1, kv_heads, kv_heads * group]))
    block_q, block_k = draw(st.sampled_from([(1, 1), (16, 8), (7, 5), (32, 32)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    causal = draw(st.booleans())
    tiles = math.ceil(n_q / block_q)
    kind = draw(st.sampled_from(["blocks", "tokens", "mixed", "unaligned", "weighted"]))
    share = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    lead = (draw(st.sampled_from([1, batch])), heads, tiles)
    if kind == "blocks":
        mask = torch.rand(*lead, math.ceil(n_k / block_k), generator=g) < share
        s = Selection.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)
    elif kind == "tokens":
        mask = torch.rand(*lead, n_k, generator=g) < share
        s = Selection.from_token_mask(mask, block_q=block_q, n_q=n_q, block_k=block_k, causal=causal)
    else:
        starts = torch.randint(0, 3, (*lead, 3), generator=g) + torch.arange(3) * (block_k + 3)
        tokens = torch.randint(0, n_k, (*lead, 6), generator=g)
        weight = torch.randn(*lead, 6, generator=g) if kind == "weighted" else None
        counts = torch.randint(0, 7, lead, generator=g)
        s = Selection.from_parts(
            n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=None if kind == "mixed" else starts, tokens=tokens,
            token_counts=counts, log_weight=weight, causal=causal,
        )  # fmt: skip
    return [q, k, v], s


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans(), st.sampled_from([None, 3.0]))
def test_cpu_equals_reference(problem: tuple[list[torch.Tensor], Selection], with_bias: bool, cap: float | None) -> None:
    (q, k, v), s = problem
    bias = torch.randn(1, q.shape[1], 1, k.shape[2], dtype=torch.float64) if with_bias else None
    want = attend(q, k, v, s, bias=bias, softcap=cap, return_lse=True, impl="reference")
    got = attend(q, k, v, s, bias=bias, softcap=cap, return_lse=True, impl="cpu")
    plain = attend(q, k, v, s, bias=bias, softcap=cap, impl="cpu")
    assert torch.allclose(got.out, want.out, atol=1e-10) and torch.allclose(plain.out, want.out, atol=1e-10)
    assert plain.lse is None and got.lse is not None and want.lse is not None
    assert torch.allclose(got.lse, want.lse, atol=1e-6 if s.log_weight is not None else 1e-10)


def test_reference_is_the_formula() -> None:
    q, k, v = inputs(2, 4, 2, 5, 9, 8, 6)
    got = attend(q, k, v, impl="reference", return_lse=True)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                logits = (k[b, h // 2, : 9 - 5 + i + 1] @ q[b, h, i]) / math.sqrt(8)
                assert torch.allclose(got.out[b, h, i], torch.softmax(logits, 0) @ v[b, h // 2, : len(logits)])
                assert got.lse is not None and torch.allclose(got.lse[b, h, i], torch.logsumexp(logits, 0))


@pytest.mark.parametrize(
    "shape", [(2, 6, 2, 64, 64, 16, 16), (1, 4, 4, 33, 90, 16, 24), (2, 4, 2, 1, 50, 16, 16), (1, 2, 1, 300, 300, 32, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_error_is_that_of_dense_attention(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    """Every path, in low precision, within twice the error of torch's dense attention plus 1e-6."""
    q, k, v = inputs(*shape)
    exact = attend(q, k, v, causal=causal, impl="reference", return_lse=True)
    low = [x.to(dtype) for x in (q, k, v)]
    wide = [x.repeat_interleave(shape[1] // shape[2], 1) for x in low[1:]]
    rows = torch.arange(shape[3])[:, None] + shape[4] - shape[3]
    mask = (torch.arange(shape[4]) <= rows) if causal else None
    torchs = torch.nn.functional.scaled_dot_product_attention(low[0], *wide, attn_mask=mask)
    allowed = 2 * float((torchs.double() - exact.out).abs().max()) + 1e-6
    full = Selection.full(shape[3], shape[4], block_q=16, block_k=16, causal=causal)
    for selection in (None, full):
        for lse in (False, True):
            got = attend(*low, selection, causal=causal, return_lse=lse)
            assert float((got.out.double() - exact.out).abs().max()) <= allowed, saccade.last_run()
            if got.lse is not None and exact.lse is not None:
                assert float((got.lse.double() - exact.lse).abs().max()) <= allowed + 1e-2 * (dtype == torch.bfloat16)


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v = inputs(2, 6, 2, 20, 60, 8, 8)
    whole = attend(q, k, v, causal=False, return_lse=True, impl="reference")
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True) for a, b in ((0, 7), (7, 41), (41, 60))]
    merged = merge(*parts)
    assert torch.allclose(merged.out, whole.out) and whole.lse is not None and merged.lse is not None
    assert torch.allclose(merged.lse, whole.lse)


def test_extra_keys_share_the_softmax() -> None:
    q, k, v = inputs(1, 4, 2, 10, 10, 8, 8)
    more_k, more_v = (torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(1, 2, 3, dtype=torch.float64)
    got = attend(q, k, v, extra_keys=ExtraKeys(more_k, more_v, weight))
    logits = torch.cat([q @ k.repeat_interleave(2, 1).mT, q @ more_k.repeat_interleave(2, 1).mT], -1) / math.sqrt(8)
    logits[..., 10:] += weight.repeat_interleave(2, 1).unsqueeze(2)
    logits[..., :10].masked_fill_(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    want = torch.softmax(logits, -1) @ torch.cat([v, more_v], 2).repeat_interleave(2, 1)
    assert torch.allclose(got.out, want)


def test_reference_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, 12, 12, 4, 4))
    s = Selection.from_block_mask(torch.rand(1, 4, 3, 3) < 0.6, block_q=4, block_k=4, n_q=12, n_k=12)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, s, impl="reference").out, (q, k, v))


def test_nothing_unlisted_is_touched() -> None:
    """Keys outside the selection are NaN: a path that reads them and masks afterwards shows it."""
    q, k, v = (x.float() for x in inputs(1, 4, 2, 64, 64, 16, 16))
    mask = torch.eye(4, dtype=torch.bool)[None, None] | (torch.arange(4) == 0)
    s = Selection.from_block_mask(mask, block_q=16, block_k=16, n_q=64, n_k=64)
    clean = attend(q, k, v, s)
    unread = ~s.dense_mask()[0, 0].any(0)
    only_first = Selection.from_positions(torch.zeros(1, 1, 64, 1, dtype=torch.int32), n_q=64, n_k=64)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, :, 1:], poisoned_v[:, :, 1:] = torch.nan, torch.nan
    assert not unread.any() and torch.isfinite(clean.out).all()
    assert torch.equal(attend(q, poisoned_k, poisoned_v, only_first).out, v[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, 64, -1))


def test_views_into_larger_buffers_are_not_copied() -> None:
    buffer = torch.randn(2, 2, 100, 8)
    q = torch.randn(2, 4, 30, 8)
    s = Selection.window(30, 60, 9, block_q=8, block_k=4)
    for k in (buffer[:, :, :60], buffer.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :60], buffer[:, :, 40:]):
        assert torch.allclose(attend(q, k, k, s).out, attend(q, k.clone(), k.clone(), s, impl="reference").out, atol=1e-5)


def test_last_run_says_what_ran() -> None:
    q, k, v = (x.float() for x in inputs(1, 2, 2, 256, 256, 16, 16))
    attend(q, k, v)
    assert (saccade.last_run().impl, saccade.last_run().density) == ("sdpa", 1.0)
    s = Selection.window(256, 256, 32, block_q=32, block_k=32)
    attend(q, k, v, s)
    run = saccade.last_run()
    assert run.impl == "cpu" and run.density == s.density() < 0.5 and run.dtype == "float32"
    attend(q, k, v, s, impl="reference")
    assert saccade.last_run().impl == "reference"


@pytest.mark.slow
def test_flex_equals_reference() -> None:
    q, k, v = (x.float() for x in inputs(1, 4, 2, 256, 256, 32, 32))
    tiles = Selection.from_block_mask(torch.rand(1, 4, 2, 2) < 0.7, block_q=128, block_k=128, n_q=256, n_k=256)
    s = tiles | Selection.window(256, 256, 5, block_q=128)
    got = attend(q, k, v, s, impl="flex")
    assert saccade.last_run().impl == "flex"
    assert torch.allclose(got.out, attend(q, k, v, s, impl="reference").out, atol=1e-5)
    assert torch.allclose(attend(q, k, v, impl="flex").out, attend(q, k, v, impl="reference").out, atol=1e-5)


def test_refusals() -> None:
    q, k, v = (x.float() for x in inputs(1, 4, 2, 8, 8, 4, 4))
    cases = [
        (lambda: attend(q[0], k, v), "3 dimensions"),
        (lambda: attend(q[:, :3], k, v), "multiple of the key/value heads"),
        (lambda: attend(q, k, v[:, :, :5]), "expected the same"),
        (lambda: attend(q, k[..., :2], v), "head dim"),
        (lambda: attend(q, k, v, Selection.full(8, 9)), "8 queries and 9 keys"),
        (lambda: attend(q, k, v, Selection.full(8, 8).expand(1, 3)), "3 heads"),
        (lambda: attend(q, k, v, impl="cuda"), "not one of"),  # pyright: ignore[reportArgumentType]
        (lambda: attend(q, k, v, softcap=-1.0), "softcap"),
        (lambda: attend(q, k, v, bias=torch.zeros(3, 1, 1, 1)), "bias"),
        (lambda: attend(q, k, v, bias=torch.zeros(1, 1, 1, 8), impl="flex"), "bias"),
    ]
    for call, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    with pytest.raises(TypeError, match="dtypes"):
        attend(q, k.double(), v)
    with pytest.raises(TypeError, match="torch tensor"):
        attend([1.0], k, v)  # pyright: ignore[reportArgumentType]


def test_rows_without_keys_are_zero() -> None:
    q, k, v = (x.float() for x in inputs(1, 2, 2, 6, 4, 4, 4))  # causal, two queries before the first key
    for impl in ("reference", "auto"):
        got = attend(q, k, v, return_lse=True, impl=impl)  # pyright: ignore[reportArgumentType]
        assert (got.out[:, :, :2] == 0).all() and got.lse is not None and (got.lse[:, :, :2] == -torch.inf).all()
        assert torch.isfinite(got.out).all()
    s = Selection.from_block_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool), block_q=8, block_k=8, n_q=6, n_k=4)
    assert (attend(q, k, v, s).out == 0).all()
