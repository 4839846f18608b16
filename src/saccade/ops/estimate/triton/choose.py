"""From tile scores to sorted lists, a row of tiles per program.

A score becomes an integer of the same order. The smallest integer that still belongs to the chosen is found bit by bit from the top
(32 counts, or sums, over a row held in registers); what lies above it is chosen, and of what is equal to it the first ones. Nothing is
sorted, and the order of ties is exact.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty
from saccade.ops.gpu import next_power_of_two

RULES = ("count", "mass", "threshold")


@triton.jit
def _best(key, count):
    """The `count` highest of `key` (int64, below 2^32; -1 is never chosen), the first of equal ones first."""
    available = tl.sum((key >= 0).to(tl.int32), axis=0)
    count = tl.minimum(count, available)
    edge = tl.full((), 0, tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        trial = edge + bit
        enough = tl.sum((key >= trial).to(tl.int32), axis=0) >= count
        edge = tl.where(enough, trial, edge)
        bit = bit // 2
    above = key > edge
    equal = key == edge
    room = count - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))


@triton.jit
def _count_of_mass(key, weight, target):
    """How many of the highest keys have weights (float64, 0 where key is -1) that sum to `target` at least."""
    edge = tl.full((), 0, tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        trial = edge + bit
        enough = tl.sum(tl.where(key >= trial, weight, 0.0), axis=0) >= target
        edge = tl.where(enough, trial, edge)
        bit = bit // 2
    above = tl.sum((key > edge).to(tl.int32), axis=0)
    equal = tl.sum((key == edge).to(tl.int32), axis=0)
    left = target - tl.sum(tl.where(key > edge, weight, 0.0), axis=0)
    # entries at the edge are equal: as many as it takes
    value = tl.max(tl.where(key == edge, weight, 0.0), axis=0)
    needed = tl.ceil(left / tl.where(value > 0, value, 1.0))
    needed = tl.minimum(tl.maximum(needed, 0.0), equal.to(tl.float64)).to(tl.int32)
    return tl.where(target > 0, above + tl.where(value > 0, needed, equal), 0)


@triton.jit
def _choose(
    scores, limit, forced, starts, counts, s_b, s_h, s_t, s_k, l_b, l_h, l_t, f_b, f_h, f_t, f_k, heads, rows, columns, n_q, n_k, block_q,
    block_k, sinks, local, width, RULE: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, INSIDE: tl.constexpr,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % rows
    h = (pid // rows) % heads
    b = pid // (rows * heads)
    c = tl.arange(0, BLOCK)
    begin = c.to(tl.int64) * block_k
    first = tile * block_q + n_k - n_q
    last = tl.minimum(tile * block_q + block_q, n_q) + n_k - n_q
    visible = c < columns
    if CAUSAL:
        visible = visible & (begin < last)
    x = tl.load(scores + b * s_b + h * s_h + tile * s_t + c.to(tl.int64) * s_k, mask=visible, other=float("-inf")).to(tl.float32)
    unknown = visible & (x != x)
    certain = visible & ((begin < sinks) | ((local > 0) & (begin + block_k - 1 > first - local) & (begin < last)))
    asked = unknown
    if FORCED:
        flag = tl.load(forced + b * f_b + h * f_h + tile * f_t + c.to(tl.int64) * f_k, mask=visible, other=0)
        asked = asked | (visible & (flag != 0))
    must = certain | asked

    # + 0 makes one zero of two; a negative float's order is that of its flipped bits
    clean = tl.where(unknown, 0.0, x) + 0.0
    bits = clean.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    alive = visible & (x > float("-inf"))
    natural = tl.where(alive, key, -1)
    rest = natural
    taken_count = tl.full((), 0, tl.int32)
    if INSIDE:
        rest = tl.where(must, -1, natural)
        taken_count = tl.sum(must.to(tl.int32), axis=0)
    bound = tl.load(limit + b * l_b + h * l_h + tile * l_t)
    if RULE == "count":
        count = tl.maximum(bound.to(tl.int32) - taken_count, 0)
        keep = _best(rest, count)
    elif RULE == "mass":
        weight = tl.maximum(clean, 0.0).to(tl.float64)
        weight = tl.where(alive, weight, 0.0)
        open_weight = tl.where(rest >= 0, weight, 0.0)
        taken = tl.full((), 0.0, tl.float64)
        if INSIDE:
            taken = tl.sum(tl.where(must, weight, 0.0), axis=0)
        share = bound.to(tl.float64)
        target = share * (tl.sum(open_weight, axis=0) + taken) - taken
        count = tl.maximum(_count_of_mass(rest, open_weight, target), 1 - taken_count)
        count = tl.where(share >= 1.0, columns, count)
        keep = _best(rest, count)
    else:
        keep = (rest >= 0) & (clean > bound)
    keep = keep | must
    if CUT:
        # what is certain stays first, then what was asked for, then the best
        final = tl.where(keep, tl.where(certain, 4294967295, tl.where(must, 4294967294, natural)), -1)
        keep = _best(final, width)
    chosen = keep.to(tl.int32)
    count = tl.sum(chosen, axis=0)
    place = tl.cumsum(chosen, axis=0) - 1
    to = starts + pid * width
    tl.store(to + place, begin.to(tl.int32), mask=keep & (place < width))
    tl.store(to + c, tl.full((BLOCK,), 0, tl.int32) + n_k, mask=(c >= count) & (c < width))
    tl.store(counts + pid, count)


def config(block: int) -> dict[str, int]:
    """Warps for a row of `block` tiles: 8 entries a thread, more where a row is long."""
    return {"num_warps": 1 if block <= 256 else 2 if block <= 512 else 4 if block <= 1024 else 8 if block <= 4096 else 16}


def launch(
    scores: Tensor, limit: Tensor, forced: Tensor | None, rule: str, n_q: int, n_k: int, block_q: int, block_k: int, causal: bool,
    sinks: int, local: int, inside: bool, width: int, config_: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, h, rows, columns = scores.shape
    starts, counts = empty(scores, b, h, rows, width, dtype=torch.int32), empty(scores, b, h, rows, dtype=torch.int32)
    block = next_power_of_two(columns)
    flags = scores if forced is None else forced.view(torch.uint8)
    sizes = config(block) | (config_ or {})
    _choose[(b * h * rows,)](
        scores, limit, flags, starts, counts, *scores.stride(), *limit.stride(), *flags.stride(), h, rows, columns, n_q, n_k, block_q,
        block_k, sinks, local, width, RULE=rule, CAUSAL=causal, FORCED=forced is not None, INSIDE=inside, CUT=width < columns, BLOCK=block,
        **sizes,
    )  # fmt: skip
    return starts, counts


@torch.library.custom_op("saccade::estimate_choose", mutates_args=())
def choose(
    scores: Tensor, limit: Tensor, forced: Tensor | None, rule: str, n_q: int, n_k: int, block_q: int, block_k: int, causal: bool,
    sinks: int, local: int, inside: bool, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(starts `(B, H, Tq, width)`, counts `(B, H, Tq)`) int32 from scores, limits `(B, H, Tq)` and a bool mask of the scores' shape."""
    return launch(scores, limit, forced, rule, n_q, n_k, block_q, block_k, causal, sinks, local, inside, width)


@choose.register_fake
def _(
    scores: Tensor, limit: Tensor, forced: Tensor | None, rule: str, n_q: int, n_k: int, block_q: int, block_k: int, causal: bool,
    sinks: int, local: int, inside: bool, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return scores.new_empty((*scores.shape[:3], width), dtype=torch.int32), scores.new_empty(scores.shape[:3], dtype=torch.int32)
