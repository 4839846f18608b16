"""Features of attend in the Triton kernels, against the oracle: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import Partial, Selection
from saccade.ops import ExtraKeys, attend
from tests.ops.marks import long_when_interpreted

from .attend_cases import FEATURES, inputs, leaves, options, selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_Q, N_K = 22, 34


def moved(s: Selection | None) -> Selection | None:
    """The selection on the device."""
    if s is None:
        return None
    lists = {name: x.to(DEVICE) for name in s.__dataclass_fields__ if isinstance(x := getattr(s, name), Tensor)}
    return replace(s, **lists)


def check(features: tuple[str, ...], kind: str, *, dtype: torch.dtype = torch.float32, n_q: int = N_Q, n_k: int = N_K, **more: Any) -> None:
    """Results and gradients against float64: at most twice the error of the reference in `dtype`, plus what sums in another order cost."""
    batch = 1 if "sequences" in features else 2
    s = moved(selection(kind, n_q, n_k))
    g = torch.Generator().manual_seed(5)
    d_out, d_lse = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((batch, 4, n_q, 16), (batch, 4, n_q)))

    def run(kept: torch.dtype, impl: Any) -> tuple[list[Tensor], Tensor]:
        made = options(*features, n_q=n_q, n_k=n_k, batch=batch)
        (q, k, v), made, wanted = leaves(inputs(n_q, n_k, batch=batch), made, kept, DEVICE)
        part = attend(q, k, v, s, impl=impl, return_lse=True, **made, **more)
        assert part.lse is not None
        seen = part.lse > -torch.inf
        lse = torch.where(seen, part.lse, 0.0)
        loss = (part.out.double() * d_out).sum() + (lse.double() * d_lse).sum()
        return [part.out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)], seen

    (exact, seen), (plain, _), (ours, ours_seen) = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "triton")
    assert saccade.last_run().impl == "triton" and torch.equal(seen, ours_seen)
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert o.shape == e.shape and bool(o.isfinite().all()), i
        allowed = 2 * float((p.double() - e).abs().max()) + 1e-6 * (1 + float(e.abs().max()))
        if dtype != torch.float32 and i != 1:  # probabilities are rounded to the matrix units' type
            allowed += 4 * torch.finfo(dtype).eps * float(e.abs().max())
        assert float((o.double() - e).abs().max()) <= allowed, (i, float((o.double() - e).abs().max()), allowed)


@pytest.mark.parametrize("feature", FEATURES)
def test_dense(feature: str) -> None:
    check((feature,), "dense")


@pytest.mark.parametrize("feature", ["sequences", "lengths", "starts"])
def test_not_causal(feature: str) -> None:
    check((feature,), "dense", causal=False)


@pytest.mark.parametrize("kind", ["tiles", "odd tiles", "singles"])
@long_when_interpreted
@pytest.mark.parametrize("features", [("positions", "sinks"), ("lengths", "starts", "low rank"), ("sequences",)])
@long_when_interpreted
def test_selections(features: tuple[str, ...], kind: str) -> None:
    check(features, kind)


@long_when_interpreted
def test_all_at_once() -> None:
    check(("positions by query head", "lengths", "starts", "sinks", "low rank"), "tiles", softcap=2.0, scale=-0.3)


def test_half_precision() -> None:
    check(("positions", "lengths", "sinks", "low rank"), "tiles", dtype=torch.float16)


@long_when_interpreted
def test_many_tiles_of_queries_and_keys() -> None:
    """Tiles that need no mask, tiles cut on the left, and tiles that nothing reads."""
    for features in (("lengths",), ("sequences",)):
        check(features, "dense", n_q=66, n_k=80)


def test_low_rank_bias_in_float32_beside_half_precision() -> None:
    """Positions in the bias (ALiBi) need more digits than queries do."""
    q, k, v = (x.half().to(DEVICE) for x in inputs(40, 40, batch=1))
    rows = torch.arange(40.0, device=DEVICE).view(1, 1, 40, 1) + 1000
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01], device=DEVICE).view(1, 4, 1, 1)
    a = torch.cat([slopes.expand(1, 4, 40, 1), -slopes * rows], -1)
    b = torch.cat([rows, torch.ones_like(rows)], -1)
    got = attend(q, k, v, low_rank_bias=(a, b), impl="triton").out.double()
    bias = (slopes * (rows.mT - rows)).double()
    want = attend(q.double(), k.double(), v.double(), bias=bias, impl="reference").out
    assert float((got - want).abs().max()) < 4e-3


def test_rows_that_read_nothing() -> None:
    q, k, v = (x.float().to(DEVICE) for x in inputs(N_Q, N_K))
    none, sinks = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.tensor([0.5, -2.0, 0.0, 30.0], device=DEVICE)
    for kind in ("dense", "tiles"):
        s = moved(selection(kind, N_Q, N_K))
        got = attend(q, k, v, s, lengths=none, return_lse=True, impl="triton")
        assert got.lse is not None and bool((got.out == 0).all()) and bool((got.lse == -torch.inf).all())
        got = attend(q, k, v, s, lengths=none, sinks=sinks, return_lse=True, impl="triton")
        assert got.lse is not None and bool((got.out == 0).all())
        assert torch.allclose(got.lse, sinks[None, :, None].expand(got.lse.shape))
    nothing = attend(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True, impl="triton")
    assert nothing.lse is not None and torch.equal(nothing.lse, sinks[None, :, None].expand(nothing.lse.shape))


@pytest.mark.parametrize("kind", ["dense", "singles"])
def test_padding_is_never_looked_at(kind: str) -> None:
    """Neither by results nor by gradients, which are 0 there."""
    results = []
    for poison in (False, True):
        q, k, v = (x.float().to(DEVICE) for x in inputs(N_Q, N_K))
        made = {name: x.to(DEVICE) for name, x in options("lengths", "starts", n_q=N_Q, n_k=N_K).items()}
        counted = torch.zeros(2, 1, N_K, 1, dtype=torch.bool, device=DEVICE)
        for row in range(2):
            counted[row, :, int(made["starts"][row]) : int(made["lengths"][row])] = True
        if poison:
            k, v = k.masked_fill(~counted, torch.nan), v.masked_fill(~counted, torch.inf)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = attend(q, k, v, moved(selection(kind, N_Q, N_K)), impl="triton", **made).out
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
        assert bool((grads[1].masked_select(~counted) == 0).all()) and bool((grads[2].masked_select(~counted) == 0).all())
        results.append((out, *grads))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_sequences_are_run_one_by_one() -> None:
    made = {name: x.to(DEVICE) for name, x in options("sequences", n_q=N_Q, n_k=N_K, batch=1).items()}
    q, k, v = (x.float().to(DEVICE) for x in inputs(N_Q, N_K, batch=1))
    got = attend(q, k, v, impl="triton", **made).out
    ends_q, ends_k = made["cu_seqlens_q"].tolist(), made["cu_seqlens_k"].tolist()
    for s in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
        alone = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], impl="triton").out
        assert torch.allclose(got[:, :, rows], alone, atol=1e-6)


def test_extra_keys_and_state_stay_in_the_kernels() -> None:
    q, k, v = (x.float().to(DEVICE) for x in inputs(N_Q, N_K))
    more_k, more_v = (x.float().to(DEVICE) for x in inputs(N_Q, 3, seed=8)[1:])
    weight = torch.randn(2, 2, 3, device=DEVICE)
    weight[0, 0, 1] = -torch.inf  # stands for no key
    results: list[list[Tensor]] = []
    for impl in ("reference", "triton"):
        weight = weight.detach().requires_grad_()
        state: Partial = attend(q, k[:, :, :9], v[:, :, :9], causal=False, return_lse=True, impl=impl)
        extra = ExtraKeys(more_k, more_v, weight)
        part = attend(q, k[:, :, 9:], v[:, :, 9:], causal=False, extra_keys=extra, state=state, return_lse=True, impl=impl)
        assert saccade.last_run().impl == impl and part.lse is not None
        results.append([part.out.detach(), part.lse.detach(), *torch.autograd.grad(part.out.sin().sum(), weight)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_a_bias_may_hide_keys() -> None:
    """A bias of -inf over a whole tile is a mask."""
    q, k, v = (x.float().to(DEVICE) for x in inputs(16, 70, batch=1))
    bias = torch.zeros(1, 1, 1, 70, device=DEVICE)
    bias[..., :40] = -torch.inf
    want = attend(q, k[:, :, 40:], v[:, :, 40:], causal=False, impl="reference").out
    assert torch.allclose(attend(q, k, v, causal=False, bias=bias, impl="triton").out, want, atol=1e-5)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come full of nan; what the kernels leave unwritten would show."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    made = options("lengths", "sinks", "low rank", n_q=N_Q, n_k=N_K)
    (q, k, v), made, wanted = leaves(inputs(N_Q, N_K), made, torch.float32, DEVICE)
    for kind in ("dense", "tiles"):
        part = attend(q, k, v, moved(selection(kind, N_Q, N_K)), impl="triton", return_lse=True, **made)
        assert part.lse is not None and bool(part.out.isfinite().all()) and bool(part.lse.isfinite().all())
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(part.out.sum(), wanted))


@pytest.mark.parametrize("features", [pytest.param(("positions", "lengths", "sinks", "low rank"), marks=pytest.mark.slow), ("sequences",)])
def test_the_compiler_takes_it_whole(features: tuple[str, ...]) -> None:
    """One graph with symbols for sizes, forward and backward, whose operators' fake forms agree with what runs."""
    batch = 1 if "sequences" in features else 2
    made = options(*features, n_q=12, n_k=18, batch=batch)
    if "sequences" in features:
        made = {"cu_seqlens_q": torch.tensor([0, 5, 12]), "cu_seqlens_k": torch.tensor([0, 9, 18])}
    (q, k, v), made, wanted = leaves(inputs(12, 18, batch=batch), made, torch.float32, DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, impl="triton", **made).out.sin().sum()

    theirs = torch.autograd.grad(loss(q, k, v), wanted)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(q, k, v), wanted), theirs, strict=True))


def test_what_cannot_run_is_refused_or_handed_on() -> None:
    q, k, v = (x.float().to(DEVICE) for x in inputs(8, 8))
    wide = (torch.randn(1, 1, 8, 33, device=DEVICE), torch.randn(1, 1, 8, 33, device=DEVICE))
    with pytest.raises(ValueError, match="rank 33: 32 is the most"):
        attend(q, k, v, low_rank_bias=wide, impl="triton")
    got = attend(q, k, v, low_rank_bias=wide).out
    assert saccade.last_run().impl == "tiled"
    assert torch.allclose(got, attend(q, k, v, low_rank_bias=wide, impl="reference").out, atol=1e-5)
