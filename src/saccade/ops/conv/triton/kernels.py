"""The kernels of `short_conv`: a program walks down some tokens of some channels, with what it saw last in registers.

Every input is read from memory once, but for the `WIDTH - 1` tokens before a program's own and, backward, as many behind them.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(channels, blocks, chunks, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its sequence, its chunk and the first token of that, its channels, which of them there are."""
    pid = tl.program_id(0)
    rest = pid // blocks
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    chunk = rest % chunks
    # the sequence's number is wide, and with it all offsets: tensors may have more than 2^31 elements
    return (rest // chunks).to(tl.int64), chunk, chunk * LENGTH, c, c < channels


@triton.jit
def _taps(weight, c, there, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        taps += (tl.load(weight + c * WIDTH + j, mask=there, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _before(x, tail, first, c, there, x_n, tail_n, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """The inputs of the WIDTH - 1 tokens before `first`, where x points, the earliest first: zeros or the tail where no token is."""
    rows = ()
    for j in tl.static_range(WIDTH - 1):
        back = WIDTH - 1 - j
        row = tl.load(x - back * x_n + c, mask=there & (first >= back), other=0.0).to(tl.float32)
        if TAIL:
            row += tl.load(tail + (first + j) * tail_n + c, mask=there & (first < back), other=0.0).to(tl.float32)
        rows += (row,)
    return rows


@triton.jit
def _sum(taps, rows, start, WIDTH: tl.constexpr):
    total = start
    for j in tl.static_range(WIDTH):
        total += taps[j] * rows[j]
    return total


@triton.jit
def _sigmoid(x):
    """With the square of a reciprocal root, which is one instruction on a GPU; a quotient is seven."""
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def forward(
    x, weight, bias, tail, y, n, channels, blocks, chunks, x_b, x_n, tail_b, tail_n, WIDTH: tl.constexpr, LENGTH: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y `(B, N, C)`, contiguous."""
    b, _, first, c, there = _place(channels, blocks, chunks, LENGTH, BLOCK)
    x_n = tl.cast(x_n, tl.int64)
    x += b * x_b + first * x_n
    y += (b * n + first) * channels
    taps = _taps(weight, c, there, WIDTH)
    start = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        start += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    window = _before(x, tail + b * tail_b, first, c, there, x_n, tail_n, WIDTH, TAIL)
    for i in range(0, LENGTH, STEP):
        # all loads of a step before its first store: they can't be moved ahead of one
        rows = ()
        for u in tl.static_range(STEP):
            rows += (tl.load(x + u * x_n + c, mask=there & (first + i + u < n), other=0.0),)
        for u in tl.static_range(STEP):
            window += (rows[u].to(tl.float32),)
            out = _sum(taps, window, start, WIDTH)
            if SILU:
                out *= _sigmoid(out)
            tl.store(y + u * channels + c, out.to(y.dtype.element_ty), mask=there & (first + i + u < n))
            window = window[1:]
        x += STEP * x_n
        y += STEP * channels


@triton.jit
def _slope(taps, rows, start, dout, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """The gradient of what goes into the activation, which is computed again."""
    dout = dout.to(tl.float32)
    if SILU:
        inner = _sum(taps, rows, start, WIDTH)
        gate = _sigmoid(inner)
        dout *= gate + inner * gate * (1 - gate)
    return dout


@triton.jit
def _turned_sum(taps, slopes, WIDTH: tl.constexpr):
    """The gradient of an input, from the slopes of the token itself and of those after it that read it."""
    total = taps[WIDTH - 1] * slopes[0]
    for j in tl.static_range(1, WIDTH):
        total += taps[WIDTH - 1 - j] * slopes[j]
    return total


@triton.jit
def _store(dx, dtail, grad, first, passed, n, channels, c, there, BEHIND: tl.constexpr, TAIL_GRAD: tl.constexpr):
    """The gradient of the input BEHIND tokens back, `passed` tokens after the first: of an own token, of the tail, or another program's."""
    ok = there & (passed >= BEHIND) & (first + passed - BEHIND < n)
    tl.store(dx + c, grad.to(dx.dtype.element_ty), mask=ok)
    if TAIL_GRAD:
        tl.store(dtail + passed * channels + c, grad.to(dtail.dtype.element_ty), mask=there & (first == 0) & (passed < BEHIND))


@triton.jit
def backward(
    x, weight, bias, tail, dy, dx, dtail, sums, n, channels, blocks, chunks, x_b, x_n, tail_b, tail_n, dy_b, dy_n, WIDTH: tl.constexpr,
    LENGTH: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, WEIGHTS: tl.constexpr, TAIL_GRAD: tl.constexpr,
):  # fmt: skip
    """dx `(B, N, C)` and dtail `(B, WIDTH - 1, C)`, contiguous, and with WEIGHTS this program's own part of the weights' gradients.

    sums `(B, chunks, WIDTH + BIAS, C)` float32: a row for each tap and one for the bias. An input's gradient is complete WIDTH - 1 tokens
    later. Slopes before the own tokens count as 0: only inputs that other programs write need them. Those after the last token are 0 with
    dy, or not a number where the last token's is not one either.
    """
    BEHIND: tl.constexpr = WIDTH - 1
    b, chunk, first, c, there = _place(channels, blocks, chunks, LENGTH, BLOCK)
    x_n, dy_n = tl.cast(x_n, tl.int64), tl.cast(dy_n, tl.int64)
    x += b * x_b + first * x_n
    dy += b * dy_b + first * dy_n
    dx += (b * n + first - BEHIND) * channels
    dtail += b * BEHIND * channels
    taps = _taps(weight, c, there, WIDTH)
    zero = tl.zeros([BLOCK], tl.float32)
    start = zero
    if BIAS:
        start += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    window = _before(x, tail + b * tail_b, first, c, there, x_n, tail_n, WIDTH, TAIL)
    slopes, totals, total = (), (), zero
    for _ in tl.static_range(BEHIND):
        slopes += (zero,)
    for _ in tl.static_range(WIDTH):
        totals += (zero,)
    for i in range(0, LENGTH, STEP):
        # as in `forward`, all loads of a step come first
        rows, grads = (), ()
        for u in tl.static_range(STEP):
            ok = there & (first + i + u < n)
            rows += (tl.load(x + u * x_n + c, mask=ok, other=0.0),)
            grads += (tl.load(dy + u * dy_n + c, mask=ok, other=0.0),)
        for u in tl.static_range(STEP):
            window += (rows[u].to(tl.float32),)
            slopes += (_slope(taps, window, start, grads[u], WIDTH, SILU),)
            if WEIGHTS:
                more = ()
                for j in tl.static_range(WIDTH):
                    more += (totals[j] + slopes[BEHIND] * window[j],)
                totals = more
                total += slopes[BEHIND]
            grad = _turned_sum(taps, slopes, WIDTH)
            _store(dx + u * channels, dtail, grad, first, i + u, n, channels, c, there, BEHIND, TAIL_GRAD)
            window, slopes = window[1:], slopes[1:]
        x += STEP * x_n
        dy += STEP * dy_n
        dx += STEP * channels
    for u in tl.static_range(BEHIND):
        ok = there & (first + LENGTH + u < n)
        window += (tl.load(x + u * x_n + c, mask=ok, other=0.0).to(tl.float32),)
        slopes += (_slope(taps, window, start, tl.load(dy + u * dy_n + c, mask=ok, other=0.0), WIDTH, SILU),)
        grad = _turned_sum(taps, slopes, WIDTH)
        _store(dx + u * channels, dtail, grad, first, LENGTH + u, n, channels, c, there, BEHIND, TAIL_GRAD)
        window, slopes = window[1:], slopes[1:]
    if WEIGHTS:
        sums += (b * chunks + chunk) * (WIDTH + BIAS) * channels
        for j in tl.static_range(WIDTH):
            tl.store(sums + j * channels + c, totals[j], mask=there)
        if BIAS:
            tl.store(sums + WIDTH * channels + c, total, mask=there)
