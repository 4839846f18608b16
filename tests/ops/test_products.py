"""Scores of many stored rows and of packed codes: the kernels against float64, for every reduction over the heads of a group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from saccade.ops.estimate import Reduce, last_estimate, packed_products, row_products
from saccade.ops.gpu import has_triton
from saccade.ops.quant import affine_quantise, pack, unpack
from saccade.parts.heads import reduce_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REDUCTIONS: tuple[Reduce, ...] = ("none", "group_max", "group_sum")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 tokens, and outputs that begin as nan."""
    from saccade.ops.estimate.triton import packed_products as codes
    from saccade.ops.estimate.triton import products as rows

    def poisoned(x: Tensor, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=x.device)

    monkeypatch.setattr(rows, "BLOCK_N", 32)
    monkeypatch.setattr(codes, "LEAST", 32)
    monkeypatch.setattr(codes, "MOST", 32)
    for module in (rows, codes):
        monkeypatch.setattr(module, "empty", poisoned)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def labels(
    batch: int, kv_heads: int, n: int, dim: int, bits: int, dtype: torch.dtype, room: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes and ranges of normal rows, with room behind them as storage that grows has it."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, kv_heads, n + room, dim, generator=g) + 0.5).to(dtype)
    codes, step, lowest = affine_quantise(x, bits)
    ranges = torch.cat([step, lowest], -1)
    return pack(codes, bits).to(DEVICE)[:, :, :n], ranges.to(DEVICE)[:, :, :n]


def query(batch: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(batch, heads, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# -- stored rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 1, 50])
def test_a_reduction_is_that_of_the_single_scores(dtype: torch.dtype, reduce: Reduce, n: int) -> None:
    q = query(2, 6, 16, dtype)
    stored = torch.randn(2, 2, 60, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)[:, :, :n]
    single = row_products(q, stored, impl="reference")
    got = row_products(q, stored, reduce=reduce, impl="reference")
    assert got.shape == (2, 6 if reduce == "none" else 2, n) and got.dtype == single.dtype
    assert torch.equal(got, reduce_heads(single, 2, reduce))


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "n", "dim"), [(2, 2, 33, 48), (4, 1, 32, 8), (14, 2, 50, 96), (20, 1, 1, 32)])
@pytest.mark.parametrize(("dtype", "exact_query"), [(torch.bfloat16, False), (torch.float16, True)])
def test_reduced_products(reduce: Reduce, heads: int, kv_heads: int, n: int, dim: int, dtype: torch.dtype, exact_query: bool) -> None:
    stored = torch.randn(2, kv_heads, n + 3, dim, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)[:, :, :n]
    q = query(2, heads, dim, torch.float32 if exact_query else dtype)
    got, plain = (row_products(q, stored, reduce=reduce, impl=impl) for impl in ("triton", "reference"))
    want = row_products(q.double(), stored.double(), reduce=reduce)
    assert got.shape == want.shape == (2, heads if reduce == "none" else kv_heads, n) and got.dtype == torch.float32
    assert error(got, want) <= 2 * error(plain, want) + 1e-6


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_that_fill_the_tile_up_say_nothing(sign: int) -> None:
    """A group of 3 in a tile of 16: zeros for the other 13 would be the highest of negative scores, repeated heads would be summed."""
    q, stored = (torch.ones(shape, device=DEVICE, dtype=torch.float16) for shape in ((1, 3, 16), (1, 1, 20, 16)))
    q *= torch.tensor([1.0, 2.0, 3.0], device=DEVICE, dtype=torch.float16).unsqueeze(-1) * sign
    highest, together = (row_products(q, stored, reduce=reduce, impl="triton") for reduce in ("group_max", "group_sum"))
    assert bool((highest == (48 if sign > 0 else -16)).all()) and bool((together == 96 * sign).all())


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_bit_of_a_float32_query_is_lost(dtype: torch.dtype) -> None:
    """All 24 bits of it are in its terms: rows that are 1 in one channel give the channel back."""
    q = torch.randint(2**23, 2**24, (2, 6, 24), generator=torch.Generator().manual_seed(0)).float() * torch.tensor([1.0, -(2.0**-30)] * 12)
    stored = torch.eye(24).expand(2, 2, 24, 24)
    got = row_products(q.to(DEVICE), stored.to(DEVICE, dtype), impl="triton")
    assert torch.equal(got.cpu(), q)


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reduce", ["group_max", "group_sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_nan_and_an_infinity_stay_what_they_are(reduce: Reduce, dtype: torch.dtype) -> None:
    q = query(1, 6, 16, dtype).abs()
    stored = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    stored[0, 0, 7, 3], stored[0, 1, 5, 2], stored[0, 1, 6, 2] = torch.nan, torch.inf, -torch.inf
    q[0, 1] = torch.nan  # one head of the first group
    got = row_products(q, stored, reduce=reduce, impl="triton")
    want = row_products(q, stored, reduce=reduce, impl="reference")
    assert bool(got[0, 0].isnan().all()) and torch.equal(got[0, 1].isinf(), want[0, 1].isinf())
    assert not bool(got[0, 1].isnan().any()) and float(got[0, 1, 5]) == torch.inf and float(got[0, 1, 6]) == -torch.inf


# -- packed codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_packed_products_are_those_of_the_restored_rows(bits: int, reduce: Reduce) -> None:
    codes, ranges = labels(2, 2, 30, 10, bits, torch.float64)
    q = query(2, 6, 10, torch.float64)
    restored = ranges[..., 1:] + ranges[..., :1] * unpack(codes, bits, 10)
    got = packed_products(q, codes, ranges, bits, 10, reduce=reduce)
    assert last_estimate().op == "packed_products" and last_estimate().impl == "reference"
    want = row_products(q, restored, reduce=reduce)
    assert got.dtype == torch.float64 and got.shape == want.shape == (2, 6 if reduce == "none" else 2, 30)
    assert float((got - want).abs().max()) < 1e-12


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "dim", "dtype"),
    [(2, 2, 33, 8, torch.bfloat16), (8, 2, 70, 8, torch.bfloat16), (7, 1, 32, 24, torch.float16), (4, 1, 1, 6, torch.float32)],
)
def test_packed_kernel(reduce: Reduce, bits: int, heads: int, kv_heads: int, n: int, dim: int, dtype: torch.dtype) -> None:
    codes, ranges = labels(2, kv_heads, n, dim, bits, dtype, room=5)
    q = query(2, heads, dim, dtype)
    got, plain = (packed_products(q, codes, ranges, bits, dim, reduce=reduce, impl=impl) for impl in ("triton", "reference"))
    want = packed_products(q.double(), codes, ranges.double(), bits, dim, reduce=reduce)
    assert got.shape == want.shape == (2, heads if reduce == "none" else kv_heads, n) and got.dtype == torch.float32
    assert error(got, want) <= 2 * error(plain, want) + 1e-6
    assert last_estimate().op == "packed_products"


@needs_triton
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("bits", "dim"), [(1, 33), (2, 3), (2, 16), (4, 8), (4, 33), (8, 3), (8, 16)])
def test_packed_kernel_is_exact_on_whole_numbers(reduce: Reduce, bits: int, dim: int) -> None:
    """Every code at every place of its word; bytes past the last code hold ones, and rows lie a byte off."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (1, 2, 41, dim), generator=g).to(torch.uint8)
    filled = pack(torch.cat([codes, torch.full((1, 2, 41, -dim * bits % 8 // bits), (1 << bits) - 1, dtype=torch.uint8)], -1), bits)
    off = torch.empty(filled.numel() + 1, dtype=torch.uint8)[1:].view_as(filled).copy_(filled)
    ranges = torch.randint(-8, 8, (1, 2, 41, 2), generator=g).float()
    q = torch.randint(-4, 5, (1, 6, dim), generator=g).float()
    want = packed_products(q.double(), pack(codes, bits), ranges.double(), bits, dim, reduce=reduce)
    for stored in (filled, off):
        got = packed_products(q.to(DEVICE), stored.to(DEVICE), ranges.to(DEVICE), bits, dim, reduce=reduce, impl="triton")
        assert torch.equal(got.cpu().double(), want)


@needs_triton
@pytest.mark.parametrize("strided", ["codes", "ranges", "queries"])
def test_storage_may_lie_in_any_order(strided: str) -> None:
    codes, ranges = labels(2, 2, 20, 8, 4, torch.bfloat16)
    q = query(2, 4, 8, torch.bfloat16)
    want = packed_products(q, codes, ranges, 4, 8, impl="triton")
    turned = {"codes": codes, "ranges": ranges, "queries": q}
    turned[strided] = turned[strided].mT.contiguous().mT
    got = packed_products(turned["queries"], turned["codes"], turned["ranges"], 4, 8, impl="triton")
    assert torch.equal(got, want)


def test_no_tokens() -> None:
    codes, ranges = labels(2, 2, 0, 8, 4, torch.float32, room=4)
    for reduce in REDUCTIONS:
        assert packed_products(query(2, 6, 8, torch.float32), codes, ranges, 4, 8, reduce=reduce).shape == (
            2, 6 if reduce == "none" else 2, 0,
        )  # fmt: skip


def test_words_are_as_long_as_places_allow() -> None:
    pytest.importorskip("triton")
    from saccade.ops.estimate.triton.packed_products import _words

    def longest(n: int, width: int, skip: int = 0) -> int:
        x = torch.zeros(1 * 2 * n * width + skip, dtype=torch.uint8)[skip:].view(1, 2, n, width)
        return _words(x).element_size()

    assert (longest(9, 4), longest(9, 2), longest(9, 6), longest(9, 3), longest(9, 4, skip=1), longest(9, 8)) == (4, 2, 2, 1, 1, 4)


@needs_triton
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_what_a_compiler_is_told_of_the_results(reduce: Reduce) -> None:
    from saccade.ops.estimate.triton.packed_products import packed
    from saccade.ops.estimate.triton.products import products

    with FakeTensorMode():
        q, rows = torch.empty(2, 6, 8, dtype=torch.bfloat16), torch.empty(2, 2, 9, 8, dtype=torch.bfloat16)
        codes, ranges = torch.empty(2, 2, 9, 4, dtype=torch.uint8), torch.empty(2, 2, 9, 2, dtype=torch.bfloat16)
        for told in (products(q, rows, reduce), packed(q, codes, ranges, 4, reduce)):
            assert told.shape == (2, 6 if reduce == "none" else 2, 9) and told.dtype == torch.float32


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    codes, ranges = labels(1, 2, 5, 8, 4, torch.float32)
    q = query(1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="row_products: reduce 'max' is not one of none, group_max, group_sum"):
        row_products(q, torch.zeros(1, 2, 5, 8), reduce="max")
    with pytest.raises(ValueError, match="packed_products: reduce 'vote' is not one of"):
        packed_products(q, codes, ranges, 4, 8, reduce="vote")
    with pytest.raises(ValueError, match="do not hold 8 codes of 8 bits"):
        packed_products(q, codes, ranges, 8, 8)
    with pytest.raises(ValueError, match="do not hold 8 codes of 4 bits"):
        packed_products(q, codes, ranges[..., :1], 4, 8)
    with pytest.raises(ValueError, match=r"queries .* do not fit codes"):
        packed_products(q[:, :3], codes, ranges, 4, 8)
    with pytest.raises(ValueError, match="bits=9"):
        packed_products(q, codes, ranges, 9, 8)


@needs_triton
def test_the_kernel_refuses_bits_that_cross_bytes_and_auto_does_not() -> None:
    codes, ranges = labels(1, 2, 5, 8, 3, torch.float32)
    q = query(1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="takes 1, 2, 4, 8 bits, not 3"):
        packed_products(q, codes, ranges, 3, 8, impl="triton")
    assert packed_products(q, codes, ranges, 3, 8).shape == (1, 4, 5) and last_estimate().impl == "reference"
    codes, ranges = labels(1, 2, 5, 8, 4, torch.float64)
    with pytest.raises(ValueError, match=r"bfloat16 queries, not torch\.float64"):
        packed_products(q.double(), codes, ranges, 4, 8, impl="triton")
    with pytest.raises(ValueError, match=r"bfloat16 ranges, not torch\.float64"):
        packed_products(q, codes, ranges, 4, 8, impl="triton")
