"""Lists of chosen columns and diagonals: the kernels give bit for bit what plain torch gives, and touch no memory but their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from saccade.core.tilemath import list_true
from saccade.ops.estimate import Impl, SlashLists, last_estimate, slash_lists
from saccade.ops.gpu import has_triton, interpreting
from saccade.parts.lists import tile_ends
from tests.ops.memory import watched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


@dataclass(frozen=True)
class Case:
    """columns, offsets: the share that is chosen, of each head another."""

    n_q: int
    n_k: int
    block: int
    columns: tuple[float, ...] = (0.3, 0.05)
    offsets: tuple[float, ...] = (0.15, 0.02)
    batch: int = 1

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.n_q + self.n_k)
        lists = []
        for shares in (self.columns, self.offsets):
            chosen = torch.rand(self.batch, len(shares), self.n_k, generator=g) < torch.tensor(shares).unsqueeze(-1)
            lists.append(list_true(chosen)[0].to(DEVICE))
        return lists[0], lists[1], tile_ends(self.n_q, self.n_k, self.block, DEVICE)

    def find(self, columns: Tensor, offsets: Tensor, ends: Tensor, impl: Impl) -> SlashLists:
        return slash_lists(columns, offsets, ends, block=self.block, n_k=self.n_k, impl=impl)


CASES = [
    Case(48, 48, 16),
    Case(45, 45, 16, columns=(0.3,), offsets=(0.15,), batch=2),  # a last tile that is short
    Case(20, 60, 7),  # queries that follow keys
    Case(40, 33, 16),  # queries before the first key
    Case(1, 40, 16),
    Case(40, 40, 8, columns=(1.0, 0.0), offsets=(1.0, 0.0)),  # all and none
    Case(50, 50, 16, columns=(0.5,), offsets=(0.0,)),
    Case(50, 50, 16, columns=(0.0,), offsets=(0.15,)),
    Case(5, 5, 16, offsets=(0.6, 0.9)),  # a prompt shorter than a tile
    Case(4, 40, 1),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds a large number."""
    plain: Callable[..., Tensor] = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        return plain(*args, **kwargs).fill_(1 << 20)

    monkeypatch.setattr(torch, "empty", empty)
    yield


def same(got: SlashLists, want: SlashLists) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert torch.equal(a, b)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_give_the_lists_of_plain_torch(case: Case) -> None:
    given = case.inputs()
    want = case.find(*given, "reference")
    if interpreting():
        with watched() as seen:
            got = case.find(*given, "triton")
        assert seen
    else:
        got = case.find(*given, "triton")
    same(got, want)
    assert last_estimate().op == "slash_lists" and last_estimate().impl == "triton"


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_tile_behind_the_last_key_is_none(impl: Impl) -> None:
    """The last query tile is short: offset 0 of rows that are not there would begin at key 62 of 61."""
    columns, offsets = (torch.tensor([[ids]], dtype=torch.int32, device=DEVICE) for ids in ([3, 50, 60], [0, 2]))
    starts, tokens = slash_lists(columns, offsets, tile_ends(61, 61, 16, DEVICE), block=16, n_k=61, impl=impl)
    assert starts[0, 0].tolist() == [[0, 61], [14, 30], [30, 46], [46, 61]]
    assert tokens[0, 0].tolist() == [[61], [3], [3], [3]]


@needs_triton
@pytest.mark.skipif(not interpreting(), reason="small pieces, for the interpreter")
def test_lists_longer_than_a_program_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.ops.estimate.triton import slash_lists as kernels

    for name, size in (("LANES", 2), ("POSITIONS", 32), ("COLUMNS", 8)):
        monkeypatch.setattr(kernels, name, size)
    case = Case(70, 90, 16, columns=(0.4,), offsets=(0.08,))
    given = case.inputs()
    with watched():
        same(case.find(*given, "triton"), case.find(*given, "reference"))


@pytest.mark.parametrize("case", [*CASES, Case(300, 400, 16, columns=(0.1,) * 4, offsets=(0.3, 0.1, 0.02, 0.004))], ids=str)
def test_each_key_is_listed_once_and_nothing_is_missed(case: Case) -> None:
    columns, offsets, ends = case.inputs()
    starts, tokens = case.find(columns, offsets, ends, "auto")
    keys = torch.arange(case.n_k, device=DEVICE)
    for b, h, t in torch.cartesian_prod(*(torch.arange(size) for size in starts.shape[:3])).tolist():
        end = int(ends[t])
        tiles = starts[b, h, t][starts[b, h, t] < case.n_k].long()
        assert bool((tiles.diff() >= case.block).all())
        inside = ((keys >= tiles.unsqueeze(-1)) & (keys < tiles.unsqueeze(-1) + case.block)).any(0)
        rows = torch.arange(max(0, end - case.block), min(end, case.n_k), device=DEVICE)
        far = rows.unsqueeze(-1) - offsets[b, h].long()
        assert bool(inside[far[far >= 0]].all())
        mine = columns[b, h][columns[b, h] < min(end, case.n_k)].long()
        assert tokens[b, h, t][tokens[b, h, t] < case.n_k].tolist() == mine[~inside[mine]].tolist()


def test_a_row_of_the_batch_may_be_shared() -> None:
    columns, offsets, ends = Case(61, 61, 16, batch=2).inputs()
    got = slash_lists(columns[:1], offsets, ends, block=16, n_k=61)
    same(got, slash_lists(columns[:1].expand_as(columns), offsets, ends, block=16, n_k=61))


def test_what_does_not_fit_is_refused() -> None:
    columns, offsets, ends = Case(64, 64, 16).inputs()
    with pytest.raises(TypeError, match=r"columns are torch\.int64 .* expected int32 \(B, H, C\)"):
        slash_lists(columns.long(), offsets, ends, block=16, n_k=64)
    with pytest.raises(TypeError, match=r"offsets are torch\.int32 \(2, \d+\): expected int32 \(B, H, O\)"):
        slash_lists(columns, offsets[0], ends, block=16, n_k=64)
    with pytest.raises(TypeError, match=r"ends are torch\.int32"):
        slash_lists(columns, offsets, ends.int(), block=16, n_k=64)
    with pytest.raises(ValueError, match="of different heads"):
        slash_lists(columns.repeat(1, 2, 1)[:, :3], offsets, ends, block=16, n_k=64)
    with pytest.raises(ValueError, match="block=0 is not a whole number"):
        slash_lists(columns, offsets, ends, block=0, n_k=64)
    with pytest.raises(ValueError, match="n_k=0 is not a whole number"):
        slash_lists(columns, offsets, ends, block=16, n_k=0)
    with pytest.raises(ValueError, match="impl 'fast' is not one of"):
        slash_lists(columns, offsets, ends, block=16, n_k=64, impl="fast")  # pyright: ignore[reportArgumentType]


@needs_triton
def test_ops_are_registered_properly() -> None:
    from saccade.ops.estimate.triton import slash_lists as kernels

    columns, offsets, ends = Case(20, 20, 16, columns=(0.3,), offsets=(0.1,)).inputs()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.measure, (columns, offsets, ends, 20, 16), test_utils=checks)
    below, before, lengths = kernels.measure(columns, offsets, ends, 20, 16)
    most, singles = lengths.amax((1, 2, 3)).tolist()
    torch.library.opcheck(kernels.fill, (columns, below, before, ends, 20, 16, most, singles), test_utils=checks)
