"""decode_quantised on the GPU: what the kernel takes, and its launch."""
# pyright: reportCallIssue=false

import math
from typing import Any, Optional

import torch
from torch import Tensor

from saccade.ops.decode.packed import Packed
from saccade.ops.decode.triton.launch import Result, by_rows
from saccade.ops.decode.triton.plan import Config, Shape, splits
from saccade.ops.decode.triton.quantised import quantised
from saccade.ops.decode.triton.tile import SIMULATED
from saccade.ops.gpu import next_power_of_two

LARGEST_DIM = 256
MOST_RUNS = 4
MOST_OUTLIERS = 8


def quantised_config(group: int, words: int, channels: int, queries: int) -> Config:
    """group: tokens that share parameters per channel (0 for none), a multiple of 16. words: of a run of values, as a tile.
    channels: of keys or values with what tiles add to them, the more of both. queries: columns of a tile."""
    # a warp takes 16 words of values: with fewer words than that, two warps would unpack the same ones
    warps = 2 if words > 16 else 1
    # what fits the registers
    wide = (128 if channels <= 160 else 64) * warps // 2
    if queries > 8:
        wide, warps = 64 * warps // 2 if queries == 16 else 32, warps if queries == 16 else 4
    while group and group % wide:
        wide //= 2
    return Config(wide, warps, 3 if queries <= 16 else 2, 4 * 2 // warps, 512)


def unsupported(q: Tensor, keys: Packed, values: Packed) -> str | None:
    """Why the kernel can't run on this, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 queries, not {q.dtype}"
    if torch.is_grad_enabled() and q.requires_grad:
        return "it has no backward, and gradients are asked for"
    for name, x in (("keys", keys), ("values", values)):
        per = 16 // x.bits
        if x.bits == 1:
            return f"the {name} have 1 bit, it takes 2 to 8"
        if x.dim > LARGEST_DIM:
            return f"the {name} have {x.dim} channels, it takes {LARGEST_DIM} at most"
        if x.scale is not None and x.granularity == "channel" and x.group < x.length and x.group % 16:
            return f"the {name} have groups of {x.group} tokens, it takes multiples of 16"
        if x.scale is not None and x.granularity == "token":
            runs = x.scale.shape[3]
            if runs > MOST_RUNS or (runs > 1 and (x.group % per or x.dim % x.group)):
                return (
                    f"the {name} have {runs} groups of {x.group} of {x.dim} channels: it takes up to {MOST_RUNS} equal groups, "
                    f"multiples of {per} channels"
                )
        if x.outlier_index is not None and x.outlier_index.shape[3] > MOST_OUTLIERS:
            return f"the {name} have {x.outlier_index.shape[3]} outliers a token, it takes {MOST_OUTLIERS}"
        if not x.codes.is_contiguous() and (x.codes.stride(3) != 1 or any(s % 2 for s in x.codes.stride()[:3])):
            return f"the codes of the {name} have strides {x.codes.stride()}: rows must be dense, strides even"
    return None


def attend(
    q: Tensor, keys: Packed, values: Packed, lengths: Tensor | None, scale: float, softcap: float | None, want_lse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse, empty unless asked for) of q, already rotated if the keys are; the output is left rotated if the values are."""
    if torch.compiler.is_compiling():
        return torch.ops.saccade.decode_packed(
            q, _flat(keys), _numbers(keys), _flat(values), _numbers(values), lengths, scale, softcap, want_lse
        )  # fmt: skip
    return launch(q, keys, values, lengths, scale, softcap, want_lse, config)


def launch(
    q: Tensor, keys: Packed, values: Packed, lengths: Tensor | None, scale: float, softcap: float | None, want_lse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = by_rows(q)
    batch, heads, m, dim = q.shape
    kv_heads, n = keys.codes.shape[1:3]
    shape = Shape.of(heads // kv_heads, m)
    # queries are the columns of the tiles here: 8 are enough
    block_m = 8 if shape.group * m <= 8 else shape.block_m
    k_side, v_side = _side(keys, "K"), _side(values, "V")
    if config is None:
        groups = [x.group for x in (keys, values) if x.scale is not None and x.granularity == "channel" and x.group < n]
        sides = (("K", k_side), ("V", v_side))
        channels = max(16 // side[f"{name}_BITS"] * side[f"{name}_RUNS"] * side[f"{name}_BLOCK"] for name, side in sides)
        config = quantised_config(math.gcd(*groups), v_side["V_BLOCK"], channels, block_m)
    programs = batch * kv_heads * shape.row_blocks
    result = Result(q, values.dim, splits(programs, n, q, config), want_lse)
    if programs == 0 or m == 0:
        return result.out, result.lse
    k_side["K_ASM"] = v_side["V_ASM"] = not SIMULATED.value
    # codes of up to 7 bits lie beside 128 in a bfloat16
    raised = not SIMULATED.value and q.dtype == torch.bfloat16 and keys.codebook is None and keys.bits < 8
    k_side["K_RAISE"] = 128 + k_side["K_OFFSET"] if raised else 0
    k_words, v_words = (_words(x.codes) for x in (keys, values))
    strides = q.stride()
    quantised[(programs, result.parts)](
        q, k_words, v_words, result.part, result.part_lse, q if lengths is None else lengths, *_pointers(keys, q),
        *_pointers(values, q), scale, softcap or 1.0, n, m, strides[0], strides[1], strides[2], *k_words.stride()[:2],
        *v_words.stride()[:2], keys.group, values.group,
        stride_kn=k_words.stride(2), stride_vn=v_words.stride(2), D=dim, DV=values.dim, HEADS=kv_heads, GROUP=shape.group,
        ROW_BLOCKS=shape.row_blocks, QT=m, **k_side, **v_side, LENGTHS=lengths is not None, SOFTCAP=softcap is not None,
        **result.flags(), BLOCK_M=block_m, BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return result.finish()


def _words(codes: Tensor) -> Tensor:
    """Codes as 16-bit words; a view."""
    return codes.view(torch.int16)


def _pointers(x: Packed, absent: Tensor) -> list[Tensor]:
    return [
        absent if p is None else p.contiguous() for p in (x.scale, x.zero, x.codebook, x.outlier_index, x.outlier_delta)
    ]


def _side(x: Packed, name: str) -> dict[str, Any]:
    """The compile-time facts of one side."""
    folded = x.scale is not None and x.granularity == "token"
    runs = x.scale.shape[3] if folded and x.scale is not None else 1
    words = x.codes.shape[3] // 2
    # a symmetric code is less its middle anyway; an affine one is taken from there too, and the centre added apart
    affine = x.codebook is None and x.scale is not None and not x.symmetric
    middle = 1 << (x.bits - 1)
    facts = {
        "BITS": x.bits, "OFFSET": middle if affine or x.symmetric else 0, "MID": middle if affine else 0,
        "SCALED": x.scale is not None, "ZEROED": x.zero is not None,
        "BY_TOKEN": folded, "BOOK": 0 if x.codebook is None else x.codebook.ndim if x.codebook.ndim == 1 else 2,
        "OUTLIERS": 0 if x.outlier_index is None else x.outlier_index.shape[3], "RUNS": runs, "RUN": words // runs,
        "BLOCK": max(16, next_power_of_two(words // runs)),
    }  # fmt: skip
    return {f"{name}_{key}": value for key, value in facts.items()}


def _flat(x: Packed) -> list[Tensor | None]:
    return [x.codes, x.scale, x.zero, x.codebook, x.outlier_index, x.outlier_delta]


def _numbers(x: Packed) -> list[int]:
    return [x.bits, x.dim, int(x.granularity == "token"), x.group, int(x.symmetric)]


def _packed(tensors: list[Tensor | None], numbers: list[int]) -> Packed:
    codes, scale, zero, codebook, index, delta = tensors
    bits, dim, by_token, group, symmetric = numbers
    assert codes is not None
    return Packed(
        codes=codes, bits=bits, dim=dim, scale=scale, zero=zero, granularity="token" if by_token else "channel", group=group,
        symmetric=bool(symmetric), codebook=codebook, outlier_index=index, outlier_delta=delta,
    )  # fmt: skip


# annotations of this are read by torch, which doesn't take all forms of them
@torch.library.custom_op("saccade::decode_packed", mutates_args=())
def _packed_op(
    q: Tensor, keys: list[Optional[Tensor]], key_numbers: list[int], values: list[Optional[Tensor]], value_numbers: list[int],  # noqa: UP045
    lengths: Optional[Tensor], scale: float, softcap: Optional[float], want_lse: bool,  # noqa: UP045
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch(q, _packed(keys, key_numbers), _packed(values, value_numbers), lengths, scale, softcap, want_lse)


@_packed_op.register_fake
def _(q, keys, key_numbers, values, value_numbers, lengths, scale, softcap, want_lse):
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32)
    return q.new_empty((*q.shape[:3], value_numbers[1])), lse
