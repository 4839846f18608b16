"""Block-sparse attention against dense attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.patterns import random_tiles
from saccade.bench.timing import environment, paired_ms, summary
from saccade.core import Selection
from saccade.ops import attend, last_run


def bench_attend(
    *, n: int = 8192, heads: int = 8, kv_heads: int = 8, dim: int = 64, tile: int = 128, density: float = 0.10,
    dtype: torch.dtype = torch.float32, device: str = "cpu", repeats: int = 5, impl: str = "auto", check: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times of dense `scaled_dot_product_attention` and of `attend` over random tiles; with `check`, the largest error of both
    against the float32 reference on the last 1024 queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, dim, generator=generator).to(device, dtype) for h in (heads, kv_heads, kv_heads))
    selection = random_tiles(n, heads, tile, density, device)
    contestants = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads),
        "sparse": lambda: attend(q, k, v, selection, impl=impl),  # pyright: ignore[reportArgumentType]
    }
    times = summary(paired_ms(contestants, repeats=repeats, device=device), "dense")
    attend(q, k, v, selection, impl=impl)  # pyright: ignore[reportArgumentType]
    result = {
        "bench": "attend", "environment": environment(device), "impl": last_run().impl, "n": n, "heads": heads, "kv_heads": kv_heads,
        "dim": dim, "tile": tile, "dtype": str(dtype).removeprefix("torch."), "density": selection.density(),
        "floor_speedup": 1 / selection.density(), "times": times, "speedup": times["sparse"]["speedup"],
    }  # fmt: skip
    if check:
        result["check"] = _errors(q, k, v, selection, impl)
    return result


def _errors(q: Tensor, k: Tensor, v: Tensor, selection: Selection, impl: str) -> dict[str, Any]:
    """Largest errors against the reference in float32, over the last query tiles."""
    rows = min(1024, q.shape[2])
    tiles = rows // selection.block_q
    last = Selection(
        n_q=tiles * selection.block_q, n_k=selection.n_k, block_q=selection.block_q, block_k=selection.block_k,
        starts=selection.starts[:, :, -tiles:], start_counts=selection.start_counts[:, :, -tiles:],
        tokens=selection.tokens_of(slice(-tiles, None)), token_counts=selection.token_counts[:, :, -tiles:], causal=True,
    )  # fmt: skip
    tail = q[:, :, -last.n_q :]
    exact = attend(tail.float(), k.float(), v.float(), last, impl="reference").out
    ours = attend(q, k, v, selection, impl=impl).out[:, :, -last.n_q :].float()  # pyright: ignore[reportArgumentType]
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = last.expand(1, q.shape[1]).dense_mask()
    dense = F.scaled_dot_product_attention(tail, wide_k, wide_v, attn_mask=mask).float()
    error, allowed = float((ours - exact).abs().max()), 2 * float((dense - exact).abs().max()) + 1e-6
    return {"error": error, "allowed": allowed, "ok": error <= allowed}
