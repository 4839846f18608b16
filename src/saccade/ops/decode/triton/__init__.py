"""decode on the GPU: split-K kernels in Triton, and torch ops around them so that torch.compile passes through."""

from typing import Optional

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.ops.decode.triton.launch import launch_listed, launch_stream
from saccade.ops.decode.triton.plan import Config

__all__ = ["Config", "attend"]

LARGEST_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, *, lengths: Tensor | None, offsets: Tensor | None,
    block_table: Tensor | None, kv_heads: int, scale: float, softcap: float | None, causal: bool, return_lse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse, empty unless asked for). Layouts as in `decode`; the arguments have been checked."""
    compiling = torch.compiler.is_compiling()
    if selection is None:
        run = torch.ops.saccade.decode_stream if compiling else launch_stream
        rest = () if compiling else (config,)
        return run(q, k, v, lengths, offsets, block_table, kv_heads, scale, softcap, causal, return_lse, *rest)
    run = torch.ops.saccade.decode_listed if compiling else launch_listed
    rest = () if compiling else (config,)
    s = selection.own_lists()
    return run(
        q, k, v, lengths, block_table, s.starts, s.start_counts, s.tokens, s.token_counts, s.log_weight, s.block_q, s.block_k,
        s.n_k, scale, softcap, causal or s.causal, return_lse, *rest,
    )  # fmt: skip


def unsupported(q: Tensor, v: Tensor, needs_grad: bool) -> str | None:
    """Why the kernels can't run on this, or None."""
    if q.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_DIM or min(q.shape[-1], v.shape[-1]) < 1:
        return f"it takes head dims of 1 to {LARGEST_DIM}, not {q.shape[-1]} and {v.shape[-1]}"
    return "it has no backward, and gradients are asked for" if needs_grad else None


# Plain calls go to the launchers directly: a torch op costs more time than a short decode step. Annotations of these two
# are read by torch, which doesn't take all forms of them.


@torch.library.custom_op("saccade::decode_stream", mutates_args=())
def _stream_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Optional[Tensor], offsets: Optional[Tensor], table: Optional[Tensor],  # noqa: UP045
    kv_heads: int, scale: float, softcap: Optional[float], causal: bool, want_lse: bool,  # noqa: UP045
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_stream(q, k, v, lengths, offsets, table, kv_heads, scale, softcap, causal, want_lse)


@torch.library.custom_op("saccade::decode_listed", mutates_args=())
def _listed_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Optional[Tensor], table: Optional[Tensor], starts: Tensor,  # noqa: UP045
    start_counts: Tensor, tokens: Tensor, token_counts: Tensor, log_weight: Optional[Tensor], block_q: int,  # noqa: UP045
    block_k: int, n_k: int, scale: float, softcap: Optional[float], causal: bool, want_lse: bool,  # noqa: UP045
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_listed(
        q, k, v, lengths, table, starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, n_k, scale, softcap,
        causal, want_lse,
    )  # fmt: skip


def _shapes(q: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse


@_stream_op.register_fake
def _(q, k, v, lengths, offsets, table, kv_heads, scale, softcap, causal, want_lse):
    return _shapes(q, v, want_lse)


@_listed_op.register_fake
def _(
    q, k, v, lengths, table, starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, n_k, scale, softcap,
    causal, want_lse,
):  # fmt: skip
    return _shapes(q, v, want_lse)
