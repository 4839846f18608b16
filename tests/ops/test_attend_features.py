"""Positions, sequences, lengths, sinks, low-rank biases and resuming: the oracle against loops, fast paths against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import Partial, Selection, merge
from saccade.ops import ExtraKeys, attend

from .attend_cases import FEATURES, inputs, leaves, options, selection

KINDS = ("dense", "tiles", "odd tiles", "singles")


def close(a: Partial, b: Partial) -> bool:
    assert a.lse is not None and b.lse is not None
    # log weights are float32
    same_lse = torch.equal(a.lse == -torch.inf, b.lse == -torch.inf) and torch.allclose(a.lse, b.lse, atol=1e-6, rtol=1e-6)
    return torch.allclose(a.out, b.out, atol=1e-10) and same_lse


def by_loops(q: Tensor, k: Tensor, v: Tensor, sees, sinks: Tensor | None = None, extra=lambda b, h, i, j: 0.0) -> Partial:
    """One exponential after the other. sees(b, h, i, j): whether a query reads a key."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                total = 0.0 if sinks is None else math.exp(sinks[h])
                for j in range(k.shape[2]):
                    if sees(b, h, i, j):
                        weight = math.exp(float(q[b, h, i] @ k[b, h // group, j]) / math.sqrt(q.shape[3]) + extra(b, h, i, j))
                        out[b, h, i] += weight * v[b, h // group, j]
                        total += weight
                if total > 0:
                    out[b, h, i] /= total
                    lse[b, h, i] = math.log(total)
    return Partial(out, lse)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature", FEATURES)
def test_reference_is_the_formula(feature: str, causal: bool) -> None:
    n_q, n_k, batch = 7, 9, 1 if feature == "sequences" else 2
    q, k, v = inputs(n_q, n_k, batch=batch, dim=4)
    if feature == "sequences":
        made: dict[str, Any] = {"cu_seqlens_q": torch.tensor([0, 2, 2, 6]), "cu_seqlens_k": torch.tensor([0, 4, 5, 8])}
        lies = [(0, 2, 0, 4), (2, 6, 5, 8)]
    else:
        made, lies = options(feature, n_q=n_q, n_k=n_k), []
        made = {name: x.clamp(max=n_k) if name in ("lengths", "starts") else x for name, x in made.items()}
    if feature.startswith("positions") and not causal:
        with pytest.raises(ValueError, match="causal"):
            attend(q, k, v, causal=False, impl="reference", **made)
        return

    def of(x: Tensor, b: int, h: int, i: int) -> int:
        return int(x[b % x.shape[0], h * x.shape[1] // 4, i])

    def sees(b: int, h: int, i: int, j: int) -> bool:
        if feature.startswith("positions"):
            return of(made["k_positions"], b, h, j) <= of(made["q_positions"], b, h, i)
        if feature == "sequences":
            return any(q0 <= i < q1 and k0 <= j < k1 and (not causal or q1 - i <= k1 - j) for q0, q1, k0, k1 in lies)
        begin, end = (int(made[name][b]) if name in made else other for name, other in (("starts", 0), ("lengths", n_k)))
        return begin <= j < end and (not causal or j <= i + n_k - n_q)

    a, b_rows = made.get("low_rank_bias", (None, None))
    extra = (lambda b, h, i, j: 0.0) if a is None else (lambda b, h, i, j: float(a[0, h, i] @ b_rows[b, 0, j]))
    got = attend(q, k, v, causal=causal, impl="reference", return_lse=True, **made)
    assert close(got, by_loops(q, k, v, sees, made.get("sinks"), extra))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [(f,) for f in FEATURES] + [("positions", "lengths", "sinks", "low rank"), ("sequences", "low rank")])
def test_fast_paths_equal_the_reference_with_gradients(kind: str, features: tuple[str, ...]) -> None:
    batch = 1 if "sequences" in features else 2
    results = []
    for impl in ("reference", "cpu"):
        (q, k, v), made, wanted = leaves(inputs(batch=batch), options(*features, batch=batch), torch.float64)
        got = attend(q, k, v, selection(kind), impl=impl, return_lse=True, **made)
        plain = attend(q, k, v, selection(kind), impl=impl, **made)
        assert torch.allclose(plain.out, got.out, atol=1e-10)
        assert got.lse is not None
        g = torch.Generator().manual_seed(3)
        d_out, d_lse = torch.randn(got.out.shape, generator=g), torch.randn(got.lse.shape, generator=g)
        loss = (got.out * d_out).sum() + (torch.where(got.lse > -torch.inf, got.lse, 0.0) * d_lse).sum()
        results.append((Partial(got.out.detach(), got.lse.detach()), torch.autograd.grad(loss, wanted)))
    (want, want_grads), (got, got_grads) = results
    assert close(got, want)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert bool(b.isfinite().all()) and torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", [("lengths",), ("lengths", "starts"), ("sequences",), ("sinks",)])
def test_dense_fused_kernels_serve_them(features: tuple[str, ...], causal: bool) -> None:
    """Cut into rectangles, ragged batches reach torch's fused attention."""
    batch = 1 if "sequences" in features else 2
    q, k, v = (x.float() for x in inputs(batch=batch))
    made = {name: x.float() if x.is_floating_point() else x for name, x in options(*features, batch=batch).items()}
    want = attend(q, k, v, causal=causal, impl="reference", return_lse=True, **made)
    got = attend(q, k, v, causal=causal, **made)
    assert torch.allclose(got.out, want.out, atol=1e-5)
    if causal is False:
        assert saccade.last_run().impl in ("sdpa", "sdpa+lse")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["dense", "tiles"])
def test_rows_that_read_nothing(kind: str, impl: Any) -> None:
    q, k, v = inputs()
    none = torch.zeros(2, dtype=torch.int32)
    got = attend(q, k, v, selection(kind), lengths=none, return_lse=True, impl=impl)
    assert got.lse is not None and bool((got.out == 0).all()) and bool((got.lse == -torch.inf).all())
    sinks = torch.tensor([0.5, -2.0, 0.0, 30.0], dtype=torch.float64)
    got = attend(q, k, v, selection(kind), lengths=none, sinks=sinks, return_lse=True, impl=impl)
    assert got.lse is not None and bool((got.out == 0).all()) and torch.equal(got.lse, sinks[None, :, None].expand(got.lse.shape))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_looked_at(kind: str, impl: Any) -> None:
    q, k, v = inputs()
    made = options("lengths", "starts")
    want = attend(q, k, v, selection(kind), impl=impl, **made).out
    for x in (k, v):
        for row, (begin, end) in enumerate(zip(made["starts"].tolist(), made["lengths"].tolist(), strict=True)):
            x[row, :, :begin] = torch.nan
            x[row, :, end:] = torch.inf
    assert torch.equal(attend(q, k, v, selection(kind), impl=impl, **made).out, want)


def test_moving_keys_with_their_positions_changes_nothing() -> None:
    q, k, v = inputs(20, 20)
    order, rows = torch.randperm(20, generator=torch.Generator().manual_seed(4)), torch.randperm(20)
    want = attend(q, k, v, return_lse=True)
    got = attend(
        q[:, :, rows], k[:, :, order], v[:, :, order], q_positions=rows[None, None], k_positions=order[None, None], return_lse=True
    )
    assert want.lse is not None and close(got, Partial(want.out[:, :, rows], want.lse[:, :, rows]))
    # a selection lists rows as they lie, and its own causality gives way
    for causal in (True, False):
        every = Selection.from_parts(n_q=20, n_k=20, block_q=8, block_k=4, starts=torch.arange(0, 20, 4).expand(1, 1, 3, 5), causal=causal)
        listed = attend(
            q[:, :, rows], k[:, :, order], v[:, :, order], every, q_positions=rows[None, None], k_positions=order[None, None],
            return_lse=True,
        )  # fmt: skip
        assert close(listed, got)


def test_positions_of_one_side_alone() -> None:
    q, k, v = inputs(6, 9)
    keys = torch.arange(9)[None, None]
    want = attend(q, k, v, return_lse=True, impl="reference")
    assert close(attend(q, k, v, k_positions=keys, return_lse=True), want)
    assert close(attend(q, k, v, q_positions=keys[..., 3:], return_lse=True), want)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_are_run_one_by_one(causal: bool) -> None:
    made = options("sequences", batch=1)
    q, k, v = inputs(batch=1)
    got = attend(q, k, v, causal=causal, return_lse=True, **made)
    assert got.lse is not None
    ends_q, ends_k = made["cu_seqlens_q"].tolist(), made["cu_seqlens_k"].tolist()
    for s in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
        alone = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=causal, return_lse=True, impl="reference")
        assert close(Partial(got.out[:, :, rows], got.lse[:, :, rows]), alone)
    assert bool((got.out[:, :, ends_q[-1] :] == 0).all()) and bool((got.lse[:, :, ends_q[-1] :] == -torch.inf).all())


@pytest.mark.parametrize("kind", ["dense", "tiles"])
def test_lengths_equal_cutting(kind: str) -> None:
    q, k, v = inputs(32, 32)
    lengths = torch.tensor([17, 32], dtype=torch.int32)
    got = attend(q, k, v, selection(kind, 32, 32), lengths=lengths)
    mask = None if kind == "dense" else selection(kind, 32, 32)
    for row, n in enumerate(lengths.tolist()):
        cut = None
        if mask is not None:
            cut = Selection.from_token_mask(mask.coverage()[:, :, : math.ceil(n / 16), :n], block_q=16, n_q=n)
        own_q, own_k, own_v = (t[row : row + 1, :, :n] for t in (q, k, v))
        assert torch.allclose(got.out[row : row + 1, :, :n], attend(own_q, own_k, own_v, cut, impl="reference").out)


@pytest.mark.parametrize("kind", ["dense", "tiles"])
def test_low_rank_bias_is_the_dense_bias(kind: str) -> None:
    q, k, v = inputs()
    a, b = options("low rank")["low_rank_bias"]
    want = attend(q, k, v, selection(kind), bias=a @ b.mT, softcap=2.0, return_lse=True, impl="reference")
    more = torch.randn(1, 1, 1, 41, dtype=torch.float64)
    for impl in ("reference", "cpu"):
        assert close(attend(q, k, v, selection(kind), low_rank_bias=(a, b), softcap=2.0, return_lse=True, impl=impl), want)
    both = attend(q, k, v, selection(kind), low_rank_bias=(a, b), bias=more, return_lse=True)
    assert close(both, attend(q, k, v, selection(kind), bias=a @ b.mT + more, return_lse=True, impl="reference"))


@pytest.mark.parametrize("with_sinks", [True, False])
def test_a_state_goes_on_where_it_stopped(with_sinks: bool) -> None:
    q, k, v = inputs()
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    whole = attend(q, k, v, causal=False, sinks=sinks, return_lse=True, impl="reference")
    state = attend(q, k[:, :, :10], v[:, :, :10], causal=False, sinks=sinks, return_lse=True)
    state = attend(q, k[:, :, 10:30], v[:, :, 10:30], causal=False, state=state, return_lse=True)
    last = attend(q, k[:, :, 30:], v[:, :, 30:], causal=False, state=state, return_lse=True)
    assert close(last, whole)
    assert attend(q, k[:, :, 30:], v[:, :, 30:], causal=False, state=state).lse is None
    (q, k, v), _, wanted = leaves([q, k, v], {}, torch.float64)
    state = attend(q, k[:, :, :10], v[:, :, :10], causal=False, return_lse=True)
    resumed = attend(q, k[:, :, 10:], v[:, :, 10:], causal=False, state=state).out
    for a, b in zip(
        torch.autograd.grad(resumed.sin().sum(), wanted),
        torch.autograd.grad(attend(q, k, v, causal=False, impl="reference").out.sin().sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("kind", ["dense", "tiles"])
def test_extra_keys_with_features_and_gradients(kind: str) -> None:
    """Extra keys join the softmax once, and neither masks nor sinks apply to them."""
    q, k, v = inputs()
    more_k, more_v = (torch.randn(2, 2, 3, 16, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    made = options("lengths", "sinks")
    extra = ExtraKeys(more_k, more_v, weight)
    got = attend(q, k, v, selection(kind), extra_keys=extra, return_lse=True, **made)
    main = attend(q, k, v, selection(kind), return_lse=True, impl="reference", **made)
    bias = weight.repeat_interleave(2, 1).unsqueeze(2)
    want = merge(main, attend(q, more_k, more_v, causal=False, bias=bias, return_lse=True, impl="reference"))
    assert close(got, want)
    ours, theirs = (torch.autograd.grad(x.out.sin().sum(), weight)[0] for x in (got, want))
    assert torch.allclose(ours, theirs)
    attend(q, k, v, selection(kind), extra_keys=extra, **made)
    assert "reference" not in saccade.last_run().impl


def test_gradients_of_rows_without_keys_are_finite() -> None:
    """A tile whose first rows come before all its listed keys, through torch's fused kernel."""
    q, k, v = (x.requires_grad_() for x in inputs(16, 16))
    s = Selection.from_positions(torch.tensor([5, 9]).expand(1, 1, 2, 2), n_q=16, n_k=16, block_q=8)
    for impl in ("cpu", "reference"):
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(attend(q, k, v, s, impl=impl).out.sum(), (q, k, v)))


def test_refusals() -> None:
    q, k, v = inputs(8, 8)
    ends = torch.tensor([0, 8], dtype=torch.int32)
    half = [x[:1] for x in (q, k, v)]
    calls: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([q, k, v], {"q_positions": torch.zeros(1, 3, 8, dtype=torch.int32)}, "q_positions has shape"),
        ([q, k, v], {"k_positions": torch.zeros(1, 1, 9, dtype=torch.int32)}, "k_positions has shape"),
        ([q, k, v], {"k_positions": torch.zeros(1, 1, 8)}, "expected an int32 or int64 tensor"),
        ([q, k, v], {"k_positions": torch.zeros(1, 1, 8, dtype=torch.int32), "causal": False}, "causal=False"),
        ([q, k, v], {"lengths": torch.tensor([1])}, "lengths has shape"),
        ([q, k, v], {"lengths": [1, 2]}, "lengths is list"),
        ([q, k, v], {"cu_seqlens_q": ends, "cu_seqlens_k": ends}, "batch 1"),
        (half, {"cu_seqlens_q": ends}, "go together"),
        (half, {"cu_seqlens_q": ends, "cu_seqlens_k": torch.tensor([0, 9])}, "at most 8"),
        (half, {"cu_seqlens_q": ends, "cu_seqlens_k": torch.tensor([0, 4, 8])}, "the same for queries and keys"),
        ([q, k, v], {"sinks": torch.zeros(2)}, "sinks have shape"),
        ([q, k, v], {"sinks": torch.zeros(4, dtype=torch.int32)}, "floating-point"),
        ([q, k, v], {"low_rank_bias": (torch.zeros(1, 4, 8, 2), torch.zeros(1, 2, 8, 2))}, "b of low_rank_bias has shape"),
        ([q, k, v], {"low_rank_bias": (torch.zeros(1, 4, 8, 2), torch.zeros(1, 1, 8, 3))}, "ranks 2 and 3"),
        ([q, k, v], {"state": Partial(torch.zeros(2, 4, 8, 16), None)}, "no log-sum-exp"),
        ([q, k, v], {"state": Partial(torch.zeros(2, 4, 7, 16), torch.zeros(2, 4, 7))}, "state has out"),
        ([q, k, v], {"sinks": torch.zeros(4), "impl": "flex"}, "flex"),
        ([q, k, v], {"extra_keys": ExtraKeys(k, v, torch.zeros(2, 2, 3))}, "log weights"),
    ]
    for tensors, made, words in calls:
        with pytest.raises((ValueError, TypeError), match=words):
            attend(tensors[0], tensors[1], tensors[2], **made)
