"""What the CPU runs gives what the reference gives, however the rows are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.ops.estimate import cpu, cpu_maxima, last_estimate, pooled_probabilities, row_sums, tile_maxima

SHAPES = [(90, 90), (37, 90), (90, 37), (1, 64), (64, 1)]  # queries, keys


def inputs(n_q: int, n_k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n_q + n_k)
    return torch.randn(2, 6, n_q, 8, generator=g).to(dtype), torch.randn(2, 2, n_k, 8, generator=g).to(dtype)


def same(got: Tensor | None, want: Tensor | None, at_most: float = 1e-11) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=at_most)  # equal infinities are close


@pytest.fixture(params=[(1 << 20, 768, 1024), (700, 100, 20)], ids=["together", "in pieces"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "HELD", request.param[0])
    monkeypatch.setattr(cpu_maxima, "ROWS", request.param[1])
    monkeypatch.setattr(cpu_maxima, "KEYS", request.param[2])


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "how",
    [
        {}, {"causal": False}, {"softcap": 2.0}, {"bits": 4}, {"bits": 8, "smooth": False, "group": 4}, {"bits": 4, "softcap": 1.5},
        {"relative": True}, {"bits": 4, "relative": True, "group": 2}, {"bits": 4, "softcap": 1.5, "relative": True},
    ],
    ids=str,
)  # fmt: skip
def test_tile_maxima(shape: tuple[int, int], how: dict[str, Any]) -> None:
    q, k = inputs(*shape)
    options = {name: value for name, value in how.items() if name != "relative"}
    if how.get("relative"):
        options["relative_to"] = torch.randn(2, 6, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = tile_maxima(q, k, 16, 8, scale=0.3, **options)
    assert last_estimate().impl == "cpu"
    same(got, tile_maxima(q, k, 16, 8, scale=0.3, impl="reference", **options))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("shape", [(90, 90), (37, 90), (64, 80)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tile_maxima_within_reach(shape: tuple[int, int], softcap: float | None) -> None:
    q, k = inputs(*shape)
    reach = (torch.arange(-(-shape[0] // 16)) * 16 + shape[1] - shape[0] - 11).clamp(min=0) // 8 * 8
    lse = torch.randn(2, 6, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    how: dict[str, Any] = {"bits": 4, "group": 2, "relative_to": lse, "reach": reach, "softcap": softcap}
    got = tile_maxima(q, k, 16, 8, **how)
    same(got, tile_maxima(q, k, 16, 8, impl="reference", **how))
    beyond = torch.arange(got.shape[-1]) * 8 >= reach[:, None]
    assert bool((got == -torch.inf)[..., beyond].all()) and bool((got > -torch.inf)[..., ~beyond].all())


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("how", [{}, {"causal": False}, {"softcap": 2.0}, {"stride": 4}, {"stride": 2, "causal": False}], ids=str)
def test_pooled_probabilities(shape: tuple[int, int], reduce: Any, how: dict[str, Any]) -> None:
    q, k = inputs(*shape)
    got = pooled_probabilities(q, k, 16, 8, reduce=reduce, **how)
    assert last_estimate().impl == "cpu"
    same(got, pooled_probabilities(q, k, 16, 8, reduce=reduce, impl="reference", **how))
    same(pooled_probabilities(q.float(), k.float(), 16, 8, reduce=reduce, **how).double(), got, 1e-4)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize(
    ("positions", "how"),
    [
        *((first, how) for first in (None, 3, 40) for how in ({}, {"diagonals": True}, {"softcap": 2.0}, {"causal": False})),
        *((torch.tensor([80, 2, 2, 41, 0]), how) for how in ({}, {"softcap": 2.0}, {"causal": False})),
    ],
    ids=str,
)  # fmt: skip
def test_row_sums(positions: int | Tensor | None, how: dict[str, Any]) -> None:
    rows = len(positions) if isinstance(positions, Tensor) else 30
    q, k = inputs(rows, 90)
    got = row_sums(q, k, positions, **how)
    assert last_estimate().impl == "cpu"
    for a, b in zip(got, row_sums(q, k, positions, impl="reference", **how), strict=True):
        same(a, b)


def test_nothing_is_worked_out_for_keys_that_no_row_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the map, and the last tile of each piece of rows."""
    q, k = inputs(640, 640, torch.float32)
    sizes: list[int] = []
    bmm, mm = torch.bmm, torch.mm
    monkeypatch.setattr(cpu, "HELD", 64 * 640)
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: (sizes.append(out.numel()), bmm(a, b, out=out))[1])
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (sizes.append(out.numel()), mm(a, b, out=out))[1])
    for call in (lambda: pooled_probabilities(q, k, 16, 8), lambda: tile_maxima(q, k, 16, 8)):
        sizes.clear()
        call()
        assert 0.3 * 12 * 640 * 640 < sum(sizes) < 0.62 * 12 * 640 * 640


def test_inputs_that_train_are_taken() -> None:
    q, k = (x.requires_grad_() for x in inputs(40, 40))
    lse = torch.zeros(2, 6, 40, dtype=torch.float64)
    maxima = tile_maxima(q, k, 8, 8), tile_maxima(q, k, 8, 8, bits=4, relative_to=lse)
    assert not any(x.requires_grad for x in (*maxima, pooled_probabilities(q, k, 8, 8), row_sums(q, k).columns))
