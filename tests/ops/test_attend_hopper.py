"""The Hopper kernel against the oracle, on the cases that are its own: 128-query tiles, half precision, whole and cut tails."""

from __future__ import annotations

import pytest
import torch

from saccade.core import Selection
from saccade.ops import attend

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if not HOPPER:
        pytest.skip("no Hopper GPU")


def tensors(n_q: int, n_k: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device="cuda").manual_seed(seed)
    return tuple(torch.randn(2, h, n, dim, device="cuda", dtype=dtype, generator=g) for h, n in ((4, n_q), (2, n_k), (2, n_k)))


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection | None, causal: bool = True) -> None:
    from saccade.ops.attend.triton.hopper import takes
    from saccade.ops.attend.triton.launch import lists_of

    assert takes(q, k, v, None if selection is None else lists_of(selection), 1.0)
    exact = attend(q.double(), k.double(), v.double(), selection, causal=causal, impl="reference", return_lse=True)
    plain = attend(q, k, v, selection, causal=causal, impl="reference")
    ours = attend(q, k, v, selection, causal=causal, impl="triton", return_lse=True)
    assert exact.lse is not None and ours.lse is not None
    eps = torch.finfo(q.dtype).eps
    allowed = 2 * float((plain.out.double() - exact.out).abs().max()) + 4 * eps * float(exact.out.abs().max()) + 1e-6
    assert float((ours.out.double() - exact.out).abs().max()) <= allowed
    seen = exact.lse > -torch.inf
    assert torch.equal(seen, ours.lse > -torch.inf)
    assert float((ours.lse.double() - exact.lse)[seen].abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("n_q", "n_k"), [(512, 512), (1, 1), (300, 300), (129, 700), (256, 192), (400, 77)])
@pytest.mark.parametrize("causal", [True, False])
def test_dense(n_q: int, n_k: int, dim: int, dtype: torch.dtype, causal: bool) -> None:
    check(*tensors(n_q, n_k, dim, dtype), None, causal)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize(("n_q", "n_k"), [(640, 640), (500, 500), (200, 1000)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles(n_q: int, n_k: int, block_k: int, heads: int, causal: bool) -> None:
    g = torch.Generator(device="cuda").manual_seed(3)
    mask = torch.rand(2, heads, -(-n_q // 128), -(-n_k // block_k), device="cuda", generator=g) < 0.4
    s = Selection.from_block_mask(mask, block_q=128, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)
    check(*tensors(n_q, n_k, 128, torch.bfloat16), s, causal)


def test_tiles_that_begin_anywhere() -> None:
    starts = torch.tensor([0, 70, 201, 333], device="cuda").expand(1, 2, 4, 4)
    s = Selection.from_parts(n_q=500, n_k=500, block_q=128, block_k=64, starts=starts)
    check(*tensors(500, 500, 128, torch.bfloat16), s)


def test_what_lies_past_the_last_key_is_never_looked_at() -> None:
    q, k, v = tensors(300, 300, 128, torch.bfloat16)
    wide = [torch.full((2, 2, 512, 128), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for held, x in zip(wide, (k, v), strict=True):
        held[:, :, :300] = x
    a = attend(q, wide[0][:, :, :300], wide[1][:, :, :300], impl="triton").out
    assert torch.equal(a, attend(q, k, v, impl="triton").out)


def test_projections_are_read_in_place() -> None:
    q, k, v = tensors(256, 256, 128, torch.bfloat16)
    mixed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attend(*mixed, impl="triton").out, attend(q, k, v, impl="triton").out)


def test_a_graph_replays_it() -> None:
    q, k, v = tensors(512, 512, 128, torch.bfloat16)
    expected = attend(q, k, v, impl="triton").out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, impl="triton").out
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def gradients(x: tuple[torch.Tensor, ...], selection: Selection | None, causal: bool, impl: str, weights: tuple[torch.Tensor, ...]) -> list:
    leaves = [y.detach().requires_grad_() for y in x]
    part = attend(*leaves, selection, causal=causal, impl=impl, return_lse=True)
    assert part.lse is not None
    d_out, d_lse = weights
    lse = torch.where(part.lse > -torch.inf, part.lse, 0.0)
    return list(torch.autograd.grad((part.out.to(d_out.dtype) * d_out).sum() + (lse * d_lse).sum(), leaves))


def check_gradients(x: tuple[torch.Tensor, ...], selection: Selection | None, causal: bool) -> None:
    from saccade.ops.attend.triton.hopper_backward import takes
    from saccade.ops.attend.triton.launch import lists_of

    assert takes(*x, None if selection is None else lists_of(selection))
    g = torch.Generator(device="cuda").manual_seed(9)
    d_out = torch.randn(x[0].shape, device="cuda", generator=g).to(x[0].dtype)
    weights = d_out.double(), torch.randn(x[0].shape[:3], device="cuda", generator=g, dtype=torch.float64)
    exact = gradients(tuple(y.double() for y in x), selection, causal, "reference", weights)
    halves = d_out, weights[1].float()
    plain = gradients(x, selection, causal, "reference", halves)
    ours = gradients(x, selection, causal, "triton", halves)
    again = gradients(x, selection, causal, "triton", halves)
    eps = torch.finfo(x[0].dtype).eps
    for a, b, c, same in zip(ours, plain, exact, again, strict=True):
        assert torch.equal(a, same)
        error, theirs = ((y.double() - c).norm() / c.norm() for y in (a, b))
        assert float(error) <= 2 * float(theirs) + eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("n_q", "n_k"), [(512, 512), (128, 128), (128, 640), (384, 256)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_dense(n_q: int, n_k: int, dim: int, dtype: torch.dtype, causal: bool) -> None:
    check_gradients(tensors(n_q, n_k, dim, dtype), None, causal)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block_k", [128, 256])
@pytest.mark.parametrize(("n_q", "n_k"), [(768, 768), (256, 1024)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_tiles(n_q: int, n_k: int, block_k: int, heads: int, causal: bool) -> None:
    g = torch.Generator(device="cuda").manual_seed(3)
    mask = torch.rand(2, heads, -(-n_q // 128), -(-n_k // block_k), device="cuda", generator=g) < 0.4
    s = Selection.from_block_mask(mask, block_q=128, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)
    check_gradients(tensors(n_q, n_k, 128, torch.bfloat16), s, causal)
