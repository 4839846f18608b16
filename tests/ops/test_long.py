"""A million tokens on a GPU: tensors of more than 2^31 numbers, judged at their end, where a 32-bit offset would have wrapped round."""

from __future__ import annotations

import pytest
import torch

from saccade.core import Selection
from saccade.ops import attend, decode
from saccade.ops.scan import scan

pytestmark = pytest.mark.gpu
N = 2**20


@pytest.fixture(autouse=True)
def needs_memory() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 90 * 2**30:
        pytest.skip("no GPU with 90 GiB")
    torch.cuda.empty_cache()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=torch.Generator(device="cuda").manual_seed(0))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2


@pytest.mark.parametrize("block", [64, 128])
def test_attend_over_a_window(block: int) -> None:
    """The last queries of the last head read the last keys of the last key head."""
    q, k, v = normal(1, 24, N, 128), normal(1, 4, N, 128), normal(1, 4, N, 128)
    tiles = N // block
    starts = (torch.arange(tiles, device="cuda", dtype=torch.int32)[:, None] - torch.arange(3, -1, -1, device="cuda")) * block
    starts = starts.clamp(min=0)
    starts[:3] = torch.arange(4, device="cuda") * block  # the first tiles name keys they don't see
    s = Selection.from_parts(n_q=N, n_k=N, block_q=block, block_k=block, starts=starts.to(torch.int32)[None, None])
    out = attend(q, k, v, s, impl="triton").out
    rows = slice(N - block, N)
    keys = slice(N - 4 * block, N)
    exact = attend(q[:, -1:, rows].double(), k[:, -1:, keys].double(), v[:, -1:, keys].double(), causal=True, impl="reference").out
    close(out[:, -1:, rows], exact)


def test_decode_over_a_million_keys() -> None:
    q, k, v = normal(3, 32, 1, 128), normal(3, 8, N, 128), normal(3, 8, N, 128)
    out = decode(q, k, v, impl="triton").out
    exact = decode(q[-1:, -4:].double(), k[-1:, -1:].double(), v[-1:, -1:].double(), impl="reference").out
    close(out[-1:, -4:], exact)


@pytest.mark.parametrize("form", ["token", "delta", "channel"])
def test_scan_over_a_million_tokens(form: str) -> None:
    heads = 17
    q, k, v = (normal(1, heads, N, 128) for _ in range(3))
    k = k / k.float().norm(dim=-1, keepdim=True).to(k.dtype)
    shape = (1, heads, N, 128) if form == "channel" else (1, heads, N)
    decay = torch.full(shape, -0.05, device="cuda")
    beta = torch.full((1, heads, N), 0.5, device="cuda", dtype=torch.bfloat16) if form == "delta" else None
    out, _ = scan(q, k, v, log_decay=decay, beta=beta, impl="triton")
    tail = slice(N - 1024, N)  # what lies before has faded by e^-51
    few = {"log_decay": decay[:, -1:, tail].double(), "beta": None if beta is None else beta[:, -1:, tail].double()}
    exact, _ = scan(*(x[:, -1:, tail].double() for x in (q, k, v)), **few, impl="chunked")
    close(out[:, -1:, N - 64 :], exact[:, :, -64:])
