"""Non-uniform quantisation: 1-D weighted k-means codebooks, coding with them, and a sparse list for outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.quant.choice import kernel_asked, kernel_takes, narrow

FINE = 4096  # bins of the histogram in which long inputs are summed before the search
STEPS = 50
_TAKEN = "tensors of one device, float32, float16 or bfloat16"


def codebook(x: Tensor, bits: int, weight: Tensor | None = None, *, steps: int = STEPS) -> Tensor:
    """Levels `(..., 2^bits)`, ascending, that make the weighted squared error of x `(..., n)` small; float32 (float64 for float64).

    Each row of x gets its own levels (flatten x for shared ones). weight: like x, at least 0 (KVQuant: squared gradients); default 1.
    Lloyd's algorithm on the sorted row, with prefix sums: a step costs 2^bits look-ups. It starts with levels at the quantiles of the
    distribution with density (row's density)^(1/3), which is where the best levels lie for smooth densities, and is deterministic.
    Where a row has fewer different values than levels, some levels coincide. Raises ValueError for an empty axis.
    """
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits={bits!r} is not one of 1 to 8")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no values along its last axis: there is nothing to fit")
    if weight is not None and weight.shape != x.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}: give one weight for each value")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, order = torch.sort(x.to(wide).flatten(0, -2) if x.ndim > 1 else x.to(wide)[None], dim=-1, stable=True)
    weights = torch.ones_like(values) if weight is None else weight.to(wide).reshape(values.shape).gather(-1, order)
    # sums in float64: differences of prefix sums lose digits
    mass = torch.nn.functional.pad(weights.double().cumsum(-1), (1, 0))
    moment = torch.nn.functional.pad((weights.double() * values.double()).cumsum(-1), (1, 0))
    levels = _start(values.double(), weights.double(), 1 << bits)
    for _ in range(steps):
        levels = _centres(values.double(), mass, moment, levels)
    return levels.to(wide).view(*x.shape[:-1], 1 << bits)


def codebook_encode(x: Tensor, levels: Tensor, *, impl: str = "auto") -> Tensor:
    """uint8 codes of the nearest of the ascending `levels (..., L)` for x `(..., n)` (equally near: the lower); levels `(L,)` are
    shared by all rows. impl: "auto", "torch" or "triton" (float32, float16 and bfloat16)."""
    wide = torch.promote_types(x.dtype, levels.dtype)
    middles = ((levels[..., 1:].to(wide) + levels[..., :-1].to(wide)) / 2).contiguous()
    if levels.ndim > 1:
        middles = middles.expand(*x.shape[:-1], middles.shape[-1]).contiguous()
    # codes have no gradient: none is lost
    fits, takes = narrow(x.detach(), levels.detach()) and levels.shape[-1] > 1, f"{_TAKEN}, and two levels or more"
    if kernel_asked("codebook_encode", impl, x) and kernel_takes("codebook_encode", impl, fits, takes) and x.numel():
        from saccade.ops.quant.triton import nearest

        return nearest(x, middles)
    return torch.searchsorted(middles, x.to(wide).contiguous()).to(torch.uint8)


def codebook_decode(codes: Tensor, levels: Tensor, dtype: torch.dtype | None = None, *, impl: str = "auto") -> Tensor:
    """The levels that codes `(..., n)` stand for, in `dtype` (default: that of the levels). impl as in `codebook_encode`; its kernel
    takes uint8 codes and no gradients."""
    levels = levels if dtype is None else levels.to(dtype)
    fits, takes = narrow(levels) and codes.dtype == torch.uint8 and codes.device == levels.device, f"uint8 codes, {_TAKEN} and no gradients"
    if kernel_asked("codebook_decode", impl, codes) and kernel_takes("codebook_decode", impl, fits, takes) and codes.numel():
        from saccade.ops.quant.triton import levels_of

        book = levels if levels.ndim == 1 else levels.expand(*codes.shape[:-1], levels.shape[-1])
        return levels_of(codes, book.contiguous())
    if levels.ndim == 1:
        return levels[codes.long()]
    return levels.expand(*codes.shape[:-1], levels.shape[-1]).gather(-1, codes.long())


def split_outliers(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dense, values, indices): the round(share * n) entries of largest distance from their row's median, for each row of x `(..., n)`.

    dense: x with those entries replaced by the median (so that they widen no range); values `(..., s)` in the dtype of x and
    indices `(..., s)` int32, ascending, say what they were: `dense.scatter(-1, indices.long(), values)` is x again. Equally far: the
    first. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    if x.ndim == 0 or not x.is_floating_point():
        raise TypeError(f"outliers are split from a floating-point tensor with at least one axis, not {x.dtype} {tuple(x.shape)}")
    count = round(share * x.shape[-1])
    if count == 0:
        none = x[..., :0]
        return x.clone(), none.clone(), none.to(torch.int32)
    middle = x.median(-1, keepdim=True).values
    far = (x.to(torch.promote_types(x.dtype, torch.float32)) - middle).abs()
    indices = torch.sort(far, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    return x.scatter(-1, indices, middle.expand(indices.shape)), x.gather(-1, indices), indices.to(torch.int32)


def _start(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """First levels, ascending `(rows, count)`: quantiles of the cube root of a histogram's density."""
    lo, hi = values[:, :1], values[:, -1:]
    bins = min(FINE, 8 * count)
    span = (hi - lo).clamp(min=torch.finfo(values.dtype).tiny)
    place = ((values - lo) / span * bins).long().clamp(0, bins - 1)
    height = torch.zeros(len(values), bins, dtype=values.dtype, device=values.device).scatter_add_(1, place, weights)
    total = (height.clamp(min=0) ** (1 / 3)).cumsum(-1)
    total = total / total[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    wanted = (torch.arange(count, dtype=values.dtype, device=values.device) + 0.5) / count
    found = torch.searchsorted(total, wanted.expand(len(values), count).contiguous()).clamp(max=bins - 1)
    return lo + (hi - lo) * (found.to(values.dtype) + 0.5) / bins


def _centres(values: Tensor, mass: Tensor, moment: Tensor, levels: Tensor) -> Tensor:
    """One step: each level moves to the weighted mean of the values nearest to it; one without any stays."""
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    ends = torch.searchsorted(values, middles, right=True)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], values.shape[1])], dim=1)
    m, s = mass.gather(1, ends), moment.gather(1, ends)
    inside = m[:, 1:] - m[:, :-1]
    centre = (s[:, 1:] - s[:, :-1]) / torch.where(inside > 0, inside, 1.0)
    # sorted again: a level without values may be passed by a neighbour
    return torch.where(inside > 0, centre, levels).sort(-1).values
