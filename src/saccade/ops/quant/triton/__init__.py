"""Triton kernels for quant: ranges and codes, codes and numbers, bits packed and unpacked, codebooks, the Hadamard transform."""

from __future__ import annotations

from saccade.ops.quant.triton.hadamard import butterfly
from saccade.ops.quant.triton.levels import levels_of, nearest
from saccade.ops.quant.triton.measure import parameters, quantise
from saccade.ops.quant.triton.packing import pack, unpack
from saccade.ops.quant.triton.rows import quantise_rows
from saccade.ops.quant.triton.steps import decode, encode

__all__ = ["butterfly", "decode", "encode", "levels_of", "nearest", "pack", "parameters", "quantise", "quantise_rows", "unpack"]
