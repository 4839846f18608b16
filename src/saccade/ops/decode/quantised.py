"""decode_quantised: attention over keys and values in few bits, without ever writing them out in full."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import HeadLayout, Partial, merge
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import cpu, folded, reference
from saccade.ops.decode.check import check_lengths
from saccade.ops.decode.packed import Packed
from saccade.ops.decode.ragged import by_row
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.quant import hadamard
from saccade.ops.record import LastRun, note

CHUNK = 2048  # tokens that the plain torch path holds in full at a time
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")


def decode_quantised(
    q: Tensor,
    keys: Packed,
    values: Packed,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Partial:
    """Attention of q `(B, Hq, m, D)`, m <= 16, over a quantised segment; every query sees all of it.

    keys, values: Packed of the same B, Hk and n; rotated keys meet a rotated q, and the output of rotated values is rotated back.
    lengths: `(B,)` int32, the keys of each row that count, the first ones. scale, softcap, return_lse: as in `decode`.
    impl: "triton" reads packed bytes and writes nothing out: codes are multiplied as they are, parameters go to q, to the products and
    to the weights. It takes float16 and bfloat16 queries, 2 to 8 bits, groups of tokens in multiples of 16, up to 4 equal groups of
    channels for each token. "cpu": plain torch on any device; 2, 4 and 8 bits are multiplied as they are there, too (see `folded`),
    others are restored CHUNK tokens at a time.
    "reference": everything dequantised in float32 (float64 for float64 q), then attended.
    Returns Partial as `decode` does. Raises ValueError or TypeError on inputs that don't fit.
    """
    _check(q, keys, values, impl)
    if lengths is not None:
        check_lengths(q, lengths)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap} must be positive, or None for no cap")
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    # a rotation of both sides leaves the products as they are
    rotated = hadamard(q) if keys.rotated else q
    if _on_gpu(impl, q, keys, values):
        from saccade.ops.decode.triton.packed import attend

        out, lse = attend(rotated, keys, values, lengths, factor, softcap, return_lse)
        result, ran = Partial(out, lse if return_lse else None), "triton"
    else:
        ran = "reference" if impl == "reference" else "cpu"
        result = _in_torch(rotated, keys, values, lengths, factor, softcap, ran)
    if values.rotated:
        result = Partial(hadamard(result.out), result.lse)
    if not torch.compiler.is_compiling():
        note(LastRun(
            op="decode", impl=ran, n_q=q.shape[2], n_k=keys.length, heads=q.shape[1], device=str(q.device),
            dtype=str(q.dtype).removeprefix("torch."),
        ))  # fmt: skip
    return result if return_lse else Partial(result.out, None)


def _in_torch(
    q: Tensor, keys: Packed, values: Packed, lengths: Tensor | None, scale: float, softcap: float | None, ran: str
) -> Partial:
    n = keys.length
    ends = None if lengths is None else lengths.clamp(0, n).tolist()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = q.to(wide)
    if ran == "cpu" and folded.takes(keys) and folded.takes(values) and not (torch.is_grad_enabled() and q.requires_grad):
        out, lse = folded.attend(exact, keys, values, lengths, scale, softcap)
        return Partial(out.to(q.dtype), lse)
    layout = HeadLayout(query_heads=q.shape[1], kv_heads=keys.codes.shape[1], head_dim=keys.dim, value_dim=values.dim)
    rectangle = (reference if ran == "reference" else cpu).rectangle
    chunk = max(n, 1) if ran == "reference" else CHUNK
    parts = []
    for begin in range(0, max(n, 1), chunk):
        end = min(begin + chunk, n)
        k, v = (x.read_stored(begin, end, wide) for x in (keys, values))
        problem = Problem(
            q=exact, k=k, v=v, selection=None, causal=False, scale=scale, softcap=softcap, bias=None, return_lse=True, layout=layout
        )
        if ends is None:
            parts.append(rectangle(problem))
        else:
            parts.append(by_row(rectangle, problem, [min(max(e - begin, 0), end - begin) for e in ends], None))
    out, lse = merge(*parts)
    return Partial(out.to(q.dtype), lse)


def _check(q: Tensor, keys: Packed, values: Packed, impl: str) -> None:
    if q.ndim != 4 or q.shape[2] > 16 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} {tuple(q.shape)}: expected floating point (B, Hq, m, D) with at most 16 queries")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if keys.codes.shape[:3] != values.codes.shape[:3] or keys.codes.device != q.device or values.codes.device != q.device:
        raise ValueError(
            f"keys are (B, Hk, n) {tuple(keys.codes.shape[:3])} on {keys.codes.device}, values {tuple(values.codes.shape[:3])} on "
            f"{values.codes.device} and q on {q.device}: expected the same"
        )
    batch, heads = keys.codes.shape[:2]
    if q.shape[0] != batch or heads == 0 or q.shape[1] % heads or q.shape[3] != keys.dim:
        raise ValueError(
            f"q is {tuple(q.shape)} and the keys have batch {batch}, {heads} heads and {keys.dim} channels: expected the same batch and "
            "channels, and query heads a multiple of the key/value heads"
        )


def _on_gpu(impl: str, q: Tensor, keys: Packed, values: Packed) -> bool:
    if impl != "triton" and not (impl == "auto" and runs_on(q)):
        return False
    if impl == "triton":
        require_triton("decode_quantised", q)
    from saccade.ops.decode.triton.packed import unsupported

    why = unsupported(q, keys, values)
    if why and impl == "triton":
        raise ValueError(f'decode_quantised: impl "triton" can\'t run here: {why}; use impl "auto"')
    return why is None
