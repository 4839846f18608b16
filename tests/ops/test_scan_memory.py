"""The scan's kernels read and write their own tensors and nothing beside them: first chunks, last tokens, segments, packed sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from saccade.ops.scan import scan
from tests.ops.memory import OutsideError, watched

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are watched in the interpreter")
GATES = {"none": None, "head": (1,), "token": (1, 1, -1), "channel": (1, 1, -1, 16)}


@triton.jit
def _shifted(x, y, n, by, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + by, mask=i < n, other=0.0), mask=i < n)


def test_the_watch_sees_what_lies_outside() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)
    with watched() as seen:
        _shifted[(1,)](x, y, 8, 0, BLOCK=16)
    assert torch.equal(x, y) and seen == [8, 8]
    for by in (-1, 1):
        with pytest.raises(Exception, match="1 of 8 accesses lie outside") as found, watched():
            _shifted[(1,)](x, y, 8, by, BLOCK=16)
        assert isinstance(found.value.__cause__, OutsideError)
    with watched():
        _shifted[(1,)](x[1:], y, 7, -1, BLOCK=8)  # the storage is one tensor's, wherever a view of it begins


SLOW = [("none", False), ("none", True), ("head", True), ("token", False), ("channel", False)]
FORMS = [("token", True), ("channel", True), *(pytest.param(*form, marks=pytest.mark.slow) for form in SLOW)]


@pytest.mark.parametrize(("gate", "delta"), FORMS)
@pytest.mark.parametrize("packed", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_scan_stays_inside(gate: str, delta: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.ops.scan.triton import adjoint, launch

    cuts = {"chunk": 64, "shortest": 1, "programs": 1e9, "back_programs": 1e9}
    for module in (launch, adjoint):
        if hasattr(module, "config"):
            monkeypatch.setattr(module, "config", lambda *a, f=module.config, **k: replace(f(*a, **k), **cuts))
    n = 70
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    shape = GATES[gate]
    g = None if shape is None else -torch.rand([n if x == -1 else x for x in shape])
    beta = torch.rand(1, 1, n).requires_grad_() if delta else None
    ends = torch.tensor([0, 0, 40, n]) if packed else None
    with watched() as seen:
        out, state = scan(q, k, v, log_decay=g, beta=beta, cu_seqlens=ends, impl="triton")
        (out.sum() + state.sum()).backward()
    assert len(seen) > 10 and torch.isfinite(out).all()
