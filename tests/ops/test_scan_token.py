"""One token of the scan in one kernel: the numbers of the definition, over gates, groups, widths and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.ops.scan import ScanState, reference, scan_step, step
from saccade.ops.scan.problem import Problem, check

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = ("none", "head", "token", "channel")


def problem(
    gate: str, delta: bool, dtype: torch.dtype = torch.float32, d: int = 20, dv: int = 12, heads: tuple[int, int, int] = (4, 2, 2),
    start: bool = True, normalise: str | None = None,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(d + dv)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    # channels that do not lie side by side
    q, k, v = (normal(3, h, width, 1).to(dtype).mT for h, width in zip(heads, (d, d, dv), strict=True))
    most = max(heads)
    g = {"none": None, "head": -normal(most).abs(), "token": -normal(3, most, 1).abs(), "channel": -normal(3, most, 1, d).abs()}[gate]
    if g is not None and g.ndim > 1:
        g[0, 0] = -torch.inf
    beta = normal(3, most, 1).sigmoid() if delta else None
    state = normal(3, most, d, dv) if start else None
    if normalise is not None and state is not None:
        return check(q, k, v, g, beta, ScanState(state, normal(3, most, d).abs()), 0.5, normalise, None)
    return check(q, k, v, g, beta, state, 0.5, normalise, None)


def compare(given: Problem) -> None:
    from saccade.ops.scan.triton.token import token

    out, state = token(given)
    right, last = _exact(given)
    assert out.dtype == (torch.float32 if given.wide_out else given.q.dtype) and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)
    slack = 1e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), right, rtol=slack, atol=slack)


def _exact(given: Problem) -> tuple[Tensor, Tensor]:
    wide = {name: x.double() for name in ("q", "k", "v", "log_decay", "beta", "state") if (x := getattr(given, name)) is not None}
    return reference.scan(replace(given, **wide))


@pytest.mark.parametrize("delta", (False, True))
@pytest.mark.parametrize("gate", GATES)
def test_the_kernel_is_the_recurrence(gate: str, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(torch.nan))
    for heads in ((4, 2, 2), (2, 4, 2), (2, 2, 2)):
        compare(problem(gate, delta, heads=heads))
    compare(problem(gate, delta, start=False))
    compare(problem(gate, delta, torch.bfloat16, d=16, dv=70))
    if not delta:
        compare(problem(gate, delta, torch.float16, normalise="sum"))


@pytest.mark.skipif(DEVICE != "cuda", reason="the choice of a way on a GPU")
def test_a_gpu_takes_it_and_gradients_do_not() -> None:
    given = problem("channel", True)
    assert step.fits(given)
    q = given.q.requires_grad_()
    assert not step.fits(given)
    out, _ = scan_step(q[:, :, 0], given.k[:, :, 0], given.v[:, :, 0], given.state, beta=given.beta[:, :, 0])  # pyright: ignore[reportOptionalSubscript]
    assert out.requires_grad
