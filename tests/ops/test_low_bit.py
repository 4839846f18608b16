"""attend_low_bit in plain torch: against exact attention, within what the step sizes allow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.ops.attend import attend_low_bit
from saccade.ops.attend.low_bit.codes import LIMIT, QUERY_ROWS, rounded


def draw(n_q: int, n_k: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 32, dim_v: int = 24, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n_q, dim), (kv_heads, n_k, dim), (kv_heads, n_k, dim_v))
    return tuple(torch.randn(batch, *shape, generator=g) for shape in shapes)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """out and lse in float64; mask broadcastable to (B, Hq, Nq, Nk)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).nan_to_num() @ v, logits.logsumexp(-1)


def causal(n_q: int, n_k: int) -> Tensor:
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def logit_bound(q: Tensor, k: Tensor, block_k: int, smooth: bool) -> Tensor:
    """The most that rounding to int8 can move a logit, for each head and query."""
    group = q.shape[1] // k.shape[1]
    q, k = q.double(), k.double()
    k = k - k.mean(2, keepdim=True) if smooth else k

    def half_steps(x: Tensor, rows: int) -> Tensor:
        blocks = F.pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows)).abs().amax((-1, -2)) / 254
        return blocks.repeat_interleave(rows, -1)[:, :, : x.shape[2]]

    of_q, of_k = half_steps(q, QUERY_ROWS), half_steps(k, block_k).repeat_interleave(group, 1)
    size_q, size_k = q.abs().sum(-1), k.abs().sum(-1).repeat_interleave(group, 1)
    bound = of_q[..., None] * size_k[:, :, None] + of_k[:, :, None] * size_q[..., None]
    return ((bound + q.shape[-1] * of_q[..., None] * of_k[:, :, None]) * q.shape[-1] ** -0.5).amax(-1)


def tiles(n_q: int, n_k: int, block_q: int, block_k: int, *, heads: int = 2, share: float = 0.4, causal: bool = True) -> Selection:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(1, heads, math.ceil(n_q / block_q), math.ceil(n_k / block_k), generator=g) < share
    return Selection.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("n_q", "n_k"), [(80, 80), (1, 70), (50, 90)])
def test_error_is_within_what_the_steps_allow(n_q: int, n_k: int, smooth: bool) -> None:
    q, k, v = draw(n_q, n_k, dim=80)
    out, lse = exact(q, k, v, causal(n_q, n_k))
    part = attend_low_bit(q, k, v, block_k=32, smooth=smooth, return_lse=True, impl="reference")
    bound = logit_bound(q, k, 32, smooth)
    assert part.lse is not None
    assert bool(((part.lse - lse).abs() <= bound + 1e-5).all())
    # each weight is off by a factor within exp(-2 bound) ... exp(2 bound)
    assert bool(((part.out - out).abs().amax(-1) <= torch.expm1(2 * bound) * v.abs().amax() + 1e-5).all())
    # rounding errors are of both signs: far below the worst case in fact, and not nothing
    assert 1e-4 < distance(part.out, out) < 0.03


def test_codes_take_the_whole_range() -> None:
    x = draw(1, 70)[1]
    for kind, limit in LIMIT.items():
        codes = rounded(x, 32, kind)
        step = F.pad(x, (0, 0, 0, 26)).unflatten(2, (3, 32)).abs().amax((-1, -2)) / limit
        error = (codes - x).abs()
        allowed = (step / 2 if kind == "int8" else step).repeat_interleave(32, -1)[..., :70, None]
        allowed = allowed if kind == "int8" else torch.maximum(x.abs() / 16, allowed * 2**-10)
        assert bool((error <= allowed * (1 + 1e-5)).all()) and float(error.max()) > 0
        assert rounded(torch.zeros(1, 1, 5, 4), 32, kind).eq(0).all()


def test_mean_of_the_keys_costs_no_bits() -> None:
    """Keys with a large common part in one channel: the paper's case for smoothing."""
    q, k, v = draw(96, 96)
    k[..., 5] += 40.0
    q[..., 5] *= 0.1
    out, lse = exact(q, k, v, causal(96, 96))
    errors = {}
    for smooth in (True, False):
        part = attend_low_bit(q, k, v, smooth=smooth, return_lse=True, block_k=32, impl="reference")
        errors[smooth] = distance(part.out, out)
        assert part.lse is not None and float((part.lse - lse).abs().max()) < (0.05 if smooth else 2.0)
    assert errors[False] > 5 * errors[True] and errors[True] < 0.02


def test_numbers_of_less_precision_err_more() -> None:
    q, k, v = draw(96, 96, dim=64)
    out, _ = exact(q, k, v, causal(96, 96))
    error = {
        (qk, pv): distance(attend_low_bit(q, k, v, qk=qk, pv=pv, impl="reference").out, out)
        for qk in ("int8", "fp8") for pv in ("same", "fp16", "fp8")
    }  # fmt: skip
    assert error["int8", "same"] < error["fp8", "same"] < 0.06
    assert abs(error["int8", "fp16"] - error["int8", "same"]) < 1e-3
    assert error["int8", "same"] < error["int8", "fp8"] < 0.06


@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("pv", ["same", "fp8"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("softcap", "skip_below"), [(None, None), (4.0, None), (None, 3.0), (4.0, 0.5)])
def test_cpu_equals_the_oracle(qk: str, pv: str, smooth: bool, softcap: float | None, skip_below: float | None) -> None:
    q, k, v = draw(75, 100, batch=2, dim=16)
    k = k + 3 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    options = dict(
        qk=qk, pv=pv, smooth=smooth, softcap=softcap, skip_below=skip_below, block_q=32, block_k=32, return_lse=True, scale=0.4
    )  # fmt: skip
    for selection in (None, tiles(75, 100, 48, 64), tiles(75, 100, 32, 32, heads=4, causal=False)):
        want = attend_low_bit(q, k, v, selection, impl="reference", **options)
        got = attend_low_bit(q, k, v, selection, impl="cpu", **options)
        assert saccade.last_run().impl == "cpu" and saccade.last_run().op == "attend_low_bit"
        assert want.lse is not None and got.lse is not None and torch.equal(want.lse > -torch.inf, got.lse > -torch.inf)
        seen = want.lse > -torch.inf
        assert torch.allclose(got.lse[seen], want.lse[seen], atol=1e-5) and distance(got.out, want.out) < (5e-3 if pv == "fp8" else 1e-5)
    if softcap is not None and smooth:
        assert distance(want.out, exact(q, k, v, causal(75, 100))[0]) > 0.05  # the cap does something


def test_selections_of_any_kind() -> None:
    """Small, odd and unaligned tiles, single keys with weights: what is read is rounded alike whoever reads it."""
    q, k, v = draw(40, 90)
    g = torch.Generator().manual_seed(3)
    mixed = Selection.from_parts(
        n_q=40, n_k=90, block_q=20, block_k=12, starts=torch.tensor([3, 40, 70]).expand(1, 2, 2, 3),
        tokens=torch.randint(0, 90, (1, 2, 2, 9), generator=g), log_weight=torch.randn(1, 2, 2, 9, generator=g),
    )  # fmt: skip
    for selection in (mixed, tiles(40, 90, 8, 4), tiles(40, 90, 7, 96, heads=1)):
        want = attend_low_bit(q, k, v, selection, block_k=32, return_lse=True, impl="reference")
        got = attend_low_bit(q, k, v, selection, block_k=32, return_lse=True, impl="cpu")
        assert got.lse is not None and want.lse is not None
        assert torch.allclose(got.out, want.out, atol=1e-5) and torch.allclose(got.lse, want.lse, atol=1e-5)
        if selection.log_weight is None:
            mask = selection.expand(1, 4).dense_mask()
            assert distance(want.out, exact(q, k, v, mask)[0]) < 0.03


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_full_selection_equals_dense(impl: str) -> None:
    q, k, v = draw(70, 70)
    full = Selection.full(70, 70, block_q=32, block_k=64)
    for options in ({}, {"pv": "fp8"}, {"skip_below": 2.0}):
        a, b = (attend_low_bit(q, k, v, s, block_q=32, block_k=32, impl=impl, **options).out for s in (full, None))
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_filter_skips_what_it_should(impl: str) -> None:
    q, k, v = draw(64, 128, heads=2, kv_heads=1)
    q, k = q.abs(), 0.3 * k.abs()
    k[:, :, 64:96] -= 1.0  # one block below the others
    options = dict(causal=False, block_q=32, block_k=32, return_lse=True, smooth=False, impl=impl)
    off = attend_low_bit(q, k, v, **options)
    logits = q.double() @ k.double().mT * 32**-0.5 / math.log(2)
    gap = float((logits[..., :64].amax(-1) - logits[..., 64:96].amax(-1)).amin())  # base-2 exponents, of the row that is nearest
    keep = torch.ones(128, dtype=torch.bool)
    keep[64:96] = False
    without, _ = exact(q, k, v, keep)
    part = attend_low_bit(q, k, v, skip_below=gap - 1, **options)
    assert distance(part.out, without) < 0.02
    assert gap > 3 and distance(part.out, off.out) > 1e-3
    assert torch.allclose(attend_low_bit(q, k, v, skip_below=20.0, **options).out, off.out, atol=1e-6)
    assert torch.equal(attend_low_bit(q, k, v, skip_below=torch.inf, **options).out, attend_low_bit(q, k, v, skip_below=1e6, **options).out)
    assert torch.allclose(attend_low_bit(q, k, v, skip_below=torch.inf, **options).out, off.out, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, 1.0, 4.0, 8.0])
def test_a_skipped_tile_changes_a_sum_by_little(limit: float) -> None:
    q, k, v = draw(128, 256, dim=16)
    q = 4 * q
    options = dict(block_q=32, block_k=32, return_lse=True, impl="cpu")
    off, on = attend_low_bit(q, k, v, **options), attend_low_bit(q, k, v, skip_below=limit, **options)
    assert off.lse is not None and on.lse is not None
    lost = off.lse - on.lse
    assert bool((lost >= -1e-5).all()) and bool((lost <= math.log1p(8 * 32 * 2**-limit) + 1e-5).all())
    if limit == 0:
        assert float(lost.max()) > 1e-3  # tiles were skipped indeed


def test_rows_without_keys() -> None:
    q, k, v = draw(40, 24)
    part = attend_low_bit(q, k, v, return_lse=True, block_k=32)
    assert part.lse is not None
    assert bool((part.out[:, :, :16] == 0).all()) and bool((part.lse[:, :, :16] == -torch.inf).all())
    assert bool(part.out.isfinite().all()) and bool(part.lse[:, :, 16:].isfinite().all())
    for impl in ("reference", "cpu"):
        nothing = attend_low_bit(q, k[:, :, :0], v[:, :, :0], return_lse=True, impl=impl)
        assert nothing.lse is not None and bool((nothing.out == 0).all()) and bool((nothing.lse == -torch.inf).all())


def test_float64_and_half_precision() -> None:
    q, k, v = draw(50, 50)
    want = attend_low_bit(q.double(), k.double(), v.double(), return_lse=True)
    assert want.out.dtype == want.lse.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        part = attend_low_bit(q.to(dtype), k.to(dtype), v.to(dtype), return_lse=True)
        assert part.out.dtype == dtype and part.lse.dtype == torch.float32
        assert distance(part.out, want.out) < 0.02


def test_nothing_from_the_future() -> None:
    """Step sizes of a block of keys, and the mean key, hold for the whole call: only unrounded, a row depends on its past alone."""
    q, k, v = draw(96, 96)
    a = attend_low_bit(q, k, v, smooth=False, block_q=32, block_k=32).out
    k[:, :, 64:] = 50 * torch.randn_like(k[:, :, 64:])
    v[:, :, 64:] = torch.randn_like(v[:, :, 64:])
    b = attend_low_bit(q, k, v, smooth=False, block_q=32, block_k=32).out
    assert torch.equal(a[:, :, :64], b[:, :, :64])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = draw(20, 20)
    for options, message in (
        ({"qk": "int4"}, "int8, fp8"), ({"pv": "bf16"}, "same, fp16, fp8"), ({"block_k": 48}, "power of two"),
        ({"block_q": 512}, "power of two"), ({"skip_below": -1.0}, "at least 0"), ({"softcap": 0.0}, "positive"),
        ({"impl": "flex"}, "not one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attend_low_bit(q, k, v, **options)
    with pytest.raises(ValueError, match="no gradients"):
        attend_low_bit(q.requires_grad_(), k, v)
    with torch.no_grad():
        attend_low_bit(q, k, v)
    q = q.detach()
    with pytest.raises(ValueError, match="multiple of block_k"):
        attend_low_bit(q, k, v, tiles(20, 20, 8, 16), skip_below=3.0)
    with pytest.raises(ValueError, match="build it for these"):
        attend_low_bit(q, k, v, tiles(20, 30, 8, 16))
