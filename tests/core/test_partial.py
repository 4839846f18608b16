"""merge: attention over parts of the keys, combined, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saccade.core import Partial, merge
from tests.core.cases import few


def part(logits: Tensor, v: Tensor, chosen: Tensor) -> Partial:
    """Softmax attention `(1, H, m, d)` over the chosen keys alone, in the dtype of v; 0 and -inf for a row without one."""
    logits = logits.masked_fill(~chosen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return Partial((weights @ v.to(logits.dtype)).to(v.dtype), lse)


@few
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.sampled_from([1.0, 30.0, 1000.0]), st.integers(0, 10**6)
)
def test_merging_disjoint_parts_is_the_softmax_over_all(
    rows: int, n: int, parts: int, seen: float, sharpness: float, seed: int
) -> None:
    """Rows may see nothing in a part, or nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 2, rows, n, generator=generator, dtype=torch.float64) * sharpness
    v = torch.randn(1, 2, n, 3, generator=generator, dtype=torch.float64)
    visible = torch.rand(1, 2, rows, n, generator=generator) < seen
    owner = torch.randint(0, parts, (1, 2, 1, n), generator=generator)
    got = merge(*(part(logits, v, visible & (owner == i)) for i in range(parts)))
    whole = part(logits, v, visible)
    assert got.lse is not None and whole.lse is not None
    assert torch.allclose(got.out, whole.out, rtol=0, atol=1e-12)
    assert torch.allclose(got.lse, whole.lse, rtol=1e-12, atol=1e-12, equal_nan=False)
    empty = ~visible.any(-1)
    assert not got.out[empty].any() and bool((got.lse[empty] == -torch.inf).all())


@few
@given(st.permutations(range(4)), st.integers(1, 3), st.integers(0, 10**6))
def test_order_and_nesting_do_not_matter(order: list[int], split: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1, 3, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 1, 8, 2, generator=generator, dtype=torch.float64)
    pieces = [part(logits, v, torch.arange(8) // 2 == i) for i in order]
    nested = merge(merge(*pieces[:split]), merge(*pieces[split:]))
    flat = merge(*pieces)
    assert torch.allclose(nested.out, flat.out, atol=1e-12)
    assert nested.lse is not None and flat.lse is not None and torch.allclose(nested.lse, flat.lse, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_its_dtype_and_the_sum_its_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 5, 64, generator=generator)
    v = torch.randn(1, 2, 64, 4, generator=generator).to(dtype)
    whole = part(logits, v, torch.ones(64, dtype=torch.bool))
    got = merge(*(part(logits, v, torch.arange(64) // 16 == i) for i in range(4)))
    assert got.out.dtype == dtype and got.lse is not None and got.lse.dtype == torch.float32
    exact = (logits.double().softmax(-1) @ v.double())
    allowed = 2 * float((whole.out.double() - exact).abs().max()) + torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((got.out.double() - exact).abs().max()) <= allowed


def test_what_cannot_be_merged_is_refused() -> None:
    good = Partial(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2))
    assert merge(good) is good
    with pytest.raises(ValueError, match="at least one"):
        merge()
    with pytest.raises(ValueError, match="return_lse=True"):
        merge(good, Partial(good.out, None))
    with pytest.raises(ValueError, match="shapes"):
        merge(good, Partial(torch.zeros(1, 1, 2, 4), good.lse))
