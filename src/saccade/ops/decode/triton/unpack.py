"""Codes out of 16-bit words, as numbers, in registers.

A word holds 16 // BITS codes; word w of a row holds channels w * PER ... w * PER + PER - 1. Taking code J of every word gives the
channels J, PER + J, 2 PER + J, ...: the dot products run over each such set on its own, so that nothing has to be interleaved.
On the GPU two codes are handled at a time: a code in the low bits of a bfloat16 128 (float16 1024) is that number plus the code.
"""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.decode.triton.tile import narrow

_MAGIC = 1 << 23  # a float32 of this size has no digits behind the point


@triton.constexpr_function
def _twice(half: int) -> int:
    return half << 16 | half


@triton.constexpr_function
def _asm(shift, bits, offset, kind, raised):
    """PTX for two codes: their bits as numbers, less what stands for 0 unless `raised`. Exact."""
    one, name = (0x4300, "bf16x2") if kind == "bf16" else (0x6400, "f16x2")
    lines = ["{", ".reg .b32 t, c;"]
    lines.append(f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;")
    lines.append(f"lop3.b32 {'$0' if raised else 't'}, t, {_twice((1 << bits) - 1):#x}, {_twice(one):#x}, 0xEA;")
    if not raised:
        # a step of the last bit is 1 here, so this is the number of a code that stands for 0
        lines.append(f"mov.b32 c, {_twice(one + offset):#x};")
        lines.append(f"sub.{name} $0, t, c;")
    lines.append("}")
    return "\n".join(lines)


@triton.constexpr_function
def _asm_bytes(place, offset):
    """The same for bytes, which bfloat16 has no room for beside its 128: each becomes the last digits of a float32 first."""
    lines = ["{", ".reg .b32 a, b;"]
    for name, byte in (("a", place), ("b", place + 2)):
        lines.append(f"prmt.b32 {name}, $1, 0x4B000000, {0x7440 + byte:#x};")
        lines.append(f"sub.f32 {name}, {name}, {_MAGIC + offset}.0;")
    lines += ["cvt.rn.bf16x2.f32 $0, b, a;", "}"]
    return "\n".join(lines)


@triton.jit
def codes(words, J: tl.constexpr, BITS: tl.constexpr):
    """Code J of each word as int32."""
    return (words.to(tl.int32) >> (J * BITS)) & ((1 << BITS) - 1)


@triton.jit
def numbers(
    words, book, channel, J: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, BOOK: tl.constexpr, KIND: tl.constexpr,
    ASM: tl.constexpr, RAISED: tl.constexpr,
):  # fmt: skip
    """Code J of each word (int16) as a number in KIND, a dtype: less OFFSET, or what the codebook says.

    RAISED, for bfloat16 with ASM and fewer than 8 bits: 128 more, OFFSET not taken off; whoever multiplies takes 128 + OFFSET times the
    factors off.
    BOOK: 0 none, 1 one of 2^BITS entries, 2 such a one for each channel; `channel` is broadcastable to the words.
    """
    if BOOK > 0:
        code = codes(words, J, BITS)
        if BOOK == 2:
            code += channel * (1 << BITS)
        x = narrow(tl.load(book + code).to(tl.float32), KIND)
    elif ASM:
        if tl.bfloat16 == KIND and BITS == 8:
            text: tl.constexpr = _asm_bytes(J, OFFSET)
        elif tl.bfloat16 == KIND:
            text: tl.constexpr = _asm(J * BITS, BITS, OFFSET, "bf16", RAISED)
        else:
            text: tl.constexpr = _asm(J * BITS, BITS, OFFSET, "f16", False)
        x = tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        x = x.to(KIND, bitcast=True)
    else:
        x = (codes(words, J, BITS) - OFFSET).to(tl.float32).to(KIND)
    return x
