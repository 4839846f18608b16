"""The descent of a tree of key ranges: the kernel finds what the plain descent finds, whatever the shape, and scores that tie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from saccade.ops.estimate import descend_tree, last_estimate
from saccade.ops.gpu import has_triton
from tests.ops.marks import long_when_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (1, 6, 7, 29)
    keep: int = 6
    block: int = 2
    stride: int = 1
    first: int = 3
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    sampled: int = 5
    dim: int = 16

    def inputs(self, spread: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Whole numbers, whose products are the same in any order of adding; keys as storage that grows has them, with room behind."""
        g = torch.Generator().manual_seed(self.keep)
        n_k = self.first + self.sizes[-1] * self.block
        rows = torch.randint(-spread, spread + 1, (self.batch, self.heads, len(self.sizes), self.sampled, self.dim), generator=g)
        k = torch.randint(-spread, spread + 1, (self.batch, self.kv_heads, n_k + 9, self.dim), generator=g)
        return rows.to(DEVICE, dtype), k.to(DEVICE, dtype)[:, :, :n_k], torch.tensor(self.sizes)

    def find(self, rows: Tensor, k: Tensor, sizes: Tensor, impl: str) -> Tensor:
        return descend_tree(rows, k, sizes, self.keep, first=self.first, block=self.block, stride=self.stride, impl=impl)


def plain(case: Case, rows: Tensor, k: Tensor, size: int) -> list[int]:
    """The algorithm as it is written, for one tile `rows (R, D)` and the keys `(n_k, D)` of its head."""
    ranges = [(j * size // case.keep, (j + 1) * size // case.keep) for j in range(case.keep)]
    while any(end - begin > 1 for begin, end in ranges):
        halves = [half for b, e in ranges for half in ((b, (b + e + 1) // 2), ((b + e + 1) // 2, e)) if half[0] < half[1]]
        scores = []
        for begin, end in halves:
            at = case.first + (begin + end - 1) // 2 * case.block
            scores.append(float((rows @ k[at : at + case.block : case.stride].T).max()))
        best = sorted(range(len(halves)), key=lambda i: (-scores[i], i))[: case.keep]
        ranges = [halves[i] for i in sorted(best)]
    return [begin for begin, _ in ranges]


CASES = [
    Case(),
    Case(keep=7, block=3, heads=4, kv_heads=2, sampled=1),
    Case(keep=16, block=3, stride=2, sampled=17, dim=48),
    Case(keep=1, sizes=(1, 2, 3, 64), block=1, first=0),
    Case(sizes=(5, 17), keep=5, block=4, stride=3, batch=2, heads=4, kv_heads=2, sampled=3),
    Case(keep=33, sizes=(33, 34, 70), block=1, heads=1, sampled=32, dim=24),
]


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spread", [1, 30])
def test_the_kernel_finds_what_the_plain_descent_finds(case: Case, spread: int) -> None:
    """With a spread of 1 most scores tie."""
    given = case.inputs(spread)
    got, want = (case.find(*given, impl) for impl in ("triton", "reference"))
    assert got.dtype == torch.int64 and got.shape == (case.batch, case.heads, len(case.sizes), case.keep)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.slow
def test_both_follow_the_algorithm(impl: str) -> None:
    case = Case(keep=5, sizes=(3, 5, 6, 23, 40), heads=4, kv_heads=2, block=3, stride=2)
    rows, k, sizes = case.inputs()
    found = case.find(rows, k, sizes, impl)
    for t, size in enumerate(case.sizes):
        for head in range(4):
            got = found[0, head, t].tolist()
            if size <= case.keep:
                assert got == list(range(size)) + [case.sizes[-1]] * (case.keep - size)
            else:
                assert got == plain(case, rows[0, head, t].cpu(), k[0, head // 2].cpu(), size)


@needs_triton
@pytest.mark.slow
def test_views_are_read_where_they_lie() -> None:
    """Keys and rows with heads innermost, and every second row of a tile."""
    case = Case(sizes=(6, 15), heads=4, kv_heads=2, batch=2)
    rows, k, sizes = case.inputs()
    want = case.find(rows, k, sizes, "triton")
    scattered = torch.full((2, len(case.sizes), 10, 4, 16), torch.nan, device=DEVICE).permute(0, 3, 1, 2, 4)
    scattered[:, :, :, ::2] = rows
    inner = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.find(scattered[:, :, :, ::2], inner, sizes.to(DEVICE), "triton"), want)
    strided = k.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(case.find(rows, strided, sizes, "triton"), want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_compared_in_float32(dtype: torch.dtype) -> None:
    """Scores that are whole numbers beyond 8 or 11 bits: the same as in float32."""
    case = Case(dim=64, sampled=3, heads=1)
    rows, k, sizes = case.inputs(30)
    want = case.find(rows, k, sizes, "reference")
    assert torch.equal(case.find(rows.to(dtype), k.to(dtype), sizes, "triton"), want)


@needs_triton
def test_a_key_that_is_not_a_number_is_read() -> None:
    """One of the two keys of unit 2, which is a half of its own from the only round on."""
    case = Case(sizes=(12,), keep=6, heads=1)
    rows, k, sizes = case.inputs()
    k[:, :, case.first + 4] = torch.nan
    got, want = (case.find(rows, k, sizes, impl) for impl in ("triton", "reference"))
    assert torch.equal(got, want) and 2 in got[0, 0, 0].tolist()


@needs_triton
def test_a_unit_that_leaves_the_keys_is_scored_by_the_last_whole_one() -> None:
    case = Case(sizes=(20,), keep=5, block=3, heads=1)
    rows, k, sizes = case.inputs()
    k[:, :, -9:-6] *= 40
    found = [case.find(rows, k[:, :, :-6], sizes, impl) for impl in ("triton", "reference")]
    assert torch.equal(*found) and bool((found[0] > 17).any())


@needs_triton
def test_nothing_to_search_and_what_is_refused() -> None:
    case = Case(sizes=(0, 0))
    rows, k, sizes = case.inputs()
    for impl in ("triton", "reference"):
        assert bool((case.find(rows, k, sizes, impl) == 0).all())
    assert case.find(rows[:, :, :0], k, sizes[:0], "triton").shape == (1, 2, 0, 6)
    assert last_estimate().op == "descend_tree" and last_estimate().impl == "triton"
    for wrong, said in (({"keep": 0}, "keep 0"), ({"first": -1}, "first -1"), ({"block": 0}, "block 0"), ({"stride": True}, "stride True")):
        with pytest.raises(ValueError, match=said):
            replace(case, **wrong).find(rows, k, sizes, "auto")
    with pytest.raises(ValueError, match="do not fit k"):
        case.find(rows[..., :8], k, sizes, "auto")
    with pytest.raises(ValueError, match=r"expected int64 \(2,\)"):
        case.find(rows, k, sizes.int(), "auto")
    for wide, said in ((replace(case, keep=5000), "up to 4096 units"), (replace(case, block=65), "up to 64 keys")):
        with pytest.raises(ValueError, match=said):
            wide.find(rows, k, sizes, "triton")
    with pytest.raises(ValueError, match="less than a unit of 2"):
        case.find(rows, k[:, :, :1], sizes, "triton")
    assert bool((case.find(rows, k[:, :, :1], sizes, "auto") == 0).all())
    with pytest.raises(ValueError, match="up to 128 rows"):
        case.find(rows.expand(-1, -1, -1, 5, -1).repeat(1, 1, 1, 26, 1), k, sizes, "triton")


@needs_triton
def test_the_custom_op_has_a_fake() -> None:
    case = Case(sizes=(4, 9))
    rows, k, sizes = case.inputs()
    from saccade.ops.estimate.triton.descend import descend

    torch.library.opcheck(descend, (rows, k, sizes.to(DEVICE), 6, 3, 2, 1), test_utils=("test_schema", "test_faketensor"))


LARGE = [
    Case(sizes=(200, 300, 1000), keep=100, heads=4, kv_heads=2, sampled=32, dim=128),
    Case(sizes=(129, 513), keep=128, heads=2, sampled=1, dim=64, batch=2),
    Case(sizes=(40, 41, 300), keep=40, block=16, stride=2, sampled=40, dim=80),
    Case(sizes=(9, 90), keep=8, block=70, stride=3, sampled=128, dim=256),
    Case(sizes=(1500, 3000), keep=1100, heads=1, dim=32),
]


@long_when_interpreted
@needs_triton
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_larger_shapes(case: Case) -> None:
    given = case.inputs()
    assert torch.equal(case.find(*given, "triton"), case.find(*given, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(dtype: torch.dtype) -> None:
    """A prompt of 64K, the first and the last tiles of it, without a host synchronisation; in whole numbers the reference is exact."""
    n = 65536
    sizes = tuple((max(0, 64 * t - 256 + 1 - 16)) // 2 for t in (*range(0, 24), *range(n // 64 - 100, n // 64)))
    case = Case(sizes=sizes, keep=256, first=16, heads=8, kv_heads=2, sampled=32, dim=128)
    rows, k, sizes_ = case.inputs(8)
    want = case.find(rows, k, sizes_, "reference")
    rows, k = rows.to(dtype), k.to(dtype)
    case.find(rows, k, sizes_, "auto")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [case.find(rows, k, sizes_, "auto") for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last_estimate().impl == "triton" and all(torch.equal(x, want) for x in found)
