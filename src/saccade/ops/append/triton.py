"""The kernel of `append_rows`."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import next_power_of_two


# the numbers change with every token: no kernel is made for one of them
@triton.jit(do_not_specialize=["at", "first", "room"], do_not_specialize_on_alignment=["at", "first", "room"])
def _append(
    keys, values, k, v, places, heads, m, room, at, first, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, D: tl.constexpr, DV: tl.constexpr,
    PLACES: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pid // heads, pid % heads
    line = pid * room + at + row
    d, c = tl.arange(0, BD), tl.arange(0, BDV)
    own = tl.load(k + b * k_b + h * k_h + row * k_n + d * k_d, mask=d < D, other=0.0)
    other = tl.load(v + b * v_b + h * v_h + row * v_n + c * v_d, mask=c < DV, other=0.0)
    tl.store(keys + line * D + d, own.to(keys.dtype.element_ty), mask=d < D)
    tl.store(values + line * DV + c, other.to(values.dtype.element_ty), mask=c < DV)
    if PLACES:
        tl.store(places + line, first + row)


def append_rows(rooms: list[Tensor], new: list[Tensor], at: int, places: Tensor | None, first: int) -> None:
    """See `saccade.ops.append.append_rows`."""
    (keys, values), (k, v) = rooms, new
    batch, heads, m, d = k.shape
    dv = v.shape[3]
    if batch * heads * m:
        _append[(batch * heads, m)](
            keys, values, k, v, keys if places is None else places, heads, m, keys.shape[2], at, first, *k.stride(), *v.stride(),
            D=d, DV=dv, PLACES=places is not None, BD=next_power_of_two(d), BDV=next_power_of_two(dv), num_warps=1,
        )  # fmt: skip
