"""Codes packed into bytes or words, and back: four codes at a time where rows allow it, else code by code."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div

MOST = 1 << 28  # codes of a launch: their bits are counted in int32
BLOCK = 1024


@triton.jit
def _together(four, BITS: tl.constexpr):
    """The four bytes of an int32, each below 2^BITS, moved together into its low 4 * BITS bits."""
    ONE: tl.constexpr = (2**BITS - 1) * 65537
    TWO: tl.constexpr = 2 ** (2 * BITS) - 1
    pairs = (four & ONE) | ((four >> (8 - BITS)) & (ONE << BITS))
    return (pairs & TWO) | ((pairs >> (16 - 2 * BITS)) & (TWO << (2 * BITS)))


@triton.jit
def _apart(four, BITS: tl.constexpr):
    """The inverse of `_together`."""
    ONE: tl.constexpr = (2**BITS - 1) * 65537
    TWO: tl.constexpr = 2 ** (2 * BITS) - 1
    pairs = (four & TWO) | ((four << (16 - 2 * BITS)) & (TWO << 16))
    return (pairs & ONE) | ((pairs << (8 - BITS)) & (ONE << 8))


@triton.jit
def _pack_fours(
    fours, words, count, rows, BITS: tl.constexpr, USED: tl.constexpr, WORDS: tl.constexpr, FOURS: tl.constexpr, TAKEN: tl.constexpr,
    TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """words: int16 of which the low USED bits are filled; a row is WORDS of them (0: there is one row) and FOURS int32 of 4 codes.

    count: words; rows: int32 given. TAKEN: how many int32 a word may take its bits from.
    """
    for turn in tl.static_range(TURNS):
        w = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        place = w % WORDS if WORDS > 0 else w
        begin = w // WORDS * FOURS if WORDS > 0 else 0
        left = FOURS if WORDS > 0 else rows
        # the first int32 that the word takes bits from, and how many of its bits the word before has taken
        f = place if USED == 4 * BITS else place * USED // (4 * BITS)
        past = 0 if USED == 4 * BITS else place * USED % (4 * BITS)
        word = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(TAKEN):
            bits = _together(tl.load(fours + (begin + f + i), mask=(w < count) & (f + i < left), other=0), BITS)
            word |= bits >> past if i == 0 else bits << (4 * BITS * i - past)
        tl.store(words + w, (word & (2**USED - 1)).to(tl.int16), mask=w < count)


@triton.jit
def _unpack_fours(
    words, fours, count, total, BITS: tl.constexpr, USED: tl.constexpr, WORDS: tl.constexpr, FOURS: tl.constexpr, TAKEN: tl.constexpr,
    TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of `_pack_fours`; count: int32 to be made, total: words given, TAKEN: how many an int32 may take its bits from."""
    for turn in tl.static_range(TURNS):
        f = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        place = f % FOURS if WORDS > 0 else f
        begin = f // FOURS * WORDS if WORDS > 0 else 0
        left = WORDS if WORDS > 0 else total
        w = place if USED == 4 * BITS else place * (4 * BITS) // USED
        past = 0 if USED == 4 * BITS else place * (4 * BITS) % USED
        bits = tl.zeros((BLOCK,), tl.int64 if TAKEN > 2 else tl.int32)
        for i in tl.static_range(TAKEN):
            word = tl.load(words + (begin + w + i), mask=(f < count) & (w + i < left), other=0).to(bits.dtype) & (2**USED - 1)
            bits |= word >> past if i == 0 else word << (USED * i - past)
        four = (bits & (2 ** (4 * BITS) - 1)).to(tl.int32)
        tl.store(fours + f, _apart(four, BITS), mask=f < count)


@triton.jit(do_not_specialize=["n", "width", "total"])
def _pack_rows(codes, packed, n, width, total, BITS: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of any length; PER: codes of a word, 0 for none left out between them."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, b = t // width, (t % width).to(tl.int32)
    line = codes + row * n
    byte = tl.zeros((BLOCK,), tl.int32)
    if PER > 0:
        for i in tl.static_range(PER):
            c = b // 2 * PER + i
            byte |= tl.load(line + c, mask=(t < total) & (c < n), other=0).to(tl.int32) << (i * BITS)
        byte >>= b % 2 * 8
    else:
        for i in tl.static_range(8 // BITS + 2):
            c = b * 8 // BITS + i
            past = tl.minimum(c * BITS - b * 8, 8)
            code = tl.load(line + c, mask=(t < total) & (c < n) & (past < 8), other=0).to(tl.int32)
            byte |= (code << 8) >> (8 - past)
    tl.store(packed + t, (byte & 255).to(tl.uint8), mask=t < total)


@triton.jit(do_not_specialize=["n", "width", "total"])
def _unpack_rows(packed, codes, n, width, total, BITS: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, c = t // n, (t % n).to(tl.int32)
    bit = c * BITS
    if PER > 0:
        bit = c // PER * 16 + c % PER * BITS
    line, b = packed + row * width, bit // 8
    low = tl.load(line + b, mask=t < total, other=0).to(tl.int32)
    high = tl.load(line + b + 1, mask=(t < total) & (b + 1 < width), other=0).to(tl.int32)
    tl.store(codes + t, (((low | (high << 8)) >> (bit % 8)) & (2**BITS - 1)).to(tl.uint8), mask=t < total)


def pack(codes: Tensor, bits: int, words: bool) -> Tensor:
    """Packed codes `(..., n)`, as `quant.pack` or `quant.pack_words` gives them; 1 to 8 bits."""
    n = codes.shape[-1]
    per = 16 // bits
    width = 2 * ceil_div(n, per) if words else ceil_div(n * bits, 8)
    packed = torch.empty((*codes.shape[:-1], width), dtype=torch.uint8, device=codes.device)
    _each(codes.contiguous(), packed, n, bits, per if words else 0, True)
    return packed


def unpack(packed: Tensor, bits: int, n: int, words: bool) -> Tensor:
    """The inverse of `pack`."""
    codes = torch.empty((*packed.shape[:-1], n), dtype=torch.uint8, device=packed.device)
    _each(codes, packed.contiguous(), n, bits, 16 // bits if words else 0, False)
    return codes


def _each(codes: Tensor, packed: Tensor, n: int, bits: int, per: int, inwards: bool) -> None:
    """Launches for codes and packed, both without gaps: the one is written from the other."""
    width = packed.shape[-1]
    if not codes.numel():
        return
    even = width * 8 == n * bits
    flat, bytes_ = codes.view(-1), packed.view(-1)
    if bits == 8 and even:
        (bytes_ if inwards else flat).copy_(flat if inwards else bytes_)
    elif even:  # rows follow each other without a gap: as one, 16 codes in as many words as bits
        whole = flat.numel() // 16 * 16
        _fours(flat[:whole], bytes_[: whole * bits // 8], bits, 0, 0, inwards)
        _rows(flat[whole:], bytes_[whole * bits // 8 :], flat.numel() - whole, bits, 0, inwards)
    elif per and n % 4 == 0 and bits < 8:
        _fours(flat, bytes_, bits, n, width, inwards)
    else:
        _rows(flat, bytes_, n, bits, per, inwards)


def _fours(codes: Tensor, packed: Tensor, bits: int, n: int, width: int, inwards: bool) -> None:
    """In int32 of 4 codes and int16; n: codes of a row, 0 for one row."""
    used = 16 // bits * bits if n else 16
    step, size = (n, width) if n else (16, 2 * bits)
    for first, last in _launches(codes.numel() // step, step):
        fours, words = _aligned(codes[first * step : last * step], 4), _aligned(packed[first * size : last * size], 2)
        fours, words = fours.view(torch.int32), words.view(torch.int16)
        made = words.numel() if inwards else fours.numel()
        direct = used == 4 * bits
        # bits that lie apart are best read by neighbouring lanes, so each writes little at a time
        block, turns = (BLOCK, 1) if direct else (256, 4) if inwards else (512, 2)
        kernel = _pack_fours if inwards else _unpack_fours
        given, other = (fours, words) if inwards else (words, fours)
        kernel[(ceil_div(made, block * turns),)](
            given, other, made, given.numel(), BITS=bits, USED=used, WORDS=width // 2, FOURS=n // 4, TAKEN=_taken(bits, used, inwards),
            TURNS=turns, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _taken(bits: int, used: int, inwards: bool) -> int:
    """How many pieces of one kind a piece of the other kind may reach over: words of `used` bits, and 4 * bits."""
    one, other = (used, 4 * bits) if inwards else (4 * bits, used)
    return max((start % other + one + other - 1) // other for start in range(0, one * other, one))


def _rows(codes: Tensor, packed: Tensor, n: int, bits: int, per: int, inwards: bool) -> None:
    width = packed.numel() if n == codes.numel() else packed.numel() // (codes.numel() // max(n, 1))
    if codes.numel():
        kernel, given, made = (_pack_rows, codes, packed) if inwards else (_unpack_rows, packed, codes)
        kernel[(ceil_div(made.numel(), BLOCK),)](given, made, n, width, made.numel(), BITS=bits, PER=per, BLOCK=BLOCK, num_warps=4)


def _launches(rows: int, size: int) -> Iterator[tuple[int, int]]:
    each = max(1, MOST // size)
    yield from ((first, min(first + each, rows)) for first in range(0, rows, each))


def _aligned(x: Tensor, size: int) -> Tensor:
    """x, or a copy where it begins between two numbers of `size` bytes."""
    return x if x.data_ptr() % size == 0 and x.storage_offset() % size == 0 else x.clone()
