"""Pages: their bounds hold, whatever the pieces in which keys came, and whatever was taken back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.parts.growing import Growing
from saccade.parts.pages import PageBounds


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest_by_page(q: Tensor, k: Tensor, size: int) -> Tensor:
    """max over each page's keys of q.k, `(B, Hq, pages)`."""
    products = (q.unflatten(1, (k.shape[1], -1)) @ k.mT).flatten(1, 2)
    return torch.stack([page.amax(-1) for page in products.split(size, dim=-1)], dim=-1)


def ranges(k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    pages = k.split(size, dim=2)
    return torch.stack([p.amax(2) for p in pages], 2), torch.stack([p.amin(2) for p in pages], 2)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 2, 5, 16]), pieces=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_ranges_in_pieces_equal_ranges_at_once(size: int, pieces: list[int], seed: int) -> None:
    k = draw(2, 2, sum(pieces) + 1, 4, seed=seed)
    pages = PageBounds(size)
    for piece in k.split([*pieces, 1], dim=2):
        pages.append(piece)
    highest, lowest = ranges(k, size)
    assert pages.n == k.shape[2] and pages.pages == highest.shape[2]
    assert torch.equal(pages.highest, highest) and torch.equal(pages.lowest, lowest)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_no_key_of_a_page_is_above_its_bound(size: int, n: int) -> None:
    k, q = draw(2, 2, n, 8), draw(2, 6, 8, seed=1)
    q[..., :2] = 0.0  # a channel without weight adds nothing, whatever its range
    pages = PageBounds(size)
    pages.append(k)
    bound, largest = pages.upper_bound(q), largest_by_page(q, k, size)
    assert bool((bound >= largest - 1e-12).all()) and bool(bound.isfinite().all())
    highest, lowest = ranges(k, size)
    per_channel = torch.maximum(
        q.unflatten(1, (2, 3)).unsqueeze(3) * highest.unsqueeze(2), q.unflatten(1, (2, 3)).unsqueeze(3) * lowest.unsqueeze(2)
    )
    assert float((bound - per_channel.sum(-1).flatten(1, 2)).abs().max()) < 1e-12
    if size == 1:
        assert float((bound - largest).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bounds_are_as_good_as_their_keys(dtype: torch.dtype) -> None:
    k, q = draw(1, 2, 70, 64, dtype=dtype), draw(1, 4, 64, seed=1, dtype=dtype)
    pages = PageBounds(16)
    pages.append(k)
    assert pages.highest.dtype == dtype
    largest = largest_by_page(q.double(), k.double(), 16)
    # ranges are keys' own values, exact in any dtype: only the float32 sum rounds
    assert bool((pages.upper_bound(q) >= largest - 1e-4).all())


@pytest.mark.parametrize("n", [0, 1, 15, 16, 31, 33, 47])
def test_taking_back_keeps_whole_pages(n: int) -> None:
    k = draw(1, 2, 47, 4)
    pages = PageBounds(16)
    pages.append(k)
    covered = pages.truncate(n)
    assert covered == (47 if n == 47 else n // 16 * 16) == pages.n
    pages.append(k[:, :, covered:])
    assert torch.equal(pages.highest, ranges(k, 16)[0]) and torch.equal(pages.lowest, ranges(k, 16)[1])


def test_rows_go_their_own_ways() -> None:
    k = draw(3, 2, 21, 4)
    pages = PageBounds(8)
    pages.append(k)
    rows = torch.tensor([2, 0, 2, 1])
    turned = copy.deepcopy(pages).reorder(rows)
    more = draw(4, 2, 9, 4, seed=2)
    turned.append(more)
    assert torch.equal(turned.highest, ranges(torch.cat([k[rows], more], 2), 8)[0])
    assert torch.equal(pages.highest, ranges(k, 8)[0])  # the first is left as it was
    assert PageBounds(8).reorder(rows).n == 0


def test_bytes_are_two_keys_a_page() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        k = draw(2, 2, 256, 64, dtype=dtype)
        pages = PageBounds(16)
        pages.append(k)
        assert pages.nbytes * 16 == 2 * k.numel() * k.element_size()


def test_a_looser_bound_for_larger_pages_and_outlier_channels() -> None:
    k, q = draw(1, 1, 4096, 64), draw(1, 1, 64, seed=1)
    spiky = k.clone()
    spiky[..., :2] *= 12

    def slack(keys: Tensor, size: int) -> float:
        pages = PageBounds(size)
        pages.append(keys)
        return float((pages.upper_bound(q) - largest_by_page(q, keys, size)).mean())

    by_size = [slack(k, size) for size in (1, 4, 16, 64)]
    assert by_size == sorted(by_size) and by_size[0] < 1e-9 and by_size[-1] > 2 * by_size[1]
    assert slack(spiky, 16) > 1.1 * slack(k, 16)


def test_empty_pages_have_no_bounds() -> None:
    with pytest.raises(ValueError, match="have no keys yet"):
        PageBounds(16).upper_bound(draw(1, 2, 8))


def test_a_growing_tensor_is_copied_seldom() -> None:
    long = Growing(torch.zeros(1, 1, 8192, 2))
    places = set()
    for _ in range(1024):
        places.add(long.append(torch.ones(1, 1, 1, 2)).data_ptr())
    assert len(places) <= 1024 // (8192 // 64) + 1
    assert long.nbytes <= (8192 + 1024) * 8 * (1 + 2 / 64)
    assert float(long.view.sum()) == 2 * 1024
