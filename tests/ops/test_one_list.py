"""Selections whose query tiles read the front parts of one token list: every executor gives what it gives for written lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.ops import attend
from saccade.ops.attend import attend_low_bit
from saccade.ops.decode import decode, decode_low_rank
from tests.core.cases import OneList, make_one_list

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(both: OneList) -> tuple[Selection, Selection]:
    """The shared list and the written ones on the device."""
    shared, written = (
        Selection(**{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in vars(s).items()})
        for s in (both.shared, both.written)
    )
    assert shared.tokens.shape[2] == 1 and shared.tokens.shape[-1] and bool((shared.token_counts > 0).any())
    return shared, written


def lists(n_q: int, n_k: int, *, block_q: int, block_k: int, heads: int, causal: bool, weighted: bool = False, seed: int = 0) -> OneList:
    return make_one_list(
        n_q=n_q, n_k=n_k, causal=causal, block_q=block_q, block_k=block_k, batch=2, heads=heads, weighted=weighted, seed=seed
    )


def tensors(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, dim: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = ((4, n_q), (2, n_k), (2, n_k))
    return [torch.randn(2, *shape, dim, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def results(given: list[Tensor], s: Selection, impl: str, grads: bool, **options) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_(grads) for x in given)
    part = attend(q, k, v, s, impl=impl, return_lse=True, **options)
    assert part.lse is not None and saccade.last_run().impl == impl
    found = [part.out.detach(), part.lse.detach()]
    return found + list(torch.autograd.grad(part.out.square().sum(), (q, k, v))) if grads else found


def alike(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=False)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20), sizes=st.sampled_from([(1, 1), (16, 8), (7, 5)]), heads=st.sampled_from([1, 2, 4]),
    n_q=st.integers(1, 50), causal=st.booleans(), weighted=st.booleans(), grads=st.booleans(),
)  # fmt: skip
def test_reference_and_cpu(
    seed: int, sizes: tuple[int, int], heads: int, n_q: int, causal: bool, weighted: bool, grads: bool
) -> None:
    both = lists(n_q, 50, block_q=sizes[0], block_k=sizes[1], heads=heads, causal=causal, weighted=weighted, seed=seed)
    given = tensors(n_q, 50, torch.float64)
    want = results(given, both.written, "reference", grads)
    alike(results(given, both.shared, "reference", grads), want, 0.0)
    alike(results(given, both.shared, "cpu", grads), want, 1e-6 if weighted else 1e-10)
    positions = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[None, None]
    options = {"lengths": torch.tensor([50, 31]), "q_positions": positions[..., 50 - n_q :], "k_positions": positions}
    options = options if causal else {"lengths": options["lengths"]}
    want = results(given, both.written, "cpu", grads, **options)
    alike(results(given, both.shared, "cpu", grads, **options), want, 1e-6 if weighted else 1e-10)


@pytest.fixture
def kept_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may write a shared list out: 2048 tiles times tens of thousands of keys fit nowhere."""

    def refuse(*_) -> None:
        raise AssertionError("a list was written out for every query tile")

    for name in ("tokens_of", "own_lists"):
        monkeypatch.setattr(Selection, name, refuse)


@pytest.mark.parametrize(
    ("heads", "causal", "weighted"),
    [(2, True, True), pytest.param(1, True, False, marks=pytest.mark.slow), pytest.param(4, False, False, marks=pytest.mark.slow)],
)
def test_triton(heads: int, causal: bool, weighted: bool, kept_short: None) -> None:
    shared, written = moved(lists(24, 40, block_q=16, block_k=16, heads=heads, causal=causal, weighted=weighted, seed=heads))
    given = tensors(24, 40)
    got = results(given, shared, "triton", True)
    # sums of single keys' gradients are added in any order on a GPU
    alike(got, results(given, written, "triton", True), 1e-5)
    alike(got, results(given, written, "cpu", True), 1e-4)


def test_counting_and_the_gathering_executor_search_the_list_itself(kept_short: None) -> None:
    shared, written = moved(lists(60, 70, block_q=16, block_k=16, heads=2, causal=True, seed=6))
    given = tensors(60, 70)
    for grads in (False, True):
        alike(results(given, shared, "cpu", grads), results(given, written, "cpu", grads), 1e-6)
    for causal in (True, False):
        assert torch.equal(replace(shared, causal=causal).pairs(), replace(written, causal=causal).pairs())


def test_low_bit() -> None:
    both = moved(lists(20, 40, block_q=10, block_k=12, heads=2, causal=True, weighted=True, seed=3))
    given = tensors(20, 40, dim=32)
    for impl in ("reference", "cpu", "triton"):
        a, b = (attend_low_bit(*given, s, block_k=32, return_lse=True, impl=impl) for s in both)
        assert a.lse is not None and b.lse is not None
        alike([a.out, a.lse], [b.out, b.lse], 1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_decode(impl: str) -> None:
    both = moved(lists(3, 40, block_q=2, block_k=8, heads=2, causal=True, weighted=True, seed=2))
    given = tensors(3, 40)
    for options in ({}, {"lengths": torch.tensor([40, 25], device=DEVICE)}):
        a, b = (decode(*given, s, return_lse=True, impl=impl, **options) for s in both)
        assert a.lse is not None and b.lse is not None
        alike([a.out, a.lse], [b.out, b.lse], 1e-6)
    if impl != "reference":
        g = torch.Generator().manual_seed(3)
        factors, basis = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((2, 2, 40, 8), (2, 8, 16)))
        turned = (torch.ones(40, 8, device=DEVICE), torch.zeros(40, 8, device=DEVICE))
        a, b = (
            decode_low_rank(given[0], factors, basis, given[2], rotary=turned, selection=s, return_lse=True, impl=impl) for s in both
        )
        assert a.lse is not None and b.lse is not None
        alike([a.out, a.lse], [b.out, b.lse], 1e-5)
