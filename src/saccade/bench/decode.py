"""One query over a long cache: selected tokens against all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from saccade.bench.timing import environment, paired_ms, summary
from saccade.core import HeadLayout, Selection
from saccade.ops import decode, last_run


def bench_decode(
    *, n: int = 32768, selected: int = 1024, heads: int = 8, kv_heads: int = 8, dim: int = 64, dtype: torch.dtype = torch.float32,
    device: str = "cpu", repeats: int = 30, impl: str = "auto", check: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times of dense attention of one query and of `decode` over `selected` random tokens per head; with `check`, the largest
    error of both against the reference in float32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(1, kv_heads, n, dim, generator=generator).to(device, dtype) for _ in range(2))
    ids = torch.stack([torch.randperm(n, generator=generator)[:selected] for _ in range(heads)])[None, :, None]
    selection = Selection.from_positions(ids.to(device), n_q=1, n_k=n)
    layout = HeadLayout.of(q, k, v)
    rows = layout.to_groups(q.squeeze(2))
    contestants = {
        "dense": lambda: F.scaled_dot_product_attention(rows, k, v),
        "sparse": lambda: decode(q, k, v, selection, impl=impl),  # pyright: ignore[reportArgumentType]
    }
    times = summary(paired_ms(contestants, repeats=repeats, device=device), "dense")
    ours = decode(q, k, v, selection, impl=impl).out.float()  # pyright: ignore[reportArgumentType]
    size = dtype.itemsize
    result = {
        "bench": "decode", "environment": environment(device), "impl": last_run().impl, "n": n, "selected": selected, "heads": heads,
        "kv_heads": kv_heads, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "density": selection.density(),
        "bytes_dense": 2 * kv_heads * n * dim * size, "bytes_sparse": 2 * heads * selected * dim * size, "times": times,
        "speedup": times["sparse"]["speedup"],
    }  # fmt: skip
    if check:
        exact = decode(q.float(), k.float(), v.float(), selection, impl="reference").out
        wide = [x.repeat_interleave(layout.group, 1) for x in (k, v)]
        near_k, near_v = [torch.gather(x, 2, selection.tokens[0, :, 0].long()[None, :, :, None].expand(-1, -1, -1, dim)) for x in wide]
        dense = F.scaled_dot_product_attention(q, near_k, near_v).float()
        error, allowed = float((ours - exact).abs().max()), 2 * float((dense - exact).abs().max()) + 1e-6
        result["check"] = {"error": error, "allowed": allowed, "ok": error <= allowed}
    return result
