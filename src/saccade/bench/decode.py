"""One query over a long cache: selected tokens against all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from saccade.bench.timing import environment, paired_ms, summary
from saccade.core import HeadLayout, Selection
from saccade.ops import decode, last_run


def bench_decode(
    *, n: int = 32768, selected: int = 1024, heads: int = 8, kv_heads: int = 8, dim: int = 64, dtype: torch.dtype = torch.float32,
    device: str = "cpu", page: int = 1, layers: int = 8, repeats: int = 30, impl: str = "auto",
    check: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times of dense attention of one query and of `decode` over `selected` tokens per head, in random pages of `page` tokens.

    A round runs `layers` caches one after the other, each with a selection of its own, as the layers of a model do: the
    times are those of a whole round. With `check`, the largest error of both against the reference in float32.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, dim, generator=generator).to(device, dtype)
    caches = [tuple(torch.randn(1, kv_heads, n, dim, generator=generator).to(device, dtype) for _ in range(2)) for _ in range(layers)]
    selections = [_random_pages(n, selected, heads, page, generator, device) for _ in range(layers)]
    (k, v), selection = caches[0], selections[0]
    layout = HeadLayout.of(q, k, v)
    rows = layout.to_groups(q.squeeze(2))

    def whole() -> object:
        for keys, values in caches:
            F.scaled_dot_product_attention(rows, keys, values)

    def sparse() -> object:
        for (keys, values), chosen in zip(caches, selections, strict=True):
            decode(q, keys, values, chosen, impl=impl)  # pyright: ignore[reportArgumentType]

    contestants: dict[str, Callable[[], object]] = {"dense": whole, "sparse": sparse}
    times = summary(paired_ms(contestants, repeats=repeats, device=device), "dense")
    ours = decode(q, k, v, selection, impl=impl).out.float()  # pyright: ignore[reportArgumentType]
    size = dtype.itemsize
    result = {
        "bench": "decode", "environment": environment(device), "impl": last_run().impl, "n": n, "selected": selected, "page": page,
        "layers": layers, "heads": heads,
        "kv_heads": kv_heads, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "density": selection.density(),
        "bytes_dense": 2 * kv_heads * n * dim * size, "bytes_sparse": 2 * heads * selected * dim * size, "times": times,
        "speedup": times["sparse"]["speedup"],
    }  # fmt: skip
    if check:
        exact = decode(q.float(), k.float(), v.float(), selection, impl="reference").out
        wide = [x.repeat_interleave(layout.group, 1) for x in (k, v)]
        inside = torch.arange(page, device=device)
        ids = selection.tokens.long() if page == 1 else (selection.starts.long().unsqueeze(-1) + inside).flatten(-2)
        near_k, near_v = [torch.gather(x, 2, ids[0, :, 0][None, :, :, None].expand(-1, -1, -1, dim)) for x in wide]
        dense = F.scaled_dot_product_attention(q, near_k, near_v).float()
        error, allowed = float((ours - exact).abs().max()), 2 * float((dense - exact).abs().max()) + 1e-6
        result["check"] = {"error": error, "allowed": allowed, "ok": error <= allowed}
    return result


def _random_pages(n: int, selected: int, heads: int, page: int, generator: torch.Generator, device: str) -> Selection:
    """`selected` keys of n per head, in whole pages of `page` keys."""
    if n % page or selected % page:
        raise ValueError(f"{n} keys and {selected} selected ones must be multiples of the page of {page}")
    picked = torch.stack([torch.randperm(n // page, generator=generator)[: selected // page] for _ in range(heads)])
    if page == 1:
        return Selection.from_positions(picked[None, :, None].to(device), n_q=1, n_k=n)
    mask = torch.zeros(1, heads, 1, n // page, dtype=torch.bool).scatter_(3, picked[None, :, None], True)
    return Selection.from_block_mask(mask.to(device), block_q=1, block_k=page, n_q=1, n_k=n)
