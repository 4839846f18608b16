"""The best of a row: the same ids as a stable sort, whatever the values, in registers, by a sample, and when the sample misleads."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.ops.estimate import best_ids, row_products
from saccade.ops.gpu import has_triton
from tests.ops.marks import long_when_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sorted_ids(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ties to the lower index, a nan above all."""
    exact = scores.double().nan_to_num(nan=torch.inf, posinf=1e300, neginf=-1e300) + 0.0
    exact[scores.isnan()] = torch.inf
    return torch.sort(exact, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def rows(kind: str, r: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(r, n, generator=g)
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "special":
        x[:, ::7] = torch.inf
        x[:, 1::7] = -torch.inf
        x[:, 5] = torch.nan
    elif kind == "periodic":
        x = x + 100 * (torch.arange(n) % 16 == 0)
    elif kind == "rising":
        x = torch.arange(n, dtype=torch.float32).expand(r, n) - n / 2
    elif kind == "one value":
        x = torch.full((r, n), -3.5)
    return x.to(DEVICE)


KINDS = ["normal", "ties", "zeros", "special", "periodic", "rising", "one value"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 40, 299])
def test_reference(kind: str, count: int) -> None:
    x = rows(kind, 3, 300)
    assert torch.equal(best_ids(x, count, impl="reference"), sorted_ids(x, count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_reference_of_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.cat([rows("normal", 2, 300), rows("special", 2, 300)]).to(dtype).view(2, 2, 300)
    assert torch.equal(best_ids(x, 33, impl="reference"), sorted_ids(x, 33))
    # a view into storage that grows, whose scores carry gradients
    part = torch.cat([x, x], dim=-1)[..., :300].requires_grad_()
    assert torch.equal(best_ids(part, 33, impl="reference"), sorted_ids(x, 33))


def test_a_row_with_too_many_does_not_make_up_for_one_with_too_few() -> None:
    x = rows("rising", 2, 300)
    x = torch.stack([x[0], x[1].flip(0)])
    for first in (0, 1):
        ties = x.clone()
        # one more entry at the border of this row; in the other one a nan, which no comparison finds
        ties[first, 150] = ties[first].sort().values[-40]
        ties[1 - first, 7] = torch.nan
        assert torch.equal(best_ids(ties, 40, impl="reference"), sorted_ids(ties, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_without_numpy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    x = rows(kind, 3, 300)
    assert torch.equal(best_ids(x, 40, impl="reference"), sorted_ids(x, 40))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 40, 299])
def test_in_registers(kind: str, count: int) -> None:
    x = rows(kind, 3, 300)
    assert torch.equal(best_ids(x, count, impl="triton"), sorted_ids(x, count))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("kind", ["normal", "one value", "nan"])
def test_a_long_row(kind: str) -> None:
    from saccade.ops.estimate.triton.best import Sizes, launch

    x = rows("normal" if kind == "nan" else kind, 1, 500)
    if kind == "nan":
        x[:, 5] = torch.nan
    assert torch.equal(launch(x, 70, Sizes(short=128, sample=64, block=256, listed=256)), sorted_ids(x, 70))


@long_when_interpreted
@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "count"), [(1500, 1), (1500, 200), (1500, 1499), (1025, 700)])
def test_long_rows(kind: str, n: int, count: int) -> None:
    """Among them rows whose sample misleads: one value, and a period that every sample hits."""
    from saccade.ops.estimate.triton.best import Sizes, launch

    small = Sizes(short=128, sample=64, block=256, listed=512)
    x = rows(kind, 2, n)
    assert torch.equal(launch(x, count, small), sorted_ids(x, count))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("kind", ["one value", "masked", "nans"])
def test_many_entries_on_the_edge_take_no_list(kind: str) -> None:
    """More of them than the list holds."""
    from saccade.ops.estimate.triton import best

    x = rows("normal", 2, 400)
    if kind == "one value":
        x[0] = -0.0
        x[0, 5] = 0.0
    elif kind == "masked":
        x[:, 20:] = -torch.inf
    else:
        x[:, 3:360:2] = torch.nan
    sizes = best.Sizes(short=128, sample=64, block=256, noted=256, listed=64, parts=2)
    assert torch.equal(best.launch(x, 200, sizes), sorted_ids(x, 200))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize(
    ("left", "right", "dtype"), [(0, 3, torch.float32), (1, 0, torch.float32), (7, 1, torch.float32), (2, 5, torch.float16)]
)
def test_rows_that_lie_in_longer_rows(left: int, right: int, dtype: torch.dtype) -> None:
    """A nan around a row would be chosen before all else."""
    from saccade.ops.estimate.triton.best import Sizes, launch

    x = rows("normal", 2, 301).to(dtype)
    whole = torch.full((2, left + 301 + right), torch.nan, dtype=dtype, device=DEVICE)
    view = whole[:, left : left + 301]
    view.copy_(x)
    want = sorted_ids(x, 33)
    assert torch.equal(launch(view, 33), want)
    assert torch.equal(launch(view, 33, Sizes(short=128, sample=64, block=128, noted=128, listed=256)), want)
    assert torch.equal(best_ids(view.view(2, 1, -1), 33, impl="triton"), want.view(2, 1, -1))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("layout", ["transposed", "one row", "every other"])
def test_rows_of_any_layout(layout: str) -> None:
    from saccade.ops.estimate.triton.best import launch

    x = rows("normal", 4, 50)
    view = {"transposed": x.t().contiguous().t(), "one row": x[:1].expand(4, -1), "every other": rows("normal", 4, 99)[:, ::2]}[layout]
    assert torch.equal(launch(view, 7), sorted_ids(view, 7))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("begin", [0, 1, 3, 6])
def test_groups_begin_at_16_bytes(begin: int) -> None:
    from saccade.ops.estimate.triton.common import rows_in_groups

    x = torch.arange(200, dtype=torch.float32, device=DEVICE)[begin : begin + 180].view(4, 45)[:, :40]
    memory, stride, lead, group = rows_in_groups(x)
    assert memory.data_ptr() % 16 == 0 and 0 <= lead < group == 4 and memory.data_ptr() + 4 * lead == x.data_ptr() and stride == 45
    memory, stride, lead, group = rows_in_groups(x.t())
    assert (memory.data_ptr() % 16, stride, lead, group) == (0, 4, 0, 4) and float(memory) == begin


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "count"), [(8192, 64), (16384, 4096), (131072, 8192), (131072, 131071), (2**20, 1000)])
def test_real_sizes(kind: str, n: int, count: int) -> None:
    x = rows(kind, 5, n)
    assert torch.equal(best_ids(x, count, impl="triton"), sorted_ids(x, count))


@given(st.lists(st.floats(width=32), min_size=2, max_size=50), st.integers(1, 49))
@settings(max_examples=30, deadline=None)
def test_any_numbers(values: list[float], count: int) -> None:
    x = torch.tensor([values], dtype=torch.float32, device=DEVICE)
    count = min(count, len(values))
    assert torch.equal(best_ids(x, count), sorted_ids(x, count))


def test_shapes_and_what_is_refused() -> None:
    x = torch.randn(2, 3, 10, device=DEVICE)
    assert best_ids(x, 4).shape == (2, 3, 4) and best_ids(x, 12).shape == (2, 3, 10) and best_ids(x, 0).shape == (2, 3, 0)
    assert torch.equal(best_ids(x, 10)[0, 0].cpu(), torch.arange(10))
    with pytest.raises(ValueError, match="count -1"):
        best_ids(x, -1)
    with pytest.raises(ValueError, match="do not fit rows"):
        row_products(torch.randn(1, 3, 8), torch.randn(1, 2, 5, 8))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize(("heads", "kv_heads", "n", "dim"), [(6, 2, 300, 128), (3, 3, 70, 8), (32, 1, 129, 48), (2, 1, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact_query", [False, True])
def test_products_are_those_of_float32(heads: int, kv_heads: int, n: int, dim: int, dtype: torch.dtype, exact_query: bool) -> None:
    g = torch.Generator().manual_seed(n)
    # room behind the rows, as storage that grows has it
    stored = torch.randn(2, kv_heads, n + 9, dim, generator=g).to(DEVICE, dtype)[:, :, :n]
    q = torch.randn(2, heads, dim, generator=g).to(DEVICE, torch.float32 if exact_query else dtype)
    got, plain = (row_products(q, stored, impl=impl) for impl in ("triton", "reference"))
    want = row_products(q.double(), stored.double())
    assert got.shape == (2, heads, n) and got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) <= 2 * float((plain - want).norm() / want.norm()) + 1e-6
