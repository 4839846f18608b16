"""Rows written behind others in one kernel: the entries that copying gives, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.cache.segment import Rectangle
from saccade.cache.sliding import Sliding
from saccade.cache.tail import Tail
from saccade.ops import append as op
from saccade.ops.append import append_rows

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(m: int, width: int, dtype: torch.dtype) -> Tensor:
    """`(2, 3, m, width)` as a model makes them: heads lie side by side."""
    return torch.randn(2, m, 3, width, device=DEVICE).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_kernel_writes_what_copies_write(dtype: torch.dtype) -> None:
    for m, at in ((1, 0), (1, 6), (3, 4), (7, 0)):
        k, v = rows(m, 20, dtype), rows(m, 8, dtype)
        made = []
        for impl in ("triton", "torch"):
            rooms = [torch.full((2, 3, 7, 20), 9.0, device=DEVICE, dtype=dtype), torch.full((2, 3, 7, 8), 9.0, device=DEVICE, dtype=dtype)]
            places = torch.full((2, 3, 7), -1, device=DEVICE, dtype=torch.int32)
            append_rows(rooms, [k, v], at, places, 41, impl=impl)
            made.append((*rooms, places))
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
        assert made[0][2][0, 0].tolist() == [-1] * at + list(range(41, 41 + m)) + [-1] * (7 - at - m)


def test_rows_that_do_not_fit_are_refused() -> None:
    room = torch.zeros(2, 3, 4, 8, device=DEVICE)
    for new, at in ((rows(2, 8, torch.float32), 3), (rows(1, 7, torch.float32), 0), (rows(1, 8, torch.float32)[:1], 0)):
        with pytest.raises(ValueError, match="do not fit"):
            append_rows([room, room], [new, new], at)
    with pytest.raises(ValueError, match="impl 'fast'"):
        append_rows([room], [rows(1, 8, torch.float32)], 0, impl="fast")


@pytest.mark.parametrize("window", (False, True))
def test_a_tail_is_the_same_either_way(window: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one, a few at once and dropped in between, with side arrays that make the kernel stand back."""
    torch.manual_seed(0)
    pieces = [(rows(m, 20, torch.float32), rows(m, 8, torch.float32)) for m in (5, 1, 1, 3, 1, 1)]

    def run(kernel: bool) -> Tail:
        real = op.quick
        for place in (op, __import__("saccade.cache.tail", fromlist=["quick"])):
            monkeypatch.setattr(place, "quick", lambda room, new: kernel)
        if kernel:
            monkeypatch.setattr("saccade.cache.tail.append_rows", lambda *given: append_rows(*given, impl="triton"))
        empty = torch.empty(2, 3, 0, dtype=torch.int32, device=DEVICE)
        tail, seen = Tail(Rectangle(pieces[0][0][:, :, :0], pieces[0][1][:, :, :0], {"positions": empty})), 0
        for i, (k, v) in enumerate(pieces):
            tail.append(k, v, seen, None)
            seen += k.shape[2]
            if window and i in (0, 2, 3):
                tail.drop(1, 2)
            if i == 4:
                tail.mark("vision", torch.ones(2, 1, device=DEVICE))
        monkeypatch.undo()
        assert op.quick is real
        return tail

    one, other = run(True), run(False)
    assert isinstance(one._keys, Sliding) == window and one.fresh == other.fresh
    assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert one.side.keys() == other.side.keys() == {"positions", "vision"}
    assert all(torch.equal(one.side[name], other.side[name]) for name in one.side)
    assert one.side["positions"][0, 0].tolist()[-1] == 11
