"""decode_beside against softmax over everything at once in float64; on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.decode import decode, decode_beside
from tests.ops.memory import watched

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def inputs(batch: int, heads: int, group: int, n: int, size: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, the token, a window as part of a longer buffer whose unwritten room holds NaN, and n other entries."""
    torch.manual_seed(batch + heads + n + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    buffers = [normal(batch, heads, size + 7, d) for d in (dim, value_dim)]
    window = [x[:, :, 3 : size + 3] for x in buffers]
    return (
        normal(batch, heads * group, 1, dim), normal(batch, heads, 1, dim), normal(batch, heads, 1, value_dim), *window,
        normal(batch, heads, n, dim), normal(batch, heads, n, value_dim),
    )  # fmt: skip


def exact(q: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> Tensor:
    q, keys, values = q.double(), keys.double(), values.double()
    group = q.shape[1] // keys.shape[1]
    logits = q @ keys.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.softmax(logits, -1) @ values.repeat_interleave(group, 1)


CASES = [  # batch, key heads, group, others, window, place, D, Dv, softcap
    (1, 2, 1, 5, 8, 0, 16, 16, None),
    (2, 1, 4, 9, 40, 33, 24, 16, None),
    (1, 2, 3, 0, 70, 69, 16, 40, None),
    (2, 2, 2, 6, 40, 31, 16, 16, 3.0),
]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("batch", "heads", "group", "n", "size", "place", "dim", "value_dim", "softcap"), CASES)
def test_one_softmax_over_everything(
    batch: int, heads: int, group: int, n: int, size: int, place: int, dim: int, value_dim: int, softcap: float | None, impl: str
) -> None:
    q, k, v, keys, values, far_k, far_v = inputs(batch, heads, group, n, size, dim, value_dim, torch.float32)
    keys[:, :, place:], values[:, :, place:] = math.nan, math.nan
    others = decode(q, far_k, far_v, softcap=softcap, return_lse=True) if n else None
    at = torch.tensor([place], device=DEVICE)
    found = decode_beside(q, k, v, keys, values, at, others, softcap=softcap, impl=impl)
    wanted = exact(
        q, torch.cat([far_k, keys[:, :, :place], k], 2), torch.cat([far_v, values[:, :, :place], v], 2), softcap
    )
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6
    assert torch.equal(keys[:, :, place : place + 1], k) and torch.equal(values[:, :, place : place + 1], v)
    assert bool(keys[:, :, place + 1 :].isnan().all()) and bool(values[:, :, place + 1 :].isnan().all())


def test_others_that_read_nothing_count_nothing() -> None:
    q, k, v, keys, values, *_ = inputs(1, 2, 2, 1, 8, 16, 16, torch.float32)
    nothing = Partial(torch.full_like(q, math.nan), torch.full(q.shape[:3], -math.inf, device=DEVICE))
    at = torch.tensor([4], device=DEVICE)
    found, wanted = (decode_beside(q, k, v, keys, values, at, others, impl="triton") for others in (nothing, None))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v, keys, values, far_k, far_v = inputs(2, 2, 4, 30, 48, 64, 64, dtype)
    others, at = decode(q, far_k, far_v, return_lse=True), torch.tensor([40], device=DEVICE)
    found = decode_beside(q, k, v, keys, values, at, others, impl="triton")
    wanted = exact(q, torch.cat([far_k, keys[:, :, :40], k], 2), torch.cat([far_v, values[:, :, :40], v], 2), None)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.skipif(CUDA, reason="kernels are watched in the interpreter")
def test_the_kernel_stays_inside() -> None:
    q, k, v, keys, values, far_k, far_v = (x.clone() for x in inputs(1, 2, 3, 4, 9, 24, 16, torch.float32))
    others = decode(q, far_k, far_v, return_lse=True)
    with watched() as seen:
        out = decode_beside(q, k, v, keys, values, torch.tensor([8]), others, impl="triton")
    assert len(seen) and bool(out.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, keys, values, *_ = inputs(1, 2, 2, 1, 8, 16, 16, torch.float32)
    at = torch.tensor([0], device=DEVICE)
    for message, call in {
        r"give \(B, Hq, 1, D\)": lambda: decode_beside(q.expand(-1, -1, 2, -1), k, v, keys, values, at),
        "don't fit": lambda: decode_beside(q[..., :8], k, v, keys, values, at),
        "not one token": lambda: decode_beside(q, keys, v, keys, values, at),
        "different dtypes": lambda: decode_beside(q.half(), k, v, keys, values, at),
        "one int64 number from 0 to 7": lambda: decode_beside(q, k, v, keys, values, at.int()),
        "log-sum-exp": lambda: decode_beside(q, k, v, keys, values, at, Partial(q, None)),
        "'fast' is not one of": lambda: decode_beside(q, k, v, keys, values, at, impl="fast"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
