"""Quantisation arithmetic in plain torch: the definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# bits: (codes per group, dtype with one byte for each of them); a group of codes fills whole bytes
_GROUPS = {
    1: (8, torch.int64), 2: (4, torch.int32), 3: (8, torch.int64), 4: (2, torch.int16), 5: (8, torch.int64), 6: (4, torch.int32),
    7: (8, torch.int64),
}  # fmt: skip


def pack(codes: Tensor, bits: int) -> Tensor:
    n = codes.shape[-1]
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], packed_bytes(n, bits))
    if bits == 8:
        return codes.clone()
    lanes, word_type = _GROUPS[bits]
    padded = codes.new_zeros(*codes.shape[:-1], n + -n % lanes)
    padded[..., :n] = codes
    # a word holds one code a byte, lowest first: neighbours are moved together, then pairs, then fours
    word = padded.view(word_type)
    for half in _halves(lanes):
        word = _moved(word, half, bits, lanes, -half * (8 - bits))
    parts = [(word >> (8 * i)) & 0xFF for i in range(lanes * bits // 8)]
    return torch.stack(parts, -1).to(torch.uint8).flatten(-2)[..., : packed_bytes(n, bits)].clone()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], n)
    if bits == 8:
        return packed.clone()
    lanes, word_type = _GROUPS[bits]
    size = lanes * bits // 8
    groups = pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size))
    word = groups[..., 0].to(word_type)
    for i in range(1, size):
        word |= groups[..., i].to(word_type) << (8 * i)
    # the same steps backwards: halves are moved apart, then quarters, until each code has a byte
    for half in reversed(_halves(lanes)):
        word = _moved(word, half, bits, lanes, half * (8 - bits))
    return word.view(torch.uint8)[..., :n]


def _moved(word: Tensor, half: int, bits: int, lanes: int, shift: int) -> Tensor:
    """Each upper run of `half` codes moved towards (shift < 0) or away from the lower one."""
    moved, kept = (word >> -shift, 2 * half) if shift < 0 else (word << shift, half)
    if bits > 4:  # what is moved along of the lower run would come to lie on codes
        low = sum(((1 << (half * bits)) - 1) << (16 * half * i) for i in range(lanes // (2 * half)))
        high = low << (half * bits if shift < 0 else 8 * half)
        return (word & low) | (moved & high)
    return (word | moved) & _lanes_mask(bits, lanes, kept)


def _halves(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length() - 1)]


def _lanes_mask(bits: int, lanes: int, run: int) -> int:
    """In a word of `lanes` bytes, the low run * bits bits of every run bytes."""
    return sum(((1 << (run * bits)) - 1) << (8 * start) for start in range(0, lanes, run))


def packed_bytes(n: int, bits: int) -> int:
    return -(-n * bits // 8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    n, per = codes.shape[-1], 16 // bits
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], 2 * -(-n // per))
    lanes = pad(codes, (0, -n % per)).unflatten(-1, (-1, per))
    word = torch.zeros(lanes.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(per):
        word |= lanes[..., i].to(torch.int32) << (i * bits)
    return word.to(torch.int16).view(torch.uint8)


def unpack_words(packed: Tensor, bits: int, n: int) -> Tensor:
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], n)
    if 16 % bits == 0:  # no code lies across two bytes
        return unpack(packed, bits, n)[..., :n]
    word = packed.contiguous().view(torch.int16).to(torch.int32)
    lanes = [((word >> (i * bits)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(16 // bits)]
    return torch.stack(lanes, -1).flatten(-2)[..., :n]


def exact(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic on x runs in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(x: Tensor, dim: int, group: int) -> Tensor:
    """x with axis `dim` split into (groups, group)."""
    return x.unflatten(dim, (-1, group))


def affine_parameters(x: Tensor, bits: int, dims: tuple[int, ...], clip: float) -> tuple[Tensor, Tensor]:
    wide = x.to(exact(x))
    lo, hi = wide.amin(dims, keepdim=True) * clip, wide.amax(dims, keepdim=True) * clip
    zero = lo.to(x.dtype)
    # the step is measured from the zero point as it is stored, so that rounding it never costs range at the top
    scale = (hi - zero).clamp(min=0) / ((1 << bits) - 1)
    return scale.to(x.dtype), zero


def symmetric_scale(x: Tensor, bits: int, dims: tuple[int, ...], clip: float) -> Tensor:
    largest = x.to(exact(x)).abs().amax(dims, keepdim=True) * clip
    return (largest / ((1 << (bits - 1)) - 1)).to(x.dtype)


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    wide = exact(x)
    step = scale.to(wide)
    # a step of 0 means that all values equal the zero point: code 0 stands for them exactly
    codes = (x.to(wide) - zero.to(wide)) / torch.where(step > 0, step, 1.0)
    return codes.round_().clamp_(0, (1 << bits) - 1).masked_fill_(step == 0, 0).to(torch.uint8)


def symmetric_encode(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    middle, most = 1 << (bits - 1), (1 << (bits - 1)) - 1
    step = scale.to(exact(x))
    steps = (x.to(step.dtype) / torch.where(step > 0, step, 1.0)).round_().clamp_(-most, most)
    return (steps + middle).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    wide = exact(scale)
    return codes.to(wide, copy=True).mul_(scale.to(wide)).add_(zero.to(wide)).to(dtype)
