"""The Triton kernels of attend against the oracle: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.ops import attend, routes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter holds bfloat16 as bit patterns that its products don't understand
HALF = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def draw(
    n_q: int, n_k: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 32, dim_v: int | None = None, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n_q, dim), (kv_heads, n_k, dim), (kv_heads, n_k, dim_v or dim))
    return Case(*(torch.randn(batch, *shape, generator=g, dtype=torch.float64).to(DEVICE) for shape in shapes))


def blocks(
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    *,
    heads: int = 2,
    batch: int = 1,
    density: float = 0.4,
    causal: bool = True,
    seed: int = 1,
) -> Selection:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, math.ceil(n_q / block_q), math.ceil(n_k / block_k), generator=g) < density
    return Selection.from_block_mask(mask.to(DEVICE), block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)


def singles(n_q: int, n_k: int, block_q: int, *, heads: int = 2, share: float = 0.15, weights: bool = False, seed: int = 2) -> Selection:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, heads, math.ceil(n_q / block_q), n_k, generator=g) < share
    s = Selection.from_token_mask(mask.to(DEVICE), block_q=block_q, n_q=n_q, block_k=1)
    if not weights:
        return s
    tokens = s.tokens
    return Selection.from_parts(
        n_q=n_q, n_k=n_k, block_q=block_q, tokens=tokens, token_counts=s.token_counts,
        log_weight=torch.randn(tokens.shape, generator=g).to(DEVICE),
    )  # fmt: skip


def check(case: Case, selection: Selection | None, *, dtype: torch.dtype = torch.float32, grads: bool = False, **options) -> None:
    """Errors against float64 at most twice those of the reference computed in `dtype`, plus 1e-6; a loss over out and lse."""
    g = torch.Generator().manual_seed(9)
    shape = (*case.q.shape[:3], case.v.shape[3])
    d_out, d_lse = torch.randn(shape, generator=g).to(DEVICE), torch.randn(shape[:3], generator=g).to(DEVICE)

    def run(kind: torch.dtype, impl: str) -> list[Tensor]:
        q, k, v = (x.to(kind).requires_grad_(grads) for x in case)
        part = attend(q, k, v, selection, impl=impl, return_lse=True, **options)
        assert part.lse is not None
        seen = part.lse > -torch.inf
        results = [part.out.detach(), torch.where(seen, part.lse, 0.0).detach()]
        if grads:
            loss = (part.out.double() * d_out).sum() + (torch.where(seen, part.lse.double(), 0.0) * d_lse).sum()
            results += torch.autograd.grad(loss, (q, k, v))
        return [*results, seen]

    exact, plain, ours = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "triton")
    assert saccade.last_run().impl == "triton"
    assert torch.equal(exact.pop(), ours.pop())
    for name, e, p, o in zip(("out", "lse", "d_q", "d_k", "d_v"), exact, plain, ours, strict=False):
        assert o.shape == e.shape and bool(o.isfinite().all()), name
        error, allowed = float((o.double() - e).abs().max()), 2 * float((p.double() - e).abs().max()) + 1e-6
        # the oracle multiplies half precision in float32; a kernel rounds probabilities to the matrix units' type
        if dtype in HALF and name != "lse":
            allowed += 4 * torch.finfo(dtype).eps * float(e.abs().max())
        # float32 sums of many terms in another order
        elif name.startswith("d_"):
            allowed += 1e-6 * float(e.abs().max())
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_q", "n_k"), [(40, 40), (1, 33), (20, 50), (40, 24)])
def test_dense(n_q: int, n_k: int, causal: bool) -> None:
    check(draw(n_q, n_k), None, causal=causal, grads=n_q != 20)


@pytest.mark.parametrize("dim", [48, 80, 128, 256])
def test_head_dims(dim: int) -> None:
    check(draw(33, 33, dim=dim, dim_v=64 if dim == 48 else dim, heads=2, kv_heads=1), blocks(33, 33, 16, 16, heads=1), grads=dim == 48)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("selection", [None, blocks(70, 70, 32, 32), singles(70, 70, 16)])
def test_half_precision(selection: Selection | None, dtype: torch.dtype) -> None:
    check(draw(70, 70), selection, dtype=dtype, grads=True)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 32), (64, 16), (8, 4), (5, 12)])
def test_tiles_of_any_size_and_sharing(block_q: int, block_k: int, heads: int) -> None:
    check(draw(50, 70), blocks(50, 70, block_q, block_k, heads=heads), grads=heads == 2)


@pytest.mark.slow
def test_not_causal_tiles_with_a_tail() -> None:
    check(draw(50, 70, batch=2), blocks(50, 70, 16, 32, batch=2, causal=False), grads=True)


@pytest.mark.parametrize("weights", [True, False])
def test_single_keys(weights: bool) -> None:
    check(draw(40, 60), singles(40, 60, 8, weights=weights), grads=True)


@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_and_single_keys_in_one_softmax(aligned: bool) -> None:
    g = torch.Generator().manual_seed(3)
    first = torch.tensor([0, 32, 64] if aligned else [3, 40, 70])
    s = Selection.from_parts(
        n_q=96, n_k=96, block_q=32, block_k=16, starts=first.expand(1, 2, 3, 3).to(DEVICE),
        tokens=torch.randint(0, 96, (1, 2, 3, 7), generator=g).to(DEVICE), log_weight=torch.randn(1, 2, 3, 7, generator=g).to(DEVICE),
    )  # fmt: skip
    check(draw(96, 96), s, grads=True)


def test_rows_that_read_nothing() -> None:
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=DEVICE)
    mask[..., 1, 0] = True
    s = Selection.from_block_mask(mask, block_q=16, block_k=16, n_q=32, n_k=32)
    case = draw(32, 32)
    check(case, s, grads=True)
    part = attend(*(x.float() for x in case), s, impl="triton", return_lse=True)
    assert part.lse is not None
    assert bool((part.out[:, :, :16] == 0).all()) and bool((part.lse[:, :, :16] == -torch.inf).all())


def test_softcap_bias_and_scale() -> None:
    check(draw(33, 40), None, softcap=2.0, scale=0.7, grads=True)
    bias = torch.randn(1, 4, 1, 40, device=DEVICE)
    check(draw(33, 40), blocks(33, 40, 16, 16), bias=bias)
    check(draw(33, 40), None, scale=-0.3)


def test_views_into_larger_buffers() -> None:
    """A growing cache and a transposed projection are read in place, and what lies beyond the last key is never looked at."""
    case = draw(30, 48)
    buffer = [torch.full((1, 2, 64, 32), torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for held, x in zip(buffer, (case.k, case.v), strict=True):
        held[:, :, :48] = x.half()
    q = case.q.half().transpose(1, 2).contiguous().transpose(1, 2)
    for s in (None, blocks(30, 48, 16, 32), singles(30, 48, 16)):
        a = attend(q, buffer[0][:, :, :48], buffer[1][:, :, :48], s, impl="triton").out
        b = attend(q.contiguous(), case.k.half(), case.v.half(), s, impl="triton").out
        assert torch.equal(a, b)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come full of nan; what the kernels leave unwritten would show."""
    plain = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    from saccade.ops.attend.triton.launch import forward, lists_of
    from saccade.ops.attend.triton.launch_backward import backward

    q, k, v = (x.float() for x in draw(37, 45))
    monkeypatch.setattr(torch, "empty", poisoned)
    for s in (None, blocks(37, 45, 16, 16), singles(37, 45, 8)):
        lists = None if s is None else lists_of(s)
        out, lse = forward(q, k, v, lists, None, causal=True, scale=0.2, softcap=0.0, need_lse=True)
        grads = backward(q, k, v, out, lse, torch.ones_like(out), None, lists, causal=True, scale=0.2, softcap=0.0)
        assert all(bool(x.isfinite().all()) for x in (out, *grads))
        assert not bool(lse.isnan().any())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 45),
    st.integers(1, 45),
    st.sampled_from((1, 3, 16, 32)),
    st.sampled_from((1, 4, 16, 32)),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_selections(n_q: int, n_k: int, block_q: int, block_k: int, causal: bool, seed: int) -> None:
    s = blocks(n_q, n_k, block_q, block_k, causal=causal, density=0.3, seed=seed)
    if causal and seed % 2:
        s = s | singles(n_q, n_k, block_q, seed=seed)
    check(draw(n_q, n_k, seed=seed), s)


def test_same_result_twice() -> None:
    q, k, v = (x.half() for x in draw(70, 70))
    s = blocks(70, 70, 32, 32)
    a, b = (attend(q, k, v, s, impl="triton").out for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("over", ["out", "lse", "both"])
def test_gradients_through_the_op_are_those_of_a_plain_call(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.float().requires_grad_() for x in draw(40, 40))
    s, found = blocks(40, 40, 16, 16), []
    for unwatched in (True, False):
        monkeypatch.setattr(routes, "unwatched", lambda *_, answer=unwatched: answer)
        part = attend(q, k, v, s, return_lse=True, impl="triton")
        assert part.lse is not None
        losses = {"out": part.out.square().sum(), "lse": torch.where(part.lse > -torch.inf, part.lse, 0.0).square().sum()}
        loss = losses["out"] + losses["lse"] if over == "both" else losses[over]
        found.append(torch.autograd.grad(loss, (q, k) if over == "lse" else (q, k, v)))
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*found, strict=True))


def test_operators_are_sound_for_the_compiler() -> None:
    """Fake shapes, autograd registration and schema, as torch checks them."""
    from saccade.ops.attend.triton import _attend
    from saccade.ops.attend.triton.launch import lists_of

    q, k, v = (x.float().requires_grad_() for x in draw(20, 20))
    args = (q, k, v, *lists_of(blocks(20, 20, 16, 16)), *(None,) * 8, True, 0.2, 0.0, True)
    torch.library.opcheck(_attend, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_what_cannot_run_is_refused() -> None:
    case = draw(8, 8)
    with pytest.raises(ValueError, match="float64"):
        attend(*case, impl="triton")
    q, k, v = (x.float() for x in case)
    with pytest.raises(ValueError, match="bias"):
        attend(q, k, v, bias=torch.zeros(1, 1, 1, 8, device=DEVICE, requires_grad=True), impl="triton")
