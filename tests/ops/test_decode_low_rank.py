"""decode over keys kept as factors times a basis: in plain torch, and its kernel on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import Rotary, Selection
from saccade.ops.decode import decode_low_rank, low_rank
from tests.ops.marks import long_when_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    q: Tensor
    factors: Tensor
    basis: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self))


def draw(
    n: int = 70, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, m: int = 1, rank: int = 24, dim: int = 32, dim_v: int = 40,
    factor_heads: int = 1, basis_heads: int | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE)

    basis = normal(kv_heads if basis_heads is None else basis_heads, rank, dim) * rank**-0.5
    return Case(normal(batch, heads, m, dim), normal(batch, factor_heads, n, rank), basis, normal(batch, kv_heads, n, dim_v))


def rotary(pairs: int, interleaved: bool = False) -> Rotary:
    return Rotary((1e4 ** (-torch.arange(pairs, device=DEVICE) / pairs)).float(), interleaved)


def turned(keys: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Channel pairs as complex numbers, multiplied by exp(i angle)."""
    pairs = angles.shape[-1]
    head, rest = keys[..., : 2 * pairs], keys[..., 2 * pairs :]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :pairs], head[..., pairs:])
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    both = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    return torch.cat([both, rest], -1)


def exact(case: Case, selection: Selection | None = None, angles: Tensor | None = None, interleaved: bool = False, **options):
    """out and lse in float64, all keys written out. angles broadcastable to (B, Hk, n, pairs)."""
    q, factors, basis, v = case.to(torch.float64)
    keys = factors @ basis
    keys = keys.expand(q.shape[0], v.shape[1], -1, -1)
    if angles is not None:
        keys = turned(keys, angles.double().expand(*keys.shape[:3], -1), interleaved)
    group = q.shape[1] // v.shape[1]
    keys, v = keys.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ keys.mT * options.get("scale", q.shape[-1] ** -0.5)
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    if selection is not None:
        s = selection.expand(q.shape[0], q.shape[1])
        if s.log_weight is not None:
            spread = torch.zeros(*s.tokens.shape[:-1], s.n_k + 1, dtype=torch.float64, device=DEVICE)
            spread = spread.scatter(-1, s.tokens.long(), s.log_weight.double())[..., : s.n_k]
            logits = logits + spread.repeat_interleave(s.block_q, 2)[:, :, : s.n_q]
        logits = logits.masked_fill(~s.dense_mask(), -torch.inf)
    return logits.softmax(-1).nan_to_num() @ v, logits.logsumexp(-1)


def check(case: Case, impl: str, *, dtype: torch.dtype = torch.float32, selection: Selection | None = None, turns=None, **options) -> None:
    """turns: (rotary argument, positions, exact angles). Errors are judged against the keys' rounding to `dtype`."""
    rotary_, positions, angles = turns or (None, None, None)
    rounded = case.to(dtype)
    interleaved = isinstance(rotary_, Rotary) and rotary_.interleaved
    out, lse = exact(rounded, selection, angles, interleaved, **options)
    part = decode_low_rank(
        *rounded, rotary=rotary_, positions=positions, selection=selection, return_lse=True, impl=impl, **options
    )  # fmt: skip
    assert saccade.last_run().impl == impl and part.lse is not None and part.out.dtype == dtype
    seen = lse > -torch.inf
    assert torch.equal(part.lse > -torch.inf, seen)
    # keys and weights are rounded to the dtype, the rest is summed in float32
    eps = torch.finfo(dtype).eps
    assert bool(((part.lse - lse)[seen].abs() <= 8 * eps + 1e-5).all())
    assert bool(((part.out - out).abs() <= 8 * eps * (case.v.abs().max() if case.v.numel() else 0) + 1e-5).all())
    assert bool((part.out[~seen] == 0).all())


def positioned(n: int, pairs: int, *, batch: int = 1, heads: int = 1, interleaved: bool = False):
    """A Rotary with positions in no order, as after eviction, and their angles."""
    g = torch.Generator().manual_seed(7)
    positions = torch.stack([torch.randperm(3 * n, generator=g)[:n] for _ in range(batch * heads)]).view(batch, heads, n).to(DEVICE)
    turn = rotary(pairs, interleaved)
    return turn, positions, (positions.float().unsqueeze(-1) * turn.inv_freq).double()


def pages(n: int, heads: int, *, m: int = 1, block_q: int = 1, block_k: int = 8, share: float = 0.4, causal: bool = True) -> Selection:
    mask = torch.rand(1, heads, -(-m // block_q), -(-n // block_k), generator=torch.Generator().manual_seed(4)) < share
    return Selection.from_block_mask(mask.to(DEVICE), block_q=block_q, block_k=block_k, n_q=m, n_k=n, causal=causal)


def weighted(n: int, heads: int) -> Selection:
    g = torch.Generator().manual_seed(5)
    return Selection.from_parts(
        n_q=1, n_k=n, block_q=1, block_k=8, starts=torch.tensor([3, 24, 60]).expand(1, heads, 1, 3).to(DEVICE),
        tokens=torch.randint(0, n, (1, heads, 1, 9), generator=g).to(DEVICE),
        log_weight=torch.randn(1, heads, 1, 9, generator=g).to(DEVICE),
    )  # fmt: skip


IMPLS = ("reference", "cpu", "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("factor_heads", "basis_heads"), [(1, 2), (2, 2), (2, 1), (1, 1)])
def test_without_rotation(impl: str, factor_heads: int, basis_heads: int) -> None:
    case = draw(factor_heads=factor_heads, basis_heads=basis_heads)
    check(case, impl)
    check(case, impl, selection=pages(70, 2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("factor_heads", "basis_heads"), [(1, 2), (2, 2), (2, 1), (1, 1)])
def test_with_rotation(impl: str, factor_heads: int, basis_heads: int) -> None:
    case = draw(factor_heads=factor_heads, basis_heads=basis_heads)
    check(case, impl, turns=positioned(70, 16, batch=2, heads=2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_layouts_of_pairs_and_channels_that_do_not_turn(impl: str, interleaved: bool) -> None:
    check(draw(dim=48), impl, turns=positioned(70, 10, interleaved=interleaved))
    check(draw(dim=32), impl, turns=positioned(70, 16, batch=2, interleaved=interleaved))


@pytest.mark.parametrize("impl", IMPLS)
def test_tables(impl: str) -> None:
    turn, _, angles = positioned(70, 16, batch=2)
    for tables in ((angles.cos(), angles.sin()), (angles[0, 0].cos(), angles[0, 0].sin())):
        check(draw(), impl, turns=(tuple(x.float() for x in tables), None, angles if tables[0].ndim == 4 else angles[:1]))
    both = torch.cat([angles, angles], -1)  # as transformers gives them: each half of the channels alike
    cos, sin = (x.float().squeeze(1)[..., :16] for x in (both.cos(), both.sin()))
    check(draw(), impl, turns=((cos, sin), None, angles))
    check(draw(n=9), impl, turns=(turn, None, torch.arange(9, device=DEVICE)[:, None] * turn.inv_freq))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_selections(impl: str, heads: int) -> None:
    turns = positioned(70, 16, heads=2)
    check(draw(), impl, selection=pages(70, heads), turns=turns)
    check(draw(), impl, selection=weighted(70, heads), turns=turns)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_queries(impl: str) -> None:
    turns = positioned(70, 16)
    check(draw(m=5), impl, turns=turns)
    check(draw(m=5), impl, selection=pages(70, 4, m=5, block_q=2), turns=turns)
    check(draw(m=5), impl, selection=pages(70, 2, m=5, block_q=8, causal=False), turns=turns)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rank", [8, 40, 64, 80])
def test_ranks(impl: str, rank: int) -> None:
    check(draw(n=40, batch=1, rank=rank), impl, turns=positioned(40, 16))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl: str, dtype: torch.dtype) -> None:
    check(draw(dim=80), impl, dtype=dtype, turns=positioned(70, 40, batch=2))
    check(draw(dim=80), impl, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_cap(impl: str) -> None:
    check(draw(), impl, turns=positioned(70, 16), scale=0.9, softcap=2.0)
    check(draw(), impl, scale=0.9, softcap=2.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_read(impl: str) -> None:
    turn = rotary(16)
    s = pages(70, 2, share=-1.0)
    check(draw(), impl, selection=s, turns=positioned(70, 16))
    check(draw(n=0), impl, turns=(turn, None, torch.zeros(0, 16, device=DEVICE)))


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "CHUNK", 16)
    for s in (None, weighted(70, 2), pages(70, 4)):
        check(draw(), "cpu", selection=s, turns=positioned(70, 16, heads=2))


def test_float64_and_gradients() -> None:
    case = draw()
    turns = positioned(70, 16)
    check(case, "cpu", dtype=torch.float64, turns=(turns[0], turns[1], turns[1].double().unsqueeze(-1) * turns[0].inv_freq.double()))
    leaves = Case(*(x.float().requires_grad_() for x in case))
    for rotary_, positions in ((turns[0], turns[1]), (None, None)):
        out = decode_low_rank(*leaves, rotary=rotary_, positions=positions, impl="cpu").out
        assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in torch.autograd.grad(out.sum(), leaves))


def test_full_rank_is_the_cache_itself() -> None:
    """shadowkv's check: factors of full rank give dense attention over the keys that were factored."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 50, 16, generator=g, dtype=torch.float64)
    rows = keys.transpose(1, 2).flatten(2)  # heads side by side
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    basis = (s[0, :, None] * vh[0]).unflatten(-1, (2, 16)).transpose(0, 1)
    q, v = torch.randn(1, 4, 1, 16, generator=g, dtype=torch.float64), torch.randn(1, 2, 50, 8, generator=g, dtype=torch.float64)
    turn = Rotary((1e4 ** (-torch.arange(8) / 8)).float())
    angles = torch.arange(50).double()[:, None] * turn.inv_freq.double()
    logits = q @ turned(keys, angles.expand(1, 2, -1, -1), False).repeat_interleave(2, 1).mT / 4
    want = logits.softmax(-1) @ v.repeat_interleave(2, 1)
    got = decode_low_rank(q, u.unsqueeze(1), basis, v, rotary=turn).out
    assert float((got - want).abs().max()) < 1e-12
    assert float((decode_low_rank(q, u.unsqueeze(1), basis, v).out - want).abs().max()) > 1e-3  # the rotation matters


def test_far_positions() -> None:
    case = draw(n=20, batch=1)
    turn = rotary(16)
    positions = torch.arange(20, device=DEVICE) * 7919 + 1000
    angles = (positions.float()[:, None] * turn.inv_freq).double()
    check(case, "triton", turns=(turn, positions, angles))


def test_buffers_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left unwritten, and what lies behind the last key, or isn't listed, is never looked at."""
    case, turns = draw(n=40, batch=1).to(torch.float32), positioned(40, 16)
    held = [torch.full((*x.shape[:2], 64, x.shape[3]), torch.nan, device=DEVICE) for x in (case.factors, case.v)]
    for buffer, x in zip(held, (case.factors, case.v), strict=True):
        buffer[:, :, :40] = x
    views = Case(case.q, held[0][:, :, :40], case.basis, held[1][:, :, :40])
    s = pages(40, 2)
    unread = ~s.expand(1, 2).dense_mask()[0, :, 0]
    want = [decode_low_rank(*case, rotary=turns[0], positions=turns[1], selection=x, impl="triton").out for x in (None, s)]
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: x.fill_(torch.nan) if (x := plain(*a, **k)).is_floating_point() else x)
    got = decode_low_rank(*views, rotary=turns[0], positions=turns[1], impl="triton").out
    held[1][:, :, :40][:, unread] = torch.nan
    held[0][:, :, :40][:, :, unread.all(0)] = torch.nan
    for impl in ("triton", "cpu"):
        listed = decode_low_rank(*views, rotary=turns[0], positions=turns[1], selection=s, impl=impl).out
        assert torch.allclose(listed, want[1], atol=1e-5)
    assert torch.equal(got, want[0])


@long_when_interpreted
def test_split_over_keys() -> None:
    from saccade.ops.decode.triton.low_rank import attend
    from saccade.ops.decode.triton.plan import Config

    case, (turn, positions, _) = draw(n=150, batch=1).to(torch.float32), positioned(150, 16)
    keys = low_rank.LowRankKeys(
        factors=case.factors, basis=case.basis, turns=low_rank.Turns(16, False, positions=positions, inv_freq=turn.inv_freq)
    )
    one, lse_one = attend(case.q, keys, case.v, None, 0.2, None, True, Config(32, 4, 1, 1, 1000))
    many, lse = attend(case.q, keys, case.v, None, 0.2, None, True, Config(32, 4, 1, 8, 32))
    assert torch.allclose(one, many, atol=1e-5) and torch.allclose(lse_one, lse, atol=1e-5)


@long_when_interpreted
def test_through_the_compiler() -> None:
    case, (turn, positions, _) = draw(n=40, batch=1).to(torch.float32), positioned(40, 16)
    inv_freq = turn.inv_freq

    def run(q: Tensor, factors: Tensor, basis: Tensor, v: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        a = decode_low_rank(q, factors, basis, v, rotary=Rotary(inv_freq), positions=positions, impl="triton").out
        return a + decode_low_rank(q, factors, basis, v, impl="triton").out

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*case, positions, inv_freq)
    assert torch.allclose(got, run(*case, positions, inv_freq), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    case = draw().to(torch.float32)
    turn = rotary(16)

    def refused(message: str, kind: type[Exception] = ValueError, replaced: dict | None = None, **options) -> None:
        with pytest.raises(kind, match=message):
            decode_low_rank(*case._replace(**replaced or {}), **options)

    refused("factors have shape", replaced={"factors": case.factors[:, :, :60]})
    refused("basis has shape", replaced={"basis": case.basis[:, :, :30]})
    refused("v has shape", replaced={"v": case.v[:1]})
    refused("at most 16", replaced={"q": case.q.expand(-1, -1, 17, -1)})
    refused("one floating-point dtype", TypeError, replaced={"v": case.v.double()})
    refused("without a Rotary", positions=torch.arange(70, device=DEVICE))
    refused("positions have shape", rotary=turn, positions=torch.arange(69, device=DEVICE))
    refused("integer", TypeError, rotary=turn, positions=torch.arange(70.0, device=DEVICE))
    refused("turns 34 channels", rotary=rotary(17))
    refused("not one of", impl="flex")
    refused("positive", softcap=-1.0)
    refused("float64", replaced={name: x.double() for name, x in case._asdict().items()}, rotary=turn, impl="triton")
    big = draw(n=10, rank=300).to(torch.float32)
    with pytest.raises(ValueError, match="1 to 256"):
        decode_low_rank(*big, rotary=turn, impl="triton")
    assert math.isfinite(float(decode_low_rank(*big, rotary=turn).out.sum()))
