"""estimate: the kernels against the reference in float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from saccade.core import Selection
from saccade.ops import estimate
from saccade.ops.estimate import TileGrid, choose_threshold, choose_top_k, choose_top_p
from saccade.ops.gpu import has_triton
from tests.ops.marks import long_when_interpreted

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# heads, key heads, queries, keys, dim, dtype: groups, tails, one key, a decode step, dims that are no power of two
CASES = [
    (4, 2, 70, 70, 64, BF16), (3, 1, 37, 101, 48, FP32), (2, 2, 1, 90, 80, FP16), (2, 1, 1, 1, 96, BF16), (2, 2, 45, 30, 16, FP32),
    (1, 1, 20, 40, 128, FP16), (1, 1, 20, 24, 256, BF16),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds nan, or a large number."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        x = plain(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(101)

    monkeypatch.setattr(torch, "empty", empty)
    yield


def tensors(heads: int, kv_heads: int, n_q: int, n_k: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n_q + dim)
    batch = 1 if n_q > 60 else 2
    q, k = torch.randn(batch, heads, n_q, dim, generator=g), torch.randn(batch, kv_heads, n_k, dim, generator=g) + 0.3
    # heads between tokens, as models hold them
    return (x.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE, dtype) for x in (q, k))


def agree(got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor) -> None:
    """The error of `got` is at most twice that of the plain computation in the same precision, and inf stands where it should."""
    got, want, plain = got.double().cpu(), want.double().cpu(), plain.double().cpu()
    assert got.shape == want.shape and not bool(got.isnan().any())
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]) and bool(got[finite].isfinite().all())
    size = want[finite].norm().clamp(min=1e-30)
    error, allowed = ((x[finite] - want[finite]).norm() / size for x in (got, plain))
    assert float(error) <= 2 * float(allowed) + 1e-6


def compare(run: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> None:
    """`run(q, k, impl)`: the kernels, the float64 oracle, and the plain computation in float32; and the kernels again."""
    got = run(q, k, "triton")
    agree(got, run(q.double(), k.double(), "reference"), run(q.float(), k.float(), "reference"))
    if DEVICE == "cuda" or q.shape[2] <= 20:  # the interpreter takes its time
        assert torch.equal(got, run(q, k, "triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
@long_when_interpreted
def test_one_vector_per_block(case: tuple[int, int, int, int, int, torch.dtype]) -> None:
    q, k = tensors(*case)
    compare(lambda q, k, impl: estimate.pooled_scores(q, k, 16, 24, impl=impl), q, k)
    for how in ("max", "min"):
        assert torch.equal(estimate.pool_blocks(k, 7, how, impl="triton"), estimate.pool_blocks(k, 7, how, impl="reference"))
    shift = k.double().mean(2)
    for block in (5, 64):
        compare(lambda q, k, impl, b=block: estimate.block_statistics(k, b, shift=shift.to(k.dtype), impl=impl).mean, k.float(), k.float())
        compare(lambda q, k, impl, b=block: estimate.self_similarity(k, b, impl=impl), q, k)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds_of_pages(case: tuple[int, int, int, int, int, torch.dtype]) -> None:
    q, k = tensors(*case)
    low, high = estimate.minmax_pages(k, 16, impl="triton")
    assert torch.equal(low, estimate.minmax_pages(k, 16, impl="reference")[0])
    assert torch.equal(high, estimate.minmax_pages(k, 16, impl="reference")[1])
    compare(lambda q, k, impl: estimate.page_bounds(q, low.to(k.dtype), high.to(k.dtype), impl=impl), q, k)
    for block, causal in ((8, True), (24, False)):
        grid = TileGrid.of(q, k, block, 16, causal)
        compare(lambda q, k, impl, g=grid: estimate.page_bounds(q, low.to(k.dtype), high.to(k.dtype), g, impl=impl), q, k)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_pages_that_grow(dtype: torch.dtype) -> None:
    _, k = tensors(2, 2, 1, 50, 24, dtype)
    low, high = (torch.full((2, 2, 13, 24), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    seen = 0
    for number, step in enumerate((3, 1, 1, 9, 16, 20)):
        told = torch.tensor([seen], device=DEVICE) if number % 2 else seen
        estimate.extend_pages(low, high, k[:, :, seen : seen + step], told, 4, impl="triton")
        seen += step
    whole = estimate.minmax_pages(k, 4, impl="reference")
    assert torch.equal(low, whole[0]) and torch.equal(high, whole[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_tile_maxima(case: tuple[int, int, int, int, int, torch.dtype]) -> None:
    q, k = tensors(*case)
    base = torch.linspace(-1, 1, q.shape[2], device=DEVICE).expand(q.shape[:3])
    compare(lambda q, k, impl: estimate.tile_maxima(q, k, 16, 32, relative_to=base, impl=impl), q, k)
    compare(lambda q, k, impl: estimate.tile_maxima(q, k, 128, 1, causal=False, softcap=3.0, impl=impl), q, k)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES[:4] + CASES[5:], ids=str)
def test_tile_maxima_of_few_bits(case: tuple[int, int, int, int, int, torch.dtype], bits: int) -> None:
    q, k = tensors(*case)
    for smooth, group, block_k in ((True, 1, 32), (False, 8, 4)):

        def run(q: torch.Tensor, k: torch.Tensor, impl: str, s: bool = smooth, g: int = group, b: int = block_k) -> torch.Tensor:
            return estimate.tile_maxima(q, k, 64, b, bits=bits, smooth=s, group=g, impl=impl)

        got, want = run(q, k, "triton"), run(q.float(), k.float(), "reference")
        # a value half way between two steps may go either way; otherwise the integers are the same
        agree(got, want.double(), want.double() * (1 + 0.25 * 2.0**-bits))
        exact = estimate.tile_maxima(q.double(), k.double(), 64, block_k)
        agree(got, exact, want)


@pytest.mark.parametrize("case", CASES, ids=str)
@long_when_interpreted
def test_probabilities_of_tiles(case: tuple[int, int, int, int, int, torch.dtype]) -> None:
    q, k = tensors(*case)
    compare(lambda q, k, impl: estimate.pooled_probabilities(q, k, 16, 32, impl=impl), q, k)
    compare(lambda q, k, impl: estimate.pooled_probabilities(q, k, 128, 256, causal=False, softcap=2.0, impl=impl), q, k)
    compare(lambda q, k, impl: estimate.pooled_probabilities(q, k, 32, 32, stride=4, reduce="max", impl=impl), q, k)


def everything(sums: estimate.RowSums) -> list[torch.Tensor]:
    assert sums.diagonals is not None
    return [sums.columns, sums.diagonals, sums.lse]


@pytest.mark.parametrize("case", CASES, ids=str)
@long_when_interpreted
def test_sums_of_rows(case: tuple[int, int, int, int, int, torch.dtype]) -> None:
    q, k = tensors(*case)
    compare(lambda q, k, impl: torch.cat(everything(estimate.row_sums(q, k, diagonals=True, impl=impl)), -1), q, k)
    m = q.shape[2]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0)).to(DEVICE)[: max(1, m // 2)]
    compare(lambda q, k, impl: estimate.row_sums(q[:, :, order], k, order + k.shape[2] - m, softcap=4.0, impl=impl).columns, q, k)
    compare(lambda q, k, impl: estimate.row_sums(q, k, causal=False, impl=impl).columns, q, k)


def test_diagonals_over_several_steps_of_rows_and_keys() -> None:
    q, k = tensors(2, 1, 100, 300, 16, FP16)
    compare(lambda q, k, impl: torch.cat(everything(estimate.row_sums(q, k, 150, diagonals=True, impl=impl)), -1), q, k)


# -- choosing --------------------------------------------------------------------------------------------------------------


def same(a: Selection, b: Selection) -> None:
    assert torch.equal(a.start_counts, b.start_counts) and torch.equal(a.starts, b.starts)


FORCED = {"sinks": 9, "local": 12}, {"local": 1}, {"sinks": 1, "inside": False}, {}, {"local": 1, "inside": False}, {"local": 1}


@pytest.mark.parametrize("seed", range(6))
def test_choices_equal_the_reference(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    grid = TileGrid(n_q=(50, 9, 1)[seed % 3], n_k=(90, 61)[seed % 2], block_q=32, block_k=(8, 3)[seed % 2], causal=seed != 4)
    shape = (1, 2, grid.rows, grid.columns)
    # few values, many ties; later, numbers of all sizes
    scores = torch.randint(-4, 5, shape, generator=g) / 4
    if seed >= 3:
        scores = torch.randn(shape, generator=g) * 10.0 ** torch.randint(-20, 20, shape, generator=g)
    special = torch.rand(shape, generator=g)
    weights = torch.where(special < 0.1, -torch.inf, scores.abs())
    scores = torch.where(special < 0.1, -torch.inf, torch.where(special > 0.97, torch.inf, scores))
    scores = torch.where((special > 0.5) & (special < 0.55), -0.0, scores)
    if seed % 2:
        scores = torch.where(special > 0.9, torch.nan, scores)
    counts = torch.randint(0, 9, (2, grid.rows), generator=g).to(DEVICE)
    options: dict[str, object] = dict(FORCED[seed])
    if seed % 3:
        options["forced"] = (torch.rand(1, grid.rows, grid.columns, generator=g) < 0.1).to(DEVICE)
    if seed > 3:
        options["max_tiles"] = grid.most_forced(0, 1) + 1
    scores, weights = scores.to(DEVICE), weights.to(DEVICE)

    def both(choose: Callable[..., Selection], *args: object, **kwargs: object) -> None:
        same(choose(*args, grid, impl="triton", **kwargs), choose(*args, grid, impl="reference", **kwargs))

    both(choose_top_k, scores, (counts, 3, 0.4)[seed % 3], **options)
    both(choose_top_p, weights.half() if seed < 3 else weights, (0.3, 0.9, 0.6, 1.0)[seed % 4], **options)
    if seed % 3 == 0:
        both(choose_top_p, torch.zeros_like(weights), 0.5, **options)
    options.pop("inside", None)
    both(choose_threshold, scores, 0.25, **options)


@long_when_interpreted
def test_pooled_choice_end_to_end_and_again() -> None:
    q, k = tensors(2, 1, 40, 50, 64, BF16)
    grid = TileGrid.of(q, k, 16, 16)
    selections = []
    for impl in ("triton", "triton", "reference"):
        scores = estimate.pooled_scores(q, k, 16, 16, impl=impl)
        selections.append(choose_top_k(scores, 0.5, grid, local=1, impl=impl))
    same(selections[0], selections[1])
    same(selections[0], selections[2])
    assert estimate.last_estimate().op == "choose_top_k"


# -- dispatch --------------------------------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_take_is_refused_and_auto_goes_elsewhere() -> None:
    q, k = tensors(2, 1, 10, 10, 16, FP32)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        estimate.pool_blocks(q.double(), 4, impl="triton")
    with pytest.raises(ValueError, match="not 12 x 16"):
        estimate.tile_maxima(q, k, 12, 16, impl="triton")
    with pytest.raises(ValueError, match="head dims up to 256"):
        estimate.row_sums(torch.zeros(1, 1, 2, 300, device=DEVICE), torch.zeros(1, 1, 2, 300, device=DEVICE), impl="triton")
    estimate.tile_maxima(q, k, 12, 16)
    assert estimate.last_estimate().impl == ("cpu" if DEVICE == "cpu" else "reference")
    estimate.tile_maxima(q, k, 16, 16)
    assert estimate.last_estimate().impl == ("triton" if DEVICE == "cuda" else "cpu")


def test_empty_tensors() -> None:
    q, k = torch.zeros(1, 2, 0, 16, device=DEVICE), torch.zeros(1, 2, 8, 16, device=DEVICE)
    assert estimate.pooled_scores(q, k, 4, 4, impl="triton").shape == (1, 2, 0, 2)
    assert choose_top_k(estimate.pooled_scores(q, k, 4, 4), 1, TileGrid.of(q, k, 4, 4), impl="triton").starts.shape == (1, 2, 0, 1)


def test_ops_are_registered_properly() -> None:
    from saccade.ops.estimate.triton import bounds, choose, lse, pool, quantise, rows, tiles

    q, k = (x.contiguous() for x in tensors(2, 1, 20, 20, 16, FP16))
    checks = ("test_schema", "test_faketensor")
    page = k[:, :, :2].contiguous()
    scores, limit = torch.randn(1, 2, 2, 3, device=DEVICE), torch.ones(1, 2, 2, dtype=torch.int32, device=DEVICE)
    grouped = torch.zeros(2, 1, 2, 16, device=DEVICE)
    for op, args in (
        (pool.pool, (k, None, 8, True, True, False, True)),
        (bounds.rows, (q, page, page)),
        (bounds.tiles, (q, page, page, 8, 10, 20, True)),
        (bounds.extend, (page.clone(), page.clone(), k[:, :, :3], torch.zeros(1, dtype=torch.int64, device=DEVICE), 4)),
        (quantise.quantise, (k, torch.zeros(2, 1, 16, device=DEVICE), grouped, False, 4, 1)),
        (tiles.reduce, (q, k, None, None, None, None, None, 16, 8, True, 0, 1.0, 0.0, False)),
        (lse.row_lse, (q, k, None, 0, True, 1.0, 0.0)),
        (rows.row_sums, (q, k, torch.zeros(2, 2, 20, device=DEVICE), None, 0, True, 1.0, 0.0, True)),
        (choose.choose, (scores, limit, None, "count", 8, 12, 4, 4, True, 0, 0, True, 3)),
    ):  # fmt: skip
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture() -> None:
    q, k = (torch.randn(1, h, 512, 64, device="cuda", dtype=BF16) for h in (4, 2))
    grid = TileGrid.of(q, k, 64, 64)

    def select() -> Selection:
        scores = estimate.pooled_scores(q, k, 64, 64)
        choose_top_k(scores, 0.25, grid, sinks=1, local=1)
        return choose_top_p(scores.softmax(-1), 0.9, grid, local=1)

    want = select()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = select()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = select()
    graph.replay()
    same(held, want)
